"""Single files, as ComfyUI's and Kijai's repackagings are: named one by one, or lying anywhere in a folder, told by content."""

import atexit
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fps_convert import key_patterns, spelling, unsupported
from fps_convert.files import Files, has_tokenizer
from fps_convert.formats.pth import PthFile
from fps_convert.formats.readers import Reader, ShardedSafetensors, open_weights
from fps_convert.infer import dit_sizes, stated_by_shapes
from fps_convert.layouts import COMFYUI, Layout, layout_by_names, top_names, tree
from fps_convert.parts import Found, tell, tokenizer_bytes, told_apart
from fps_jax.config import COMPONENTS, Component
from fps_jax.files import read_json

OPTIONS: dict[Component, str] = {name: f"--{name.replace('_', '-')}" for name in COMPONENTS}
# A field that the config.json of just this component has: one that lies beside its file is read.
_OF_ITS_JSON: dict[Component, tuple[str, ...]] = {
    "dit": ("num_heads", "num_attention_heads"),
    "vae": ("z_dim",),
    "text_encoder": ("d_model",),
    "image_encoder": ("hidden_size", "vision_config"),
}


@dataclass(frozen=True)
class Given:
    """Files that were named: each a .safetensors, the .index.json of one in shards, or a .pth; and the tokenizer's folder.

    root: of the DiT's .pt that holds several state dicts under names, the one to read. Raises ValueError without such a file.
    """

    dit: str | os.PathLike | None = None
    vae: str | os.PathLike | None = None
    text_encoder: str | os.PathLike | None = None
    image_encoder: str | os.PathLike | None = None
    tokenizer: str | os.PathLike | None = None
    root: str | None = None

    def __post_init__(self):
        if self.root is not None and self.dit is None:
            raise ValueError(f"root={self.root!r} is of the DiT's file, and none is given; give --dit FILE (dit=) too")

    def file(self, name: Component) -> pathlib.Path | None:
        given = getattr(self, name)
        return None if given is None else pathlib.Path(given).expanduser()

    def all(self) -> list[str | os.PathLike]:
        """Everything that is read."""
        files = (getattr(self, name) for name in (*COMPONENTS, "tokenizer"))
        return [file for file in files if file is not None]


