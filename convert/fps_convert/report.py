"""What a conversion says of itself: a bar while it runs, a report for the record, a few lines at the end."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from fps_convert import key_patterns, mapping
from fps_convert.formats.readers import FLOATS
from fps_convert.layouts import Layout
from fps_convert.source import Part, Source
from fps_jax.causal import preset_name
from fps_jax.choices import LayoutName
from fps_jax.config import Component, VAEConfig, WanConfig

NAMES = {dtype: name for name, dtype in FLOATS.items()}


def audit(
    path: pathlib.Path, layout: LayoutName, config: WanConfig, parts: dict[Component, Part], notes: list[str]
) -> dict[str, Any]:
    """Every tensor of a source: its file, dtype, shape and the parameter that it becomes; and what is left out. JSON-ready."""
    components = {}
    for name, part in parts.items():
        infos = part.reader.tensors
        components[name] = {
            "source_tensors": len(infos),
            "used": len(part.tensors),
            "left_out": part.unused,
            "parameters_filled": len(mapping.leaves(part.table)),
            "missing": [],
            "extra": [],
            "bytes": part.nbytes,
            "notes": part.notes,
            "tensors": {
                tensor.key: {
                    "file": _relative(infos[tensor.key].file, path),
                    "dtype": infos[tensor.key].dtype,
                    "shape": list(tensor.shape),
                    "to": [row.path if row.layer is None else f"{row.path}[{row.layer}]" for row in tensor.rows],
                }
                for tensor in part.tensors
            },
        }
    return {"source": str(path), "layout": layout, "task": config.task, "notes": notes, "components": components}


def _relative(file: pathlib.Path, path: pathlib.Path) -> str:
    return (file.relative_to(path) if path in file.parents else file).as_posix()


def dtype_changes(source: Source, component: Component, dtype: np.dtype | None) -> list[dict[str, Any]]:
    """The parameters that are stored in another dtype than each of their source tensors has."""
    stored = source.stored_dtypes(component, dtype)
    return [
        {"parameter": path, "from": sorted(set(names)), "to": NAMES[stored[path]]}
        for path, names in source.parts[component].row_dtypes().items()
        if set(names) != {NAMES[stored[path]]}
    ]


def lost_flow_shift(config: WanConfig, layout: Layout) -> list[str]:
    """What a layout can't say of the shift of the noise levels: videos would change though every weight is the same."""
    own = (config.flow_shift, config.flow_shift_480p)
    kept = (config.flow_shift, None) if layout.scheduler else layout.flow_shift[config.task]

    def words(shift):
        return f"{shift[0]:g}" + ("" if shift[1] is None else f" ({shift[1]:g} up to 480 x 832)")

    if own == kept:
        return []
    return [
        f"flow_shift={words(own)} has no place in the {layout.name} layout, which means {words(kept)}; give it when you sample"
    ]


def lost_preset(config: WanConfig, layout: Layout) -> list[str]:
    """What a layout can't say of the way that a model is sampled."""
    if config.preset == "wan" or (config.preset == "dmd" and layout.index is not None):
        return []
    return [f"preset={config.preset!r} has no place in the {layout.name} layout; give it when you sample"]


def lost_causal(config: WanConfig, layout: Layout) -> list[str]:
    """What no torch file says: how a model makes its blocks."""
    if config.causal is None:
        return []
    name = preset_name(config.causal)
    again = f"give --preset {name}" if name else f"say it again: {config.causal}"
    return [f"how the model makes its blocks has no place in the {layout.name} layout; when it is read again, {again}"]


def check_vae_fits(config: WanConfig, layout: Layout) -> None:
    """Raises ValueError for a VAE that isn't Wan's, in a layout that doesn't say what its VAE is: it couldn't be read again."""
    own = VAEConfig(base_dim=config.vae.base_dim)
    if "latents_mean" in key_patterns.VAE[layout.places["vae"].naming].fields or config.vae == own:
        return
    names = [one.name for one in dataclasses.fields(own) if getattr(own, one.name) != getattr(config.vae, one.name)]
    raise ValueError(
        f"this model's VAE has {', '.join(names)} of its own, and {layout.name} files have no place for that; give "
        "--layout diffusers"
    )


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
    notes = [*report["notes"]]
    notes += [f"{name}: {note}" for name, part in parts.items() for note in part.get("notes", [])]
    return "\n".join([*lines, *(f"note: {note}" for note in notes), where])
