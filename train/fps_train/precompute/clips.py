"""Clips and their captions, as people have them on disk. Nothing is decoded here."""

import csv
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fps_jax.media.clips import ClipError

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = ("metadata.csv", "metadata.json", "metadata.jsonl")
PATH_FIELDS = ("video_path", "file_name", "video")
CAPTION_FIELDS = ("caption", "text", "prompt")
_MOST_CAPTION_BYTES = 1 << 20  # of a .txt; one beyond that is no caption, and isn't read
_MOST_METADATA_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video or image file and what is said of it.

    Attributes:
      path: absolute.
      source: how it is named in tables and in the data: relative to the folder of videos or of the metadata.
    """

    path: pathlib.Path
    source: str
    caption: str

    @property
    def is_image(self) -> bool:
        return self.path.suffix.lower() in IMAGES


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What is left out, and why. `reason` is the same text for the same cause; `detail` is this one's own."""

    source: str
    reason: str
    detail: str = ""


def find_clips(
    videos: pathlib.Path | None, captions: pathlib.Path | None = None, *, captioned: bool = True
) -> tuple[list[Clip], list[Dropped]]:
    """Clips with their captions, in order of their names, and the files that come without a partner.

    Args:
      videos: a folder, searched with its subfolders. The caption of a clip is the .txt of the same stem beside it; or the folder
        holds one of METADATA.
      captions: a .csv, .json or .jsonl with a column of PATH_FIELDS and one of CAPTION_FIELDS; paths are relative to it, or,
        where nothing lies there, to `videos`.
      captioned: drop clips without a caption. Otherwise captions of a folder's clips aren't read, and all are "".
    Raises: FileNotFoundError, NotADirectoryError or ValueError about the folder or the metadata, in one line.
    """
    if videos is not None and not videos.is_dir():
        kind = NotADirectoryError if videos.exists() else FileNotFoundError
        raise kind(f"videos={str(videos)!r} is not a folder; name the folder that holds the clips")
    if captions is None and videos is not None:
        found = [videos / name for name in METADATA if (videos / name).is_file()]
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise ValueError(f"videos={str(videos)!r} holds {names}; say which with --captions")
        captions = found[0] if found else None
    if captions is not None:
        return _by_metadata(captions, videos, captioned)
    if videos is None:
        raise ValueError(
            "videos and captions are both missing; pass --videos DIR, or --captions FILE that names the clips"
        )
    if not captioned:
        return [
            Clip(path=path.absolute(), source=str(path.relative_to(videos)), caption="") for path in _some(videos)
        ], []
    return _by_stem(videos)


def _media(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every video and image of a folder, hidden ones left out."""
    files = (p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS + IMAGES and p.is_file())
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _some(videos: pathlib.Path) -> list[pathlib.Path]:
    media = _media(videos)
    if not media:
        raise ValueError(f"videos={str(videos)!r} holds no clip ({', '.join(VIDEOS + IMAGES)})")
    return media


def _by_stem(videos: pathlib.Path) -> tuple[list[Clip], list[Dropped]]:
    media = _some(videos)
    clips, dropped = [], []
    for path in media:
        source, beside = str(path.relative_to(videos)), path.with_suffix(".txt")
        try:
            clips.append(Clip(path=path.absolute(), source=source, caption=_read_caption(beside)))
        except ClipError as error:
            dropped.append(Dropped(source=source, reason=str(error), detail=error.detail))
    stems = {path.with_suffix("") for path in media}
    alone = (p for p in videos.rglob("*.txt") if p.with_suffix("") not in stems and not p.name.startswith("."))
    dropped += [Dropped(source=str(p.relative_to(videos)), reason="a caption without a clip") for p in sorted(alone)]
    return clips, dropped


def _read_caption(path: pathlib.Path) -> str:
    if not path.is_file():
        raise ClipError("no caption")
    if path.stat().st_size > _MOST_CAPTION_BYTES:
        raise ClipError("its caption is no text", f"{path.name} has over {_MOST_CAPTION_BYTES >> 20} MiB")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (UnicodeDecodeError, OSError):
        raise ClipError("its caption is no text", f"{path.name} is not readable as UTF-8") from None
    if not text:
        raise ClipError("its caption is empty")
    return text


def _by_metadata(
    captions: pathlib.Path, videos: pathlib.Path | None, captioned: bool
) -> tuple[list[Clip], list[Dropped]]:
    folder = captions.absolute().parent
    clips: list[Clip] = []
    dropped: list[Dropped] = []
    named: set[pathlib.Path] = set()
    for place, name, caption in _rows(captions):
        candidates = [folder / name] + ([] if videos is None else [videos.absolute() / name])
        path = next((p for p in candidates if p.is_file()), None)
        named.add((path or candidates[0]).resolve())
        if path is None:
            dropped.append(Dropped(source=name, reason="a caption without a clip", detail=place))
        elif captioned and not caption.strip():
            dropped.append(Dropped(source=name, reason="its caption is empty", detail=place))
        elif path.suffix.lower() not in VIDEOS + IMAGES:
            dropped.append(Dropped(source=name, reason="neither a video nor an image by its name", detail=place))
        else:
            clips.append(Clip(path=path, source=name, caption=caption.strip()))
    if not clips and not dropped:
        raise ValueError(f"captions={str(captions)!r} names no clip; write a row for each")
    if videos is not None:
        others = (p for p in _media(videos) if p.resolve() not in named)
        dropped += [Dropped(source=str(p.relative_to(videos)), reason="no caption") for p in others]
    return sorted(clips, key=lambda clip: clip.source), dropped


def _rows(captions: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """(where in the file, path, caption) of each entry."""
    what, kind = f"captions={str(captions)!r}", captions.suffix.lower()
    if kind not in (".csv", ".json", ".jsonl"):
        raise ValueError(f"{what} must end in .csv, .json or .jsonl")
    if not captions.is_file():
        if captions.exists():
            raise ValueError(f"{what} is no regular file; it is a table of clips and captions")
        raise FileNotFoundError(f"{what} doesn't exist; it is a table of clips and captions")
    if captions.stat().st_size > _MOST_METADATA_BYTES:
        raise ValueError(f"{what} has over {_MOST_METADATA_BYTES >> 30} GiB; split it")
    try:
        text = captions.read_text(encoding="utf-8-sig")
        if kind == ".csv":
            reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
            entries = [(f"line {reader.line_num}", row) for row in reader]
        elif kind == ".jsonl":
            lines = enumerate(text.split("\n"), 1)
            entries = [(f"line {n}", json.loads(line)) for n, line in lines if line.strip()]
        else:
            entries = [(f"entry {n}", row) for n, row in enumerate(_list(json.loads(text)), 1)]
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{what} can't be read as {kind[1:]} ({' '.join(str(error).split())})") from None
    for place, row in entries:
        yield place, _field(row, PATH_FIELDS, what, place), _field(row, CAPTION_FIELDS, what, place)


def _list(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError("it must be a list of objects")
    return content


def _field(row: Any, names: tuple[str, ...], what: str, place: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{what}, {place}: it must be an object with a path and a caption")
    present = [name for name in names if row.get(name) is not None]
    if len(present) != 1 or not isinstance(row[present[0]], str) or "\0" in row[present[0]]:
        has = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"{what}, {place}: exactly one of {', '.join(names)} must hold a text; it has {has}")
    return row[present[0]]
