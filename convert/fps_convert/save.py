"""Whole conversions: a torch directory to ours, and ours back to either torch layout."""

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from fps_convert import layouts, mapping
from fps_convert.formats.array_files import ArrayFiles
from fps_convert.formats.arrays import contiguous
from fps_convert.formats.readers import FLOATS
from fps_convert.formats.writers import SHARD_BYTES, Output, write_pth, write_safetensors
from fps_convert.infer import OFFICIAL_FLOW_SHIFT
from fps_convert.mapping import Layout, SourceTensor
from fps_convert.wan import DIT_STEM, OFFICIAL_PTH, OFFICIAL_TOKENIZER, SUBFOLDERS, Source, open_checkpoint
from fps_jax.checkpoints.format import read_config, read_manifest, write_config
from fps_jax.config import COMPONENTS, Component, WanConfig
from fps_jax.files import new_directory, write_json

DTYPES = ("bfloat16", "float16", "float32")
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@contextlib.contextmanager
def _progress(title: str, nbytes: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr for what takes longer than two seconds; only on a terminal, so that logs hold whole lines."""
    import tqdm

    with tqdm.tqdm(total=nbytes, desc=title, unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
        yield bar.update


def _check_space(parent: pathlib.Path, nbytes: int) -> None:
    """Fails before hours of work, not after. Files of other sizes (JSON, tokenizer) are far below the margin."""
    free = shutil.disk_usage(parent).free
    if free < nbytes + (16 << 20):
        raise OSError(
            28, f"not enough disk space: needs {nbytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free", str(parent)
        )


def to_flax(
    src: str | os.PathLike, dst: str | os.PathLike, dtype: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Converts an official or diffusers Wan2.1 directory to this project's format.

    Args:
      src: the directory; see `open_checkpoint` for what is read and which errors there are.
      dst: where to write; must not overlap `src`.
      dtype: 'bfloat16', 'float16' or 'float32' casts DiT, text encoder and image tower (round to nearest even), never the
        VAE; None keeps each tensor's own.
      overwrite: replace a non-empty `dst`.
    Returns: the audit, also written as `dst/audit.json`.
    """
    began = time.monotonic()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    kind = None if dtype is None else {_TORCH_NAMES[name]: numpy for name, numpy in FLOATS.items()}[dtype]
    with new_directory(dst, overwrite=overwrite, sources=(src,)) as fresh:
        source = open_checkpoint(src)
        nbytes = {name: _stored_bytes(source, name, kind) for name in source.components}
        _check_space(fresh.parent, sum(nbytes.values()))
        audit = source.audit
        mixed = {}
        with _progress("converting", sum(part.nbytes for part in source.parts.values())) as progress:
            for name in source.components:
                source.save(name, fresh / name, kind, progress)
                audit["components"][name]["dtype_changes"] = _dtype_changes(source, name, kind)
                if kind is None or name == "vae":
                    mixed[name] = {p: d for p, d in source.parts[name].row_dtypes().items() if len(set(d)) > 1}
        _copy_files(source.tokenizer_dir, fresh / "tokenizer")
        audit |= {"dtype": dtype, "destination": str(dst), "written_bytes": sum(nbytes.values())}
        audit["seconds"] = round(time.monotonic() - began, 3)
        write_config(
            fresh,
            source.config,
            components=list(source.components),
            source_layout=source.layout,
            spelling=source.spelling,
            mixed_dtypes={name: paths for name, paths in mixed.items() if paths},
        )
        write_json(audit, fresh / "audit.json")
    return audit


def _stored_bytes(source: Source, component: Component, dtype: np.dtype | None) -> int:
    dtypes = source.stored_dtypes(component, dtype)
    shapes = mapping.leaves(source.parts[component].table)
    return sum(int(np.prod(shape, dtype=np.int64)) * dtypes[path].itemsize for path, shape in shapes.items())


def _dtype_changes(source: Source, component: Component, dtype: np.dtype | None) -> list[dict[str, Any]]:
    stored = source.stored_dtypes(component, dtype)
    return [
        {"parameter": path, "from": sorted(set(names)), "to": _NAMES[stored[path]]}
        for path, names in source.parts[component].row_dtypes().items()
        if set(names) != {_NAMES[stored[path]]}
    ]


def _copy_files(source: pathlib.Path, target: pathlib.Path) -> int:
    """Copies a folder's files as they are (a Hugging Face cache holds links: their content)."""
    shutil.copytree(source, target)
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def _outputs(
    component: Component, config: WanConfig, layout: Layout, arrays: ArrayFiles, mixed: dict[str, list[str]]
) -> tuple[list[Output], list[str]]:
    """The tensors of one component in a layout, and notes on what has no exact counterpart there."""
    table = mapping.rows(component, config)
    notes = [
        f"{row.path} has no tensor in the {layout} layout and is left out" for row in table if layout not in row.keys
    ]

    def output(tensor: SourceTensor) -> Output:
        names = {
            mixed[row.path][row.layer or 0] if row.path in mixed else _NAMES[arrays.dtypes[row.path]]
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
            pieces = [mapping.from_ours(arrays.read(row.path, row.layer), row, layout) for row in tensor.rows]
            return contiguous(pieces, FLOATS[name])

        return Output(tensor.key, tensor.shape, name, make)

    return [output(tensor) for tensor in mapping.tensors(table, layout)], notes


def _spelled(component: Component, outputs: list[Output], spelling: dict[str, Any]) -> list[Output]:
    """Diffusers keys as the source wrote them, where it has a choice."""

    def renamed(output: Output, key: str) -> Output:
        return Output(key, output.shape, output.dtype, output.make)

    if component == "text_encoder" and "text_embedding" in spelling:
        tied = [output for output in outputs if output.key == "shared.weight"]
        rest = [output for output in outputs if output.key != "shared.weight"]
        return [renamed(output, key) for key in spelling["text_embedding"] for output in tied] + rest
    if component == "image_encoder" and "vision_prefix" in spelling:
        prefix = spelling["vision_prefix"]
        return [renamed(output, prefix + output.key.removeprefix("vision_model.")) for output in outputs]
    return outputs


def to_torch(src: str | os.PathLike, dst: str | os.PathLike, layout: Layout, overwrite: bool = False) -> dict[str, Any]:
    """Converts a checkpoint of this project to an official or a diffusers directory, with that layout's own file names.

    Every tensor is bit-identical to what `to_flax` read at the same dtype. Parts that Wan never uses (CLIP's text tower) were
    left out on the way in and stay out.

    Returns: a report, also written beside `dst` as `<dst>.audit.json`: `dst` holds that layout's files and no other.
    Raises: FileNotFoundError, ValueError or OSError in one line; `dst` is then as it was.
    """
    began = time.monotonic()
    if layout not in mapping.LAYOUTS:
        raise ValueError(f"layout={layout!r} is none of {', '.join(mapping.LAYOUTS)}")
    with new_directory(dst, overwrite=overwrite, sources=(src,)) as fresh:
        root = pathlib.Path(src)
        manifest, config = read_manifest(root), read_config(root)
        components = _saved_components(root, manifest)
        tokenizer = root / "tokenizer"
        if not tokenizer.is_dir():
            raise FileNotFoundError(f"{tokenizer} is missing; convert the checkpoint again")
        total = sum(file.stat().st_size for name in components for file in (root / name).rglob("*") if file.is_file())
        _check_space(fresh.parent, total)
        report: dict[str, Any] = {"layout": layout, "task": config.task, "notes": [], "components": {}}
        with _progress("converting", total) as progress:
            for name in components:
                report["components"][name] = _write_component(
                    root, fresh, name, config, layout, manifest, progress, report["notes"]
                )
        write_rest(fresh, config, layout, tokenizer)
        report["notes"] += _lost_flow_shift(config, layout)
    report |= {"written_bytes": sum(part["bytes"] for part in report["components"].values()), "destination": str(dst)}
    report["seconds"] = round(time.monotonic() - began, 3)
    final = pathlib.Path(dst).resolve()
    beside = final.parent / f"{final.name}.audit.json"
    report["report"] = str(beside)
    write_json(report, beside)
    return report


def _saved_components(root: pathlib.Path, manifest: dict[str, Any]) -> list[Component]:
    named = manifest.get("components")
    if not isinstance(named, list) or not set(named) <= set(COMPONENTS):
        raise ValueError(f"{root}/config.json lists components={named!r}; convert the checkpoint again")
    missing = [name for name in COMPONENTS[:3] if name not in named]
    if missing:
        raise ValueError(f"{root} has no {missing[0]}, which every Wan checkpoint needs; convert the checkpoint again")
    return cast(list[Component], named)


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
        if arrays.dtypes[path] not in _NAMES:
            raise NotImplementedError(
                f"{directory}: parameter {path!r} is {arrays.dtypes[path]}, which Wan files don't hold"
            )
    return arrays


def _write_component(
    root: pathlib.Path,
    fresh: pathlib.Path,
    name: Component,
    config: WanConfig,
    layout: Layout,
    manifest: dict[str, Any],
    progress: Callable[[int], object],
    notes: list[str],
) -> dict[str, Any]:
    arrays = _arrays(root / name, name, config)
    outputs, left_out = _outputs(name, config, layout, arrays, manifest.get("mixed_dtypes", {}).get(name, {}))
    notes.extend(left_out)
    if layout == "diffusers":
        outputs = _spelled(name, outputs, manifest.get("spelling", {}))
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
    progress: Callable[[int], object],
    *,
    shard_bytes: int | None = None,
) -> None:
    """Writes one component's tensors and its config.json where `layout` has them."""
    shard_bytes = shard_bytes or SHARD_BYTES
    if layout == "official" and name == "dit":
        # What no official file holds: see open_checkpoint.
        tower = config.image_encoder
        metadata = {} if tower is None else {"image_encoder_num_heads": str(tower.num_heads)}
        write_safetensors(fresh, DIT_STEM, outputs, metadata, progress, shard_bytes)
        write_json(layouts.official_dit(config.dit), fresh / "config.json")
    elif layout == "official":
        write_pth(fresh / OFFICIAL_PTH[name], outputs, progress)
    else:
        folder, stem = SUBFOLDERS[name]
        (fresh / folder).mkdir()
        write_safetensors(fresh / folder, stem, outputs, {}, progress, shard_bytes)
        dtypes = [output.dtype for output in outputs]
        common = max(set(dtypes), key=dtypes.count)
        write_json(_diffusers_config(name, config, _TORCH_NAMES[common]), fresh / folder / "config.json")


def _diffusers_config(name: Component, config: WanConfig, dtype: str) -> dict[str, Any]:
    if name == "dit":
        return layouts.diffusers_dit(config.dit)
    if name == "vae":
        return layouts.diffusers_vae(config.vae)
    if name == "text_encoder":
        return layouts.diffusers_text_encoder(config.text_encoder, dtype)
    if config.image_encoder is None:
        raise ValueError("the checkpoint has an image_encoder, its config.json none; convert the checkpoint again")
    return layouts.diffusers_image_encoder(config.image_encoder, dtype)


def write_rest(fresh: pathlib.Path, config: WanConfig, layout: Layout, tokenizer: pathlib.Path) -> None:
    """Tokenizer, scheduler, image processor and index."""
    if layout == "official":
        _copy_files(tokenizer, fresh / OFFICIAL_TOKENIZER)
        return
    _copy_files(tokenizer, fresh / "tokenizer")
    (fresh / "scheduler").mkdir()
    write_json(layouts.diffusers_scheduler(config.flow_shift), fresh / "scheduler" / "scheduler_config.json")
    if config.image_encoder is not None:
        processor = layouts.diffusers_image_processor(config.image_encoder)
        (fresh / "image_processor").mkdir()
        write_json(processor, fresh / "image_processor" / "preprocessor_config.json")
    index = layouts.diffusers_index(config, layouts.tokenizer_class(tokenizer))
    write_json(index, fresh / "model_index.json")


def _lost_flow_shift(config: WanConfig, layout: Layout) -> list[str]:
    """What a layout can't say of the shift of the noise levels: videos would change though every weight is the same."""
    own = (config.flow_shift, config.flow_shift_480p)
    kept = OFFICIAL_FLOW_SHIFT[config.task] if layout == "official" else (config.flow_shift, None)

    def words(shift):
        return f"{shift[0]:g}" + ("" if shift[1] is None else f" ({shift[1]:g} up to 480 x 832)")

    if own == kept:
        return []
    return [
        f"flow_shift={words(own)} has no place in the {layout} layout, which means {words(kept)}; give it when you sample"
    ]


def summary(report: dict[str, Any], where: str) -> str:
    """The closing lines of a conversion."""
    parts = report["components"]
    tensors = sum(part.get("used", part.get("tensors", 0)) for part in parts.values())
    size, seconds = report["written_bytes"] / 1e9, report["seconds"]
    lines = [
        f"{report['task']} model, {report['layout']} layout: {', '.join(parts)}",
        f"{tensors} tensors, {size:.2f} GB in {seconds:.1f} s ({size / max(seconds, 1e-9):.2f} GB/s)",
    ]
    left_out = sum(len(part.get("left_out", [])) for part in parts.values())
    if left_out:
        lines.append(f"{left_out} source tensors that Wan never uses are left out (listed in the report)")
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"]), where])
