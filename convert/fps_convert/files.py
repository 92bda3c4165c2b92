"""Which file of a directory in a layout holds which component."""

import pathlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fps_convert import unsupported
from fps_convert.formats.pth import PthFile
from fps_convert.formats.readers import Reader, open_safetensors
from fps_convert.layouts import Layout
from fps_convert.parts import tell
from fps_jax.config import COMPONENTS, Component
from fps_jax.files import read_json


@dataclass
class Files:
    """The files of a checkpoint, by component.

    Attributes:
      layout: with the naming of each component as it was found.
      readers: of the components that there are.
      where: what messages name: the folder of safetensors, where config.json is too, or a file.
      jsons: config.json of each component, or what stands for it; empty where the layout has none.
      tokenizer: the folder of tokenizer.json or spiece.model; None where there is none.
      spelling: how the files spell what is read in one way, for the way back.
      notes: on the whole, such as files that are left out.
      notes_on: the same on one component.
    """

    layout: Layout
    readers: dict[Component, Reader] = field(default_factory=dict)
    where: dict[Component, pathlib.Path] = field(default_factory=dict)
    jsons: dict[Component, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in COMPONENTS})
    tokenizer: pathlib.Path | None = None
    spelling: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    notes_on: dict[Component, list[str]] = field(default_factory=lambda: {name: [] for name in COMPONENTS})


TOKENIZER_FILES = ("tokenizer.json", "spiece.model")  # either is enough


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether a folder holds what `models.tokenizer` reads."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def open_directory(path: pathlib.Path, layout: Layout) -> Files:
    """The files of a directory whose layout says their names.

    Raises: FileNotFoundError, listing all that is missing; ValueError for no checkpoint, or two files of one component.
    """
    index = read_json(path / layout.index) if layout.index and (path / layout.index).exists() else {}
    files = Files(layout)
    for name, place in layout.places.items():
        if not place.is_pth:
            files.where[name] = path / place.folder
            reader = open_safetensors(files.where[name], place.stem)
            if reader is not None:
                files.readers[name] = reader
    _check_kind(path, layout, files.readers.get("dit"))
    named = unsupported.names_class(index, "image_encoder")
    if "image_encoder" not in files.readers and named and (path / "image_encoder").is_dir():
        raise FileNotFoundError(f"{path / 'image_encoder'} has no model*.safetensors; copy or download it again")
    if any(place.is_pth for place in layout.places.values()):
        _open_pths(path, layout, files)
    if has_tokenizer(path / layout.tokenizer):
        files.tokenizer = path / layout.tokenizer
    _check_whole(path, files)
    _strip_prefix(files)
    _read_jsons(files)
    return files


def _check_kind(path: pathlib.Path, layout: Layout, dit: Reader | None) -> None:
    """Whether this is a checkpoint at all, and not a part of one."""
    if dit is None and not layout.marks:
        stem = layout.places["dit"].stem
        raise ValueError(
            f"{path} is not a Wan checkpoint: it has neither model_index.json nor {stem}*.safetensors, nor a DiT of another name"
        )
    for prefix, what in layout.not_its_dit.items():
        if dit is not None and any(key.startswith(prefix) for key in dit.tensors):
            raise ValueError(f"{path} is {what}")


def _open_pths(path: pathlib.Path, layout: Layout, files: Files) -> None:
    """Adds the .pth files, each told by its name or by what it holds. Those of other names may be anything."""
    named: dict[str, Component] = {place.name: name for name, place in layout.places.items() if place.is_pth}
    for file in sorted(
        (file for file in path.glob("*.pth") if file.is_file()), key=lambda file: (file.name not in named, file.name)
    ):
        try:
            reader = PthFile(file)
        except ValueError as error:
            if file.name in named:
                raise
            files.notes.append(f"{file.name} is left out: {error}")
            continue
        kinds: list[Component] = [
            found.component
            for found in tell(reader)
            if (place := layout.places[found.component]).is_pth and found.naming == place.naming
        ]
        name = named.get(file.name) or next(iter(kinds), None)
        if name is None:
            files.notes.append(f"{file.name} is no part of a Wan2.1 model and is left out")
        elif name in files.readers and files.where[name].name not in named:
            raise ValueError(
                f"{path} has two for the {name}: {files.where[name].name} and {file.name}; keep one of them"
            )
        elif name in files.readers:
            files.notes.append(f"{file.name} is a second {name} and is left out: {files.where[name].name} is taken")
        else:
            files.readers[name] = reader
            files.where[name] = file


def _check_whole(path: pathlib.Path, files: Files) -> None:
    """Raises FileNotFoundError that lists all that is missing of what every checkpoint has."""
    layout = files.layout
    has_scheduler = layout.scheduler is not None and (path / layout.scheduler).is_file()
    check_parts(path, layout, files.readers, files.tokenizer is not None, has_scheduler)


def check_parts(
    where: pathlib.Path | str, layout: Layout, has: Collection[str], has_tokenizer: bool, has_scheduler: bool
) -> None:
    """Raises FileNotFoundError that lists what every checkpoint of a layout has, and this one doesn't."""
    missing = [layout.places[name].file for name in COMPONENTS[:3] if name not in has]
    if not has_tokenizer:
        missing.append(f"{layout.tokenizer}/tokenizer.json (or spiece.model)")
    if layout.scheduler and not has_scheduler:
        missing.append(layout.scheduler)
    if missing:
        raise FileNotFoundError(
            f"{where} is not a whole Wan2.1 checkpoint ({layout.name} layout): missing {', '.join(missing)}"
        )


def _strip_prefix(files: Files) -> None:
    """A DiT whose keys have ComfyUI's prefix, under the layout's own keys."""
    naming = files.layout.places["dit"].naming
    for found in tell(files.readers["dit"]):
        if found.component == "dit" and found.naming == naming and found.prefix:
            files.readers["dit"] = found.reader
            files.notes_on["dit"].append(f"keys have the prefix {found.prefix!r}, which is left out")


def _read_jsons(files: Files) -> None:
    """Reads the config.json of each component whose place has one."""
    for name in COMPONENTS:
        if name in files.readers and files.layout.places[name].config is not None:
            file = files.where[name] / "config.json"
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; copy or download it again")
            files.jsons[name] = read_json(file)


def check_supported(path: pathlib.Path) -> None:
    """Raises NotImplementedError for a directory that is another model of Wan's family, before its weights are looked at."""
    unsupported.check_jsons(path, [entry.name for entry in path.iterdir()])
