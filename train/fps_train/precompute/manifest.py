"""What a folder of training data says of itself: manifest.json, and a list of samples from each worker.

DATA/manifest.json     what the data are, the validation prompts, the names of the lists; written last, when all workers are done
DATA/samples/*.jsonl   a line a sample: which clip's latents, which caption's text states
DATA/latents/ text/    shards (see shards.py)
DATA/scan/             what decoding found, so that a run that is repeated needn't decode again
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fps_jax.config import Task
from fps_jax.files import write_bytes, write_json
from fps_train.precompute.clips import Dropped

FORMAT = "fps_jax_data"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the samples are, without which clips: equal for all workers.

    Attributes:
      task, z_dim, text_len, text_dim: of the model.
      image_shape: (I, G) of image-tower tokens; None for t2v.
      fps: frames a second.
      sizes: the buckets' names; `exact` False: one, and shorter ones of its height and width.
      min_frames: of a video.
      dtype: that the text encoder computed in.
      tiling: the VAE encoded in tiles.
      vae, text_encoder, image_encoder: fingerprints.
    """

    task: Task
    z_dim: int
    text_len: int
    text_dim: int
    image_shape: tuple[int, int] | None
    fps: int
    sizes: tuple[str, ...]
    exact: bool
    min_frames: int
    dtype: str
    tiling: bool
    vae: str
    text_encoder: str
    image_encoder: str | None

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Contents":
        """Inverse of `dataclasses.asdict` through JSON. Raises TypeError for unknown or missing fields."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**given)


class Sample(NamedTuple):
    """A clip in a bucket and its caption. `clip` and `text` are keys, `content` the hash of the clip's file."""

    clip: str
    text: str
    content: str
    size: str
    source: str
    caption: str


class Prompt(NamedTuple):
    """A validation prompt. `clip`: key of what i2v and flf2v are given, at `size`; None for t2v."""

    prompt: str
    text: str
    clip: str | None
    size: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All but the tensors of a folder of data.

    Attributes:
      empty_text: key of the empty prompt.
      root: the folder that samples' sources are relative to.
      made: what it was made from and with, for people.
    """

    contents: Contents
    empty_text: str
    prompts: tuple[Prompt, ...]
    root: str
    made: dict[str, Any]
    samples: tuple[Sample, ...]
    dropped: tuple[Dropped, ...]


def write_part(
    folder: pathlib.Path,
    contents: Contents,
    worker: tuple[int, int],
    samples: Sequence[Sample],
    dropped: Sequence[Dropped],
) -> None:
    """Write a worker's list."""
    (folder / "samples").mkdir(exist_ok=True)
    head = {"dropped": [dataclasses.astuple(one) for one in dropped]}
    lines = [json.dumps(line, ensure_ascii=False) for line in (head, *samples)]
    write_bytes(folder / "samples" / _part(contents, worker), "\n".join(lines).encode(errors="surrogatepass") + b"\n")


def write_manifest(folder: pathlib.Path, manifest: Manifest, workers: int) -> list[int]:
    """Write manifest.json if every worker's list is there. Returns the workers whose list isn't.

    manifest: its samples and dropped are not looked at: they are in the lists.
    """
    parts = [_part(manifest.contents, (i, workers)) for i in range(workers)]
    missing = [i for i, part in enumerate(parts) if not (folder / "samples" / part).is_file()]
    if not missing:
        record = {
            "format": FORMAT,
            "version": VERSION,
            "contents": dataclasses.asdict(manifest.contents),
            "empty_text": manifest.empty_text,
            "prompts": [prompt._asdict() for prompt in manifest.prompts],
            "root": manifest.root,
            "made": manifest.made,
            "samples": parts,
        }
        write_json(record, folder / MANIFEST)
    return missing


def _part(contents: Contents, worker: tuple[int, int]) -> str:
    return f"{contents.hash}-{worker[0]:05d}-of-{worker[1]:05d}.jsonl"


def _once(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    return tuple({(s.clip, s.text): s for s in sorted(samples, reverse=True)}.values())[::-1]


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Read manifest and samples, samples in an order of their own: that of their keys, whoever wrote them. One whose clip and text
    two workers met, each in a file of its own, is there once.

    Raises: FileNotFoundError where there are no data, or a run that made them isn't finished; ValueError for damaged ones.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data {str(folder)!r} doesn't exist; make it with fps-precompute")
    if not (folder / MANIFEST).is_file():
        unfinished = (folder / "scan").is_dir()
        why = (
            "is not finished: run fps-precompute again"
            if unfinished
            else "holds no training data: make it with fps-precompute"
        )
        raise FileNotFoundError(f"data {str(folder)!r} {why} (there is no {MANIFEST})")
    try:
        record = json.loads((folder / MANIFEST).read_bytes())
        if record.get("format") != FORMAT:
            raise ValueError(f"it isn't {FORMAT!r}")
        if record["version"] != VERSION:
            raise ValueError(f"it has version {record['version']!r}, this release reads {VERSION}")
        samples: list[Sample] = []
        dropped: list[Dropped] = []
        for part in record["samples"]:
            head, *rows = (json.loads(line) for line in (folder / "samples" / part).read_bytes().splitlines())
            samples += [Sample(*row) for row in rows]
            dropped += [Dropped(source=s, reason=r, detail=d) for s, r, d in head["dropped"]]
        return Manifest(
            contents=Contents.from_dict(record["contents"]),
            empty_text=record["empty_text"],
            prompts=tuple(Prompt(**prompt) for prompt in record["prompts"]),
            root=record["root"],
            made=record["made"],
            samples=_once(samples),
            dropped=tuple(dropped),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"data {str(folder)!r} is damaged: {MANIFEST}: {what}; run fps-precompute again") from None
