"""Opens a Wan2.1 directory in any layout: told by its content, checked in full, nothing read but headers."""

import os
import pathlib
from dataclasses import dataclass, field
from typing import Any

from fps_convert import infer, spelling
from fps_convert.check import check
from fps_convert.formats.pth import PthFile
from fps_convert.formats.readers import Reader, open_safetensors, read_json
from fps_convert.layouts import Layout, layout_of
from fps_convert.report import audit
from fps_convert.source import Part, Source
from fps_jax.checkpoints.format import is_checkpoint
from fps_jax.config import COMPONENTS, Component, WanConfig


@dataclass
class _Files:
    """The files of a directory, by component.

    Attributes:
      readers: of the components that there are.
      where: what messages name: the folder of safetensors, where config.json is too, or a .pth.
      notes: on files that are left out.
    """

    readers: dict[Component, Reader] = field(default_factory=dict)
    where: dict[Component, pathlib.Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _index(path: pathlib.Path, layout: Layout) -> dict[str, Any]:
    """What model_index.json says; nothing where there is none."""
    return read_json(path / layout.index) if layout.index and (path / layout.index).exists() else {}


def _open_files(path: pathlib.Path, layout: Layout) -> _Files:
    index = _index(path, layout)
    second = index.get("transformer_2") or [None]
    if second[0] is not None or (layout.index and (path / "transformer_2").is_dir()):
        raise NotImplementedError(f"{path} has a transformer_2: it is a Wan2.2 checkpoint, supported is Wan2.1")
    files = _Files()
    for name, place in layout.places.items():
        if not place.is_pth:
            files.where[name] = path / place.folder
            reader = open_safetensors(files.where[name], place.stem)
            if reader is not None:
                files.readers[name] = reader
    _check_kind(path, layout, files.readers.get("dit"))
    named = index.get("image_encoder") or [None]
    if "image_encoder" not in files.readers and named[0] is not None and (path / "image_encoder").is_dir():
        raise FileNotFoundError(f"{path / 'image_encoder'} has no model*.safetensors; copy or download it again")
    if any(place.is_pth for place in layout.places.values()):
        _open_pths(path, layout, files)
    return files


def _check_kind(path: pathlib.Path, layout: Layout, dit: Reader | None) -> None:
    """Whether this is a checkpoint at all, and not a part of one."""
    if dit is None and not layout.marks:
        stem = layout.places["dit"].stem
        raise ValueError(f"{path} is not a Wan checkpoint: it has neither model_index.json nor {stem}*.safetensors")
    for prefix, what in layout.not_its_dit.items():
        if dit is not None and any(key.startswith(prefix) for key in dit.tensors):
            raise ValueError(f"{path} is {what}")


def _open_pths(path: pathlib.Path, layout: Layout, files: _Files) -> None:
    """Adds the .pth files, each told by its name or by what it holds."""
    for file in sorted(path.glob("*.pth")):
        reader = PthFile(file)
        kinds: list[Component] = [
            name
            for name, place in layout.places.items()
            if place.is_pth
            and (file.name == place.name or any(key.startswith(place.told_by) for key in reader.tensors))
        ]
        if not kinds:
            files.notes.append(f"{file.name} is no part of a Wan2.1 model and is left out")
        elif kinds[0] in files.readers:
            raise ValueError(f"{file} is a second {kinds[0]}; keep the one that belongs to this model")
        else:
            files.readers[kinds[0]] = reader
            files.where[kinds[0]] = file


def _check_whole(path: pathlib.Path, layout: Layout, readers: dict[Component, Reader]) -> None:
    """Raises FileNotFoundError that lists all that is missing of what every checkpoint has."""
    missing = [layout.places[name].file for name in COMPONENTS[:3] if name not in readers]
    if not any((path / layout.tokenizer / file).is_file() for file in ("tokenizer.json", "spiece.model")):
        missing.append(f"{layout.tokenizer}/tokenizer.json (or spiece.model)")
    if layout.scheduler and not (path / layout.scheduler).is_file():
        missing.append(layout.scheduler)
    if missing:
        raise FileNotFoundError(
            f"{path} is not a whole Wan2.1 checkpoint ({layout.name} layout): missing {', '.join(missing)}"
        )


def _read_jsons(layout: Layout, files: _Files) -> dict[Component, dict[str, Any]]:
    """The config.json of each component; empty where there is none, or where the layout has none."""
    jsons: dict[Component, dict[str, Any]] = {name: {} for name in COMPONENTS}
    for name in COMPONENTS:
        if name in files.readers and layout.places[name].config is not None:
            file = files.where[name] / "config.json"
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; copy or download it again")
            jsons[name] = read_json(file)
    return jsons


def open_checkpoint(path: str | os.PathLike) -> Source:
    """Opens and checks a Wan2.1 directory in any layout of `layouts.LAYOUTS`; no weights are read yet.

    Raises:
      FileNotFoundError: `path` or a part of it is missing.
      ValueError: not a Wan checkpoint, a damaged file, or a tensor that is missing, extra or of the wrong shape.
      NotImplementedError: another Wan model (2.2, VACE) or a dtype that is no plain float.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist; give a Wan2.1 directory, official or diffusers")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give the directory that holds the whole checkpoint")
    if is_checkpoint(path):
        raise ValueError(f"{path} is already in this project's format; give an official or a diffusers directory")

    # Which files there are.
    layout = layout_of(path)
    files = _open_files(path, layout)
    readers, where, notes = files.readers, files.where, files.notes
    _check_whole(path, layout, readers)
    jsons = _read_jsons(layout, files)

    # One spelling of keys that have two.
    spelt: dict[str, Any] = {}
    spelling_notes: dict[Component, list[str]] = {}
    if layout.places["text_encoder"].naming == "diffusers":
        reader, spelling_notes["text_encoder"] = spelling.text_embedding(readers["text_encoder"], spelt)
        readers["text_encoder"] = reader
    if layout.places["image_encoder"].naming == "diffusers" and "image_encoder" in readers:
        readers["image_encoder"] = spelling.vision_prefix(readers["image_encoder"], spelt)

    # The config, the DiT's first: it says the task, and with it whether there is an image tower.
    dit = infer.dit(layout, readers["dit"], jsons["dit"], where["dit"])
    if dit.task == "t2v" and readers.pop("image_encoder", None) is not None:
        notes.append("the image tower is left out: a T2V model doesn't use it")
    image_encoder = None
    if "image_encoder" in readers:
        # Where the tower has no config.json, a conversion of ours noted its heads with the DiT.
        noted = readers["dit"].metadata.get("image_encoder_num_heads", "")
        heads = int(noted) if layout.places["image_encoder"].config is None and noted.isdecimal() else None
        image_encoder = infer.image_encoder(
            layout, readers["image_encoder"], jsons["image_encoder"], where["image_encoder"], heads
        )
    scheduler = path / (layout.scheduler or "")
    flow_shift, flow_shift_480p = infer.flow_shift(
        layout, dit.task, read_json(scheduler) if layout.scheduler else {}, scheduler
    )
    vae = infer.vae(layout, readers["vae"], jsons["vae"], where["vae"])
    text_encoder = infer.text_encoder(layout, readers["text_encoder"], jsons["text_encoder"], where["text_encoder"])
    try:
        config = WanConfig(
            dit=dit,
            vae=vae,
            text_encoder=text_encoder,
            image_encoder=image_encoder,
            flow_shift=flow_shift,
            flow_shift_480p=flow_shift_480p,
            preset=infer.preset(_index(path, layout)),
        )
    except ValueError as error:  # a DiT and a VAE of two models
        raise ValueError(f"{path}: {error}") from None

    # Every tensor against the config, and the components against each other.
    parts: dict[Component, Part] = {
        name: check(name, layout.places[name].naming, readers[name], config, where[name])
        for name in COMPONENTS
        if name in readers
    }
    for name, lines in spelling_notes.items():
        parts[name].notes.extend(lines)
    for name, theirs in (("text_encoder", dit.text_dim), ("image_encoder", dit.image_dim)):
        own = getattr(config, name)
        if own is not None and own.dim != theirs:
            raise ValueError(
                f"{path}: the {name} is {own.dim} wide, the DiT reads {theirs}; they are of different models"
            )
    if dit.task != "t2v" and image_encoder is None:
        notes.append("there is no image tower: sampling needs image_embeds")
    report = audit(path, layout.name, config, parts, notes)
    return Source(path, layout.name, config, parts, path / layout.tokenizer, spelt, report)
