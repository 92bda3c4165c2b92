"""A torch directory to our format."""

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fps_convert import mapping
from fps_convert.formats.readers import DTYPES
from fps_convert.lora.read import open_lora
from fps_convert.open import open_checkpoint, open_dit_on
from fps_convert.presets import check_preset
from fps_convert.report import dtype_changes
from fps_convert.single_files import Given
from fps_convert.source import Source
from fps_jax.causal import CAUSAL_PRESETS
from fps_jax.checkpoints.format import (
    SCHEDULE,
    check_tokenizer,
    copy_tokenizer,
    is_checkpoint,
    read_manifest,
    write_config,
)
from fps_jax.checkpoints.lora import Scaled
from fps_jax.choices import CausalPreset, check_choice
from fps_jax.config import COMPONENTS, Component
from fps_jax.files import check_space, new_directory, write_json
from fps_jax.progress import bytes_bar


def to_flax(
    src: str | os.PathLike | None,
    dst: str | os.PathLike,
    dtype: str | None = None,
    overwrite: bool = False,
    *,
    given: Given | None = None,
    loras: Sequence[tuple[str | os.PathLike, float]] = (),
    lora_partial: bool = False,
    preset: CausalPreset | None = None,
) -> dict[str, Any]:
    """Converts a torch checkpoint of Wan2.1 to this project's format: a directory, or single files.

    Args:
      src: the directory; see `open_checkpoint` for what is read and which errors there are. None: `given` has all files.
      dst: where to write; must not overlap `src`.
      dtype: 'bfloat16', 'float16' or 'float32' casts DiT, text encoder and image tower (round to nearest even), never the
        VAE; None keeps each tensor's own.
      overwrite: replace a non-empty `dst`.
      given: single files for a component each, in place of what the directory has.
      loras: LoRA files with their scales, merged into the DiT in float32 before it's cast; see `fps_convert.lora.read.open_lora`.
      lora_partial: leave out what of a LoRA this model has no place for, in place of an error.
      preset: how a causal model makes its blocks, which is in no torch file; kept in config.json.
    Returns: the audit, also written as `dst/audit.json`.
    """
    began = time.monotonic()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    kind = None if dtype is None else np.dtype(dtype)
    given = given or Given()
    if preset is not None:
        check_choice("preset", preset, CausalPreset)
    sources = given.all() if src is None else [src, *given.all()]
    with new_directory(dst, overwrite=overwrite, sources=tuple(sources)) as fresh:
        kept = _kept(src, given)
        source = open_checkpoint(src, given) if not kept else open_dit_on(pathlib.Path(src or ""), given)
        if preset is not None:
            check_preset(preset, source, given)
            source.config = dataclasses.replace(source.config, causal=CAUSAL_PRESETS[preset])
        elif "root" in source.spelling:
            source.audit["notes"].append(
                "how it makes its blocks isn't said: fps-stream needs --preset, or convert with it"
            )
        opened = [open_lora(file, source.config, partial=lora_partial) for file, _ in loras]
        source.loras = [Scaled(lora, scale) for lora, (_, scale) in zip(opened, loras, strict=True)]
        nbytes = {name: _stored_bytes(source, name, kind) for name in source.components}
        copied = sum(file.stat().st_size for path in kept for file in path.rglob("*") if file.is_file())
        check_space(fresh.parent, sum(nbytes.values()) + copied)
        check_tokenizer(source.tokenizer_dir)
        audit = source.audit
        mixed = {}
        with bytes_bar("converting", sum(part.nbytes for part in source.parts.values())) as progress:
            for name in source.components:
                source.save(name, fresh / name, kind, progress)
                audit["components"][name]["dtype_changes"] = dtype_changes(source, name, kind)
                if kind is None or name == "vae":
                    mixed[name] = {p: d for p, d in source.parts[name].row_dtypes().items() if len(set(d)) > 1}
        for path in kept:
            shutil.copytree(path, fresh / path.name)
            audit["notes"].append(f"{path.name} is copied from {source.path}")
        if (source.path / SCHEDULE).is_file() and not kept:  # of another DiT
            shutil.copyfile(source.path / SCHEDULE, fresh / SCHEDULE)
        copy_tokenizer(source.tokenizer_dir, fresh / "tokenizer")  # of a Hugging Face cache's links, the content
        audit["loras"] = [{**scaled.lora.report, "scale": scaled.scale} for scaled in source.loras]
        audit["notes"] += [f"{scaled.lora.summary} at scale {scaled.scale:g}, merged" for scaled in source.loras]
        audit |= {"dtype": dtype, "destination": str(dst), "written_bytes": sum(nbytes.values())}
        audit["seconds"] = round(time.monotonic() - began, 3)
        before = {} if not kept else _without_dit(read_manifest(source.path))
        write_config(
            fresh,
            source.config,
            components=[*source.components, *(path.name for path in kept)],
            source_layout=source.layout,
            spelling=before.get("spelling", {}) | source.spelling,
            loras=[{"file": str(scaled.lora.path), "scale": scaled.scale} for scaled in source.loras],
            mixed_dtypes=before.get("mixed_dtypes", {}) | {name: paths for name, paths in mixed.items() if paths},
        )
        write_json(audit, fresh / "audit.json")
    return audit


def _kept(src: str | os.PathLike | None, given: Given) -> list[pathlib.Path]:
    """The parts that stay as they are, where the DiT alone is given for a checkpoint in our format; else none."""
    if src is None or given.dit is None or len(given.all()) > 1 or not is_checkpoint(src):
        return []
    return [path for name in COMPONENTS if name != "dit" and (path := pathlib.Path(src).expanduser() / name).is_dir()]


def _without_dit(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a manifest notes of the parts that are kept."""
    noted = {name: dict(manifest.get(name, {})) for name in ("spelling", "mixed_dtypes")}
    for name in ("root", "root_prefix"):
        noted["spelling"].pop(name, None)
    noted["mixed_dtypes"].pop("dit", None)
    return noted


def _stored_bytes(source: Source, component: Component, dtype: np.dtype | None) -> int:
    dtypes = source.stored_dtypes(component, dtype)
    shapes = mapping.leaves(source.parts[component].table)
    return sum(int(np.prod(shape, dtype=np.int64)) * dtypes[path].itemsize for path, shape in shapes.items())