@dataclass(frozen=True)
class _Candidate:
    """A file that may be a component; `whole` is all that is in it. root: of the state dict in it that is read; '' without one."""

    found: Found
    file: pathlib.Path
    whole: Reader
    root: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class _Seen:
    """What a folder holds.

    Attributes:
      candidates: by component, of models that are supported.
      refused: why others aren't.
      damaged: why files can't be read.
      gguf: files of that kind.
      whole: folders in it that are checkpoints of their own, which are not looked into.
    """

    candidates: dict[Component, list[_Candidate]] = field(default_factory=lambda: {name: [] for name in COMPONENTS})
    refused: dict[Component, list[Exception]] = field(default_factory=lambda: {name: [] for name in COMPONENTS})
    damaged: list[Exception] = field(default_factory=list)
    gguf: list[pathlib.Path] = field(default_factory=list)
    whole: list[pathlib.Path] = field(default_factory=list)
    tokenizers: list[pathlib.Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_single_files(folder: pathlib.Path | None, given: Given, layout: Layout = COMFYUI) -> Files:
    """The files that were given, and for the rest those that lie anywhere in the folder.

    layout: of the folder, whose DiT's config.json says the heads of another of its width that was given.
    Raises: FileNotFoundError for a part that is nowhere; ValueError for two candidates of one part, or a file that is something
      else than it was given for; NotImplementedError for another model.
    """
    seen = _Seen() if folder is None else _look(folder, given)
    chosen: dict[Component, _Candidate] = {}
    for name in COMPONENTS:
        if name == "image_encoder" and not _has_image(chosen["dit"]):
            if given.image_encoder is not None:
                seen.notes.append("the image tower is left out: a T2V model doesn't use it")
            continue
        file = given.file(name)
        candidate = (
            _choose(folder, name, seen)
            if file is None
            else _open_given(name, file, given.root if name == "dit" else None)
        )
        if candidate is not None:
            chosen[name] = candidate
    namings = {name: candidate.found.naming for name, candidate in chosen.items()}
    places = {
        name: dataclasses.replace(place, naming=namings.get(name, place.naming), config=None)
        for name, place in COMFYUI.places.items()
    }
    files = Files(dataclasses.replace(COMFYUI, places=places), notes=seen.notes)
    for name, candidate in chosen.items():
        _take(files, name, candidate, {} if folder is None else dit_sizes(folder, layout))
    files.tokenizer = _tokenizer(folder, given, chosen["text_encoder"], seen.tokenizers)
    return files


def open_dit(given: Given, beside: Mapping[str, int]) -> Files:
    """The DiT's file alone. Raises as `open_single_files`.

    beside: sizes of the DiT that it takes the place of, as `infer.dit_sizes`.
    """
    candidate = _open_given("dit", pathlib.Path(given.dit or "").expanduser(), given.root)
    place = dataclasses.replace(COMFYUI.places["dit"], naming=candidate.found.naming, config=None)
    files = Files(dataclasses.replace(COMFYUI, places={"dit": place}))
    _take(files, "dit", candidate, beside)
    return files


def _take(files: Files, name: Component, candidate: _Candidate, beside: Mapping[str, int]) -> None:
    """Adds a component, with what its file says and doesn't."""
    found, file = candidate.found, candidate.file
    files.readers[name], files.where[name] = found.reader, file
    files.jsons[name] = _config_beside(name, file)
    files.notes_on[name] += candidate.notes
    if candidate.root:
        files.spelling |= {"root": candidate.root, "root_prefix": found.prefix}
    if found.prefix:
        files.notes_on[name].append(f"keys have the prefix {found.prefix!r}, which is left out")
    if name == "dit" and not files.jsons["dit"]:
        unsupported.check_dit(found.reader.tensors, {}, file)
        files.jsons["dit"], notes = stated_by_shapes(found.naming, found.reader, file, beside)
        files.notes_on["dit"] += notes


def _look(folder: pathlib.Path, given: Given) -> _Seen:
    """Looks through the tree; files that were given need no search, and what else they could be doesn't matter."""
    seen = _Seen()
    paths = [path for path in tree(folder) if not _hidden(path.relative_to(folder))]
    seen.whole = [path for path in paths if path.is_dir() and _is_whole(path)]
    seen.notes += [f"{path.relative_to(folder)} is a checkpoint of its own and is left out" for path in seen.whole]
    paths = [path for path in paths if not any(path.is_relative_to(whole) for whole in seen.whole)]
    in_shards: set[pathlib.Path] = set()
    for index in (
        path for path in paths if re.search(r"\.safetensors\.index(\.\w+)?\.json$", path.name) and path.is_file()
    ):
        try:
            reader = ShardedSafetensors(index)
        except (ValueError, FileNotFoundError) as error:
            seen.damaged.append(error)
            continue
        in_shards |= {info.file for info in reader.tensors.values()}
        _sort(reader, index, seen, given, folder)
    for path in paths:
        if path.is_dir() and has_tokenizer(path):
            seen.tokenizers.append(path)
        elif path.suffix.lower() == ".gguf":
            seen.gguf.append(path)
        elif path.suffix in (".safetensors", ".pth") and path.is_file() and path not in in_shards:
            try:
                whole = _open(path)
                if isinstance(whole, PthFile) and len(whole.roots) > 1:
                    roots = ", ".join(sorted(whole.roots))
                    seen.notes.append(
                        f"{path.relative_to(folder)} is left out: it holds {roots}; give it with --dit FILE"
                    )
                    continue
                reader, notes = spelling.unwrapped(whole)
            except ValueError as error:
                if path.suffix == ".pth":
                    seen.notes.append(f"{path.relative_to(folder)} is left out: {error}")
                else:
                    seen.damaged.append(error)
                continue
            root = whole.root if isinstance(whole, PthFile) else ""
            _sort(reader, path, seen, given, folder, root, tuple(notes))
    if has_tokenizer(folder):
        seen.tokenizers.append(folder)
    return seen


def _hidden(path: pathlib.PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


_PICKLES = (".pth", ".pt", ".bin", ".ckpt")  # torch's own names, also of old files that are bare pickles


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint in a layout of its own, whose JSON files count and would be lost on the way."""
    told = layout_by_names(top_names(folder))
    if told is None or told.marks:
        return told is not None
    # Told by its DiT's name alone, which a loose file may have too.
    return (folder / "config.json").is_file() and any(folder.glob("*.pth"))


def _open(file: pathlib.Path, root: str | None = None) -> Reader:
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\3\4"  # torch's, whatever its name: .pth, .pt, .bin, .ckpt
    if is_zip or file.suffix in _PICKLES:
        return PthFile(file, root)
    if root is not None:
        raise ValueError(f"root={root!r}: {file} is one state dict, without roots; leave it out")
    return open_weights(file)


def _sort(
    reader: Reader, file: pathlib.Path, seen: _Seen, given: Given, folder: pathlib.Path, root: str = "", notes: Any = ()
) -> None:
    """Puts a file where it belongs. root, notes: as of `_Candidate`."""
    told = tell(reader)
    if not told:
        what = told_apart(reader.tensors) or "no part of a Wan2.1 model"
        seen.notes.append(f"{file.relative_to(folder)} is {what} and is left out")
    for found in told:
        if given.file(found.component) is not None:
            continue
        try:
            if found.component == "dit":
                unsupported.check_file(file)
                unsupported.check_dit(found.reader.tensors, {}, file)
            elif found.component == "vae":
                unsupported.check_vae(found.reader.tensors, {}, file)
        except NotImplementedError as error:
            seen.refused[found.component].append(error)
            continue
        seen.candidates[found.component].append(_Candidate(found, file, reader, root, notes))


def _choose(folder: pathlib.Path | None, name: Component, seen: _Seen) -> _Candidate | None:
    """The only candidate. None for an image tower that isn't there, which sampling can do without."""
    option, candidates = OPTIONS[name], seen.candidates[name]
    if len(candidates) > 1:
        names = " and ".join(str(candidate.file) for candidate in candidates)
        raise ValueError(
            f"{folder} has {len(candidates)} files that are a {name}: {names}; choose with fps-convert to-flax {option} FILE "
            f"({name}= of WanPipeline.from_files)"
        )
    if candidates:
        seen.notes += [str(error) for error in seen.refused[name]]
        return candidates[0]
    if seen.refused[name]:
        raise seen.refused[name][0]
    if seen.gguf:  # it may be the one, and no header is read to say which
        raise unsupported.gguf(seen.gguf[0])
    if seen.damaged:
        raise seen.damaged[0]
    if name == "image_encoder":
        return None
    if seen.whole:
        raise ValueError(f"{folder} has no {name} of its own; give the checkpoint in it: {seen.whole[0]}")
    where = "the files given" if folder is None else folder
    raise FileNotFoundError(f"{where}: a {name} is missing; add its .safetensors file, or give it with {option} FILE")


def _open_given(name: Component, file: pathlib.Path, root: str | None) -> _Candidate:
    if not file.is_file():
        raise FileNotFoundError(f"{OPTIONS[name]} {file} is no file; give a .safetensors file")
    (unsupported.check_file if name == "dit" else unsupported.check_gguf)(file)
    whole = _open(file, root)
    reader, notes = spelling.unwrapped(whole)
    read, there = (whole.root, whole.roots) if isinstance(whole, PthFile) else ("", ())
    if len(there) > 1:
        notes = [f"{read!r} is read, of {', '.join(sorted(there))} in {file.name}", *notes]
    told = tell(reader)
    for found in told:
        if found.component == name:
            return _Candidate(found, file, reader, read, tuple(notes))
    what = " and ".join(found.component for found in told) or told_apart(reader.tensors) or "no part of a Wan2.1 model"
    raise ValueError(f"{OPTIONS[name]} {file} is {what}, not a {name} of Wan2.1; give another file")


def _has_image(dit: _Candidate) -> bool:
    pattern = re.compile(key_patterns.DIT[dit.found.naming].has_image)
    return any(pattern.search(key) for key in dit.found.reader.tensors)


def _config_beside(name: Component, file: pathlib.Path) -> dict[str, Any]:
    beside = file.parent / "config.json"
    config = read_json(beside) if beside.is_file() else {}
    return config if any(field in config for field in _OF_ITS_JSON[name]) else {}


def _tokenizer(
    folder: pathlib.Path | None, given: Given, text_encoder: _Candidate, tokenizers: list[pathlib.Path]
) -> pathlib.Path:
    """The tokenizer's folder: the one given, else what is in the text encoder's file, else the only one in the tree."""
    if given.tokenizer is not None:
        path = pathlib.Path(given.tokenizer).expanduser()
        path = path.parent if path.name in ("tokenizer.json", "spiece.model") else path
        if not has_tokenizer(path):
            raise FileNotFoundError(f"--tokenizer {given.tokenizer} has neither tokenizer.json nor spiece.model")
        return path
    inside = tokenizer_bytes(text_encoder.whole)
    if inside is not None:
        return _unpacked(inside)
    if len(tokenizers) > 1:
        names = " and ".join(map(str, tokenizers))
        raise ValueError(
            f"{folder} has {len(tokenizers)} tokenizers: {names}; choose with --tokenizer DIR (tokenizer=)"
        )
    if not tokenizers:
        raise FileNotFoundError(
            f"{text_encoder.file} holds no tokenizer (spiece_model); give the folder of UMT5's with --tokenizer DIR: it is "
            "google/umt5-xxl in official directories, tokenizer in diffusers'"
        )
    return tokenizers[0]


@functools.cache
def _unpacked(content: bytes) -> pathlib.Path:
    """A folder with a spiece.model of these bytes, for the time of the process."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fps_tokenizer_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "spiece.model").write_bytes(content)
    return folder
