"""Our format to a directory in a torch layout."""

import collections
import dataclasses
import os
import pathlib
import shutil
import sys
import time
from typing import Any, cast

import numpy as np

from fps_convert import comfyui, mapping
from fps_convert.comfyui import COMFY_DTYPES
from fps_convert.formats.array_files import ArrayFiles
from fps_convert.formats.arrays import contiguous
from fps_convert.formats.readers import FLOATS
from fps_convert.formats.writers import SHARD_BYTES, Output, write_pth, write_safetensors
from fps_convert.layouts import LAYOUTS, Layout
from fps_convert.mapping import SourceTensor
from fps_convert.report import NAMES, check_vae_fits, lost_causal, lost_flow_shift, lost_preset
from fps_convert.spelling import spelled
from fps_jax.checkpoints.format import SAMPLING, SCHEDULE, check_tokenizer, copy_tokenizer, read_config, read_manifest
from fps_jax.choices import ComfyDtype, LayoutName
from fps_jax.config import COMPONENTS, Component, SamplingDefaults, WanConfig
from fps_jax.files import check_name, check_space, new_directory, new_file, write_json
from fps_jax.progress import Moved, bytes_bar

_NAME_LENGTH = 200  # of a state dict in a file, and of what its keys begin with


def to_torch(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    layout: LayoutName,
    overwrite: bool = False,
    *,
    dtype: ComfyDtype | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint of this project to a directory in a layout of `layouts.LAYOUTS`, with that layout's own file names; or,
    of a layout that is one file (self-forcing), to the file `dst`, which has the DiT alone.

    Without `dtype`, every tensor is bit-identical to what `to_flax` read at the same dtype. Parts that Wan never uses (CLIP's text
    tower) were left out on the way in and stay out.

    Args:
      dtype: of the comfyui layout alone: 'bfloat16', or 'fp8_scaled' (see `comfyui.cast`); None as stored. Never the VAE.
    Returns: a report, also written beside `dst` as `<dst>.audit.json`: `dst` holds that layout's files,
      `fps_schedule.json` where the checkpoint was trained with one, `fps_sampling.json` where it has sizes of its own.
    Raises: FileNotFoundError, ValueError or OSError in one line; `dst` is then as it was.
    """
    began = time.monotonic()
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}")
    wanted = LAYOUTS[layout]
    if dtype is not None and (dtype not in COMFY_DTYPES or not wanted.casts):
        casting = ", ".join(name for name, layout in LAYOUTS.items() if layout.casts)
        raise ValueError(
            f"dtype={dtype!r} with layout={layout!r}: give {' or '.join(COMFY_DTYPES)} with {casting}, or none"
        )
    if wanted.alone:
        report = _to_file(pathlib.Path(src), pathlib.Path(dst), wanted, overwrite)
        return _written(report, dst, began)
    with new_directory(dst, overwrite=overwrite, sources=(src,)) as fresh:
        root = pathlib.Path(src)
        manifest, config = read_manifest(root), read_config(root)
        check_vae_fits(config, wanted)
        components = _saved_components(root, manifest)
        mixed, spelling = _notes(root, manifest, config)
        tokenizer = root / "tokenizer"
        if not tokenizer.is_dir():
            raise FileNotFoundError(f"{tokenizer} is missing; convert the checkpoint again")
        total = sum(file.stat().st_size for name in components for file in (root / name).rglob("*") if file.is_file())
        check_space(fresh.parent, total)
        check_tokenizer(tokenizer)
        report: dict[str, Any] = {"layout": layout, "task": config.task, "notes": [], "components": {}}
        with bytes_bar("converting", total) as progress:
            for name in components:
                report["components"][name] = _write_component(
                    root, fresh, name, config, wanted, mixed, spelling, progress, report["notes"], dtype
                )
        write_rest(fresh, config, wanted, tokenizer)
        if (root / SCHEDULE).is_file():  # what the weights were trained with goes with them
            shutil.copyfile(root / SCHEDULE, fresh / SCHEDULE)
        report["notes"] += lost_flow_shift(config, wanted) + lost_preset(config, wanted) + lost_causal(config, wanted)
    return _written(report, dst, began)


def _written(report: dict[str, Any], dst: str | os.PathLike, began: float) -> dict[str, Any]:
    """The report, closed and written beside `dst`."""
    report |= {"written_bytes": sum(part["bytes"] for part in report["components"].values()), "destination": str(dst)}
    report["seconds"] = round(time.monotonic() - began, 3)
    final = pathlib.Path(dst).resolve()
    beside = final.parent / f"{final.name}.audit.json"
    report["report"] = str(beside)
    write_json(report, beside)
    return report


def _to_file(root: pathlib.Path, dst: pathlib.Path, layout: Layout, overwrite: bool) -> dict[str, Any]:
    """Writes the DiT alone, under the root and the prefix that it was read from, else the layout's."""
    place = layout.places["dit"]
    _check_file(root, dst, layout, overwrite)
    manifest, config = read_manifest(root), read_config(root)
    if config.task != "t2v":
        raise ValueError(f"{root} is a {config.task} model; layout={layout.name!r} is of t2v models")
    names = _saved_components(root, manifest)
    mixed, spelling = _notes(root, manifest, config)
    arrays = _arrays(root / "dit", "dit", config)
    outputs, notes = _outputs("dit", config, layout, arrays, mixed.get("dit", {}))
    prefix = spelling.get("root_prefix", place.prefix)
    outputs = [dataclasses.replace(output, key=prefix + output.key) for output in outputs]
    total = sum(output.nbytes for output in outputs)
    check_space(dst.absolute().parent, total)
    with bytes_bar("converting", total) as progress, new_file(dst) as fresh:
        write_pth(fresh, outputs, progress, root=spelling.get("root", place.root), name=dst.stem)
    others = [name for name in names if name != "dit"]
    notes.append(f"{layout.name} files hold the DiT alone: {', '.join(others)} and the tokenizer are left out")
    dtypes = {output.key: output.dtype for output in outputs}
    part = {"tensors": len(outputs), "parameters": len(arrays.shapes), "bytes": total, "dtypes": dtypes}
    notes += lost_causal(config, layout)
    if (root / SCHEDULE).is_file():
        notes.append(f"the schedule that it was trained with has no place in it: keep {root / SCHEDULE}")
    if config.sampling != SamplingDefaults():
        notes.append("its own size, steps and guidance have no place in it")
    return {"layout": layout.name, "task": config.task, "notes": notes, "components": {"dit": part}}


def _check_file(root: pathlib.Path, dst: pathlib.Path, layout: Layout, overwrite: bool) -> None:
    """Raises ValueError or OSError for a destination that no such file can be."""
    if not dst.name.endswith((".pt", ".pth")):
        raise ValueError(f"destination {dst} is one file in layout={layout.name!r}; give a name that ends in .pt")
    check_name(dst, "destination")
    if dst.is_dir():
        raise IsADirectoryError(
            f"destination {dst} is a directory, and layout={layout.name!r} is one file; give a name"
        )
    if not dst.absolute().parent.is_dir():
        raise FileNotFoundError(f"destination {dst}: its folder doesn't exist; make it first")
    if root.resolve() in dst.resolve().parents:
        raise ValueError(f"destination {dst} and source {root} overlap; give a destination outside the source")
    if dst.exists() and not overwrite:
        raise FileExistsError(f"destination {dst} exists; give another or --overwrite (overwrite=True)")


def _saved_components(root: pathlib.Path, manifest: dict[str, Any]) -> list[Component]:
    named = manifest.get("components")
    if not isinstance(named, list) or not all(name in COMPONENTS and named.count(name) == 1 for name in named):
        raise ValueError(f"{root}/config.json lists components={named!r}; convert the checkpoint again")
    missing = [name for name in COMPONENTS[:3] if name not in named]
    if missing:
        raise ValueError(f"{root} has no {missing[0]}, which every Wan checkpoint needs; convert the checkpoint again")
    return cast(list[Component], named)


def _notes(
    root: pathlib.Path, manifest: dict[str, Any], config: WanConfig
) -> tuple[dict[str, dict[str, list[str]]], dict[str, Any]]:
    """What `to_flax` noted for the way back: (dtypes of layers that differ, by component and parameter; spelling of keys).

    Raises: ValueError where these aren't what it writes.
    """
    mixed, spelling = manifest.get("mixed_dtypes", {}), manifest.get("spelling", {})
    try:
        for name, paths in mixed.items():
            layers = collections.Counter(row.path for row in mapping.rows(name, config))
            for path, dtypes in paths.items():
                if not isinstance(dtypes, list) or len(dtypes) < layers[path] or not all(d in FLOATS for d in dtypes):
                    raise ValueError(f"mixed_dtypes of {path}")
        known = {"text_embedding": ["shared.weight", "encoder.embed_tokens.weight"], "vision_prefix": [""]}
        for name, value in spelling.items():
            if name in ("root", "root_prefix"):
                if not isinstance(value, str) or len(value) > _NAME_LENGTH:
                    raise ValueError(f"spelling of {name}")
                value.encode()
                continue
            listed = value if name == "text_embedding" else [value]
            if not listed or len(set(listed)) < len(listed) or not set(listed) <= set(known[name]):
                raise ValueError(f"spelling of {name}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{root}/config.json: mixed_dtypes or spelling aren't what fps-convert writes ({error!r}); convert it again"
        ) from None
    return mixed, spelling


def _arrays(directory: pathlib.Path, name: Component, config: WanConfig) -> ArrayFiles:
    """The component's arrays, checked against the config."""
    arrays = ArrayFiles(directory)
    wanted = mapping.leaves(mapping.rows(name, config))
    for what, paths in (("lacks", wanted.keys() - arrays.shapes.keys()), ("has", arrays.shapes.keys() - wanted.keys())):
        if paths:
            raise ValueError(
                f"{directory} {what} parameter {min(paths)!r}, unlike its config; convert the checkpoint again"
            )
    for path, shape in wanted.items():
        if arrays.shapes[path] != shape:
            raise ValueError(
                f"{directory}: parameter {path!r} has shape {list(arrays.shapes[path])}, its config says {list(shape)}; "
                "convert the checkpoint again"
            )
        if arrays.dtypes[path] not in NAMES:
            raise NotImplementedError(
                f"{directory}: parameter {path!r} is {arrays.dtypes[path]}, which Wan files don't hold"
            )
    return arrays


def _outputs(
    component: Component, config: WanConfig, layout: Layout, arrays: ArrayFiles, mixed: dict[str, list[str]]
) -> tuple[list[Output], list[str]]:
    """The tensors of one component in a layout, and notes on what has no exact counterpart there."""
    table, naming = mapping.rows(component, config), layout.places[component].naming
    notes = [
        f"{row.path} has no tensor in the {layout.name} layout and is left out"
        for row in table
        if naming not in row.keys
    ]

    def output(tensor: SourceTensor) -> Output:
        names = {
            mixed[row.path][row.layer or 0] if row.path in mixed else NAMES[arrays.dtypes[row.path]]
            for row in tensor.rows
        }
        name = names.pop() if len(names) == 1 else "F32"
        if names:
            notes.append(f"{tensor.key} joins parameters of several dtypes and is written as F32")

        def make() -> np.ndarray | list[np.ndarray]:
            row = tensor.rows[0]
            as_it_is = row.form == "same" and row.layer is None and row.shape == tensor.shape
            if as_it_is and FLOATS[name] == arrays.dtypes[row.path]:
                return arrays.chunks(row.path)  # the text embedding has 2 GB: not joined in memory
            pieces = [mapping.from_ours(arrays.read(row.path, row.layer), row, naming) for row in tensor.rows]
            return contiguous(pieces, FLOATS[name])

        return Output(tensor.key, tensor.shape, name, make)

    return [output(tensor) for tensor in mapping.tensors(table, naming)], notes


def _write_component(
    root: pathlib.Path,
    fresh: pathlib.Path,
    name: Component,
    config: WanConfig,
    layout: Layout,
    mixed: dict[str, dict[str, list[str]]],
    spelling: dict[str, Any],
    progress: Moved,
    notes: list[str],
    dtype: ComfyDtype | None,
) -> dict[str, Any]:
    arrays = _arrays(root / name, name, config)
    outputs, left_out = _outputs(name, config, layout, arrays, mixed.get(name, {}))
    notes.extend(left_out)
    if layout.places[name].naming == "diffusers" and not layout.one_spelling:
        outputs = spelled(name, outputs, spelling)
    outputs = comfyui.cast(name, outputs, dtype)
    if name == layout.tokenizer_within:
        tokenizer = comfyui.tokenizer_output(root / "tokenizer")
        if not tokenizer:
            notes.append("the tokenizer has no spiece.model, which ComfyUI reads from the text encoder's file")
        outputs += tokenizer
    write_weights(fresh, name, config, layout, outputs, progress)
    return {
        "tensors": len(outputs),
        "parameters": len(arrays.shapes),
        "bytes": sum(output.nbytes for output in outputs),
        "dtypes": {output.key: output.dtype for output in outputs},
    }


def write_weights(
    fresh: pathlib.Path,
    name: Component,
    config: WanConfig,
    layout: Layout,
    outputs: list[Output],
    progress: Moved,
    *,
    shard_bytes: int | None = None,
) -> None:
    """Writes one component's tensors, and its config.json where `layout` has one."""
    place = layout.places[name]
    folder = fresh / place.folder
    folder.mkdir(exist_ok=True)
    if place.is_pth:
        write_pth(folder / place.name, outputs, progress)
    else:
        metadata = _noted_with_the_dit(config, layout) if name == "dit" else {}
        most = (shard_bytes or SHARD_BYTES) if layout.shards else sys.maxsize
        write_safetensors(folder, place.stem, outputs, metadata, progress, most)
    if place.config is not None:
        dtypes = [output.dtype for output in outputs]
        common = FLOATS[max(set(dtypes), key=dtypes.count)].name
        write_json(place.config(getattr(config, name), common), folder / "config.json")


def _noted_with_the_dit(config: WanConfig, layout: Layout) -> dict[str, str]:
    """What no file of this layout holds: see `open_checkpoint`."""
    noted: dict[str, str] = {}
    if layout.places["dit"].config is None:
        noted["num_heads"] = str(config.dit.num_heads)
    if config.image_encoder is not None and layout.places["image_encoder"].config is None:
        noted["image_encoder_num_heads"] = str(config.image_encoder.num_heads)
    return noted


def write_rest(fresh: pathlib.Path, config: WanConfig, layout: Layout, tokenizer: pathlib.Path) -> None:
    """The tokenizer, and the JSON files beside the components."""
    copy_tokenizer(tokenizer, fresh / layout.tokenizer)
    for name, content in layout.beside(config, tokenizer).items():
        (fresh / name).parent.mkdir(exist_ok=True)
        write_json(content, fresh / name)
    if own := config.sampling.to_dict():
        write_json(own, fresh / SAMPLING)
