"""Adapters of ours as a LoRA file that ComfyUI, diffusers and this project read."""

import functools
import os
from typing import Any

import numpy as np

from fps_convert import mapping
from fps_convert.formats.readers import DTYPES
from fps_convert.formats.writers import Output, write_safetensors_file
from fps_convert.lora.read import OURS
from fps_convert.mapping import Row
from fps_convert.report import NAMES
from fps_jax.choices import WeightDtype
from fps_jax.config import WanConfig
from fps_jax.files import new_file
from fps_jax.models.lora import LoRAConfig
from fps_jax.models.params import Params, flatten

_PREFIX = "diffusion_model."


def write_lora(
    path: str | os.PathLike, config: WanConfig, adapters: Params, lora: LoRAConfig, *, dtype: WeightDtype = "float32"
) -> None:
    """Writes adapters under official names: `diffusion_model.blocks.0.self_attn.q.lora_A.weight` `[r, in]`, `.lora_B.weight`
    `[out, r]`, and in the blocks `.alpha`; rank and alpha are in the metadata too.

    diffusers' converter knows no alpha outside the blocks (text_embedding, head, ...) and refuses a file that has one there, so
    that those pairs have alpha / rank in B.

    Args:
      path: a .safetensors file; it appears whole, and replaces one of that name.
      config: of the model that they are for.
      adapters: `init_lora`'s tree, NumPy or jax arrays.
      dtype: of the file; alpha is float32 always.
    Raises: ValueError for adapters of another model, another suffix, or NaN or inf (also where float16 overflows); OSError.
    """
    if os.path.splitext(path)[1] != ".safetensors":
        raise ValueError(f"LoRA file {str(path)!r} doesn't end in .safetensors; name it so")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    rows: dict[str, list[Row]] = {}
    for row in mapping.rows("dit", config):
        rows.setdefault(row.path, []).append(row)
    leaves = dict(flatten(adapters))
    outputs: list[Output] = []
    for name in sorted({path.rpartition("/")[0] for path in leaves}):
        outputs += _pair(name, leaves, rows.get(f"{name}/kernel", []), lora, np.dtype(dtype))
    if not outputs:
        raise ValueError("there are no adapters to write; make them with init_lora")
    metadata = {**OURS, "rank": str(lora.rank), "alpha": repr(float(lora.alpha))}
    with new_file(path) as beside:
        write_safetensors_file(beside, outputs, metadata, lambda _: None)


def _pair(name: str, leaves: dict[str, Any], rows: list[Row], lora: LoRAConfig, dtype: np.dtype) -> list[Output]:
    """The tensors of one of our linear layers, of all of a stack's."""
    given = [leaves.get(f"{name}/{half}") for half in ("lora_a", "lora_b")]
    if not rows or given[0] is None or given[1] is None:
        raise ValueError(
            f"adapter {name!r} is no lora_a and lora_b of a linear layer of this model; make it with init_lora"
        )
    a, b = (np.asarray(half) for half in given)
    (d_in, d_out), stack = rows[0].shape, () if rows[0].layer is None else (len(rows),)
    wanted = [(*stack, d_in, lora.rank), (*stack, lora.rank, d_out)]
    if [a.shape, b.shape] != wanted:
        raise ValueError(
            f"adapter {name!r} has shapes {list(a.shape)} and {list(b.shape)}, rank {lora.rank} of this model "
            f"{list(wanted[0])} and {list(wanted[1])}; it's of another model or LoRA config"
        )
    outputs = []
    for row in rows:
        module = _PREFIX + row.keys["official"].removesuffix(".weight")
        down, up = (half.T if row.layer is None else half[row.layer].T for half in (a, b))
        if row.layer is None:
            up = np.float32(lora.scale) * up.astype(np.float32)
        else:
            outputs.append(_output(f"{module}.alpha", np.float32(lora.alpha), np.dtype(np.float32)))
        source = row.shapes["official"]
        ones = (1,) * (len(source) - 2)  # a patch embedding's halves are convolutions, as its weight is
        outputs.append(_output(f"{module}.lora_A.weight", down.reshape(lora.rank, *source[1:]), dtype))
        outputs.append(_output(f"{module}.lora_B.weight", up.reshape(d_out, lora.rank, *ones), dtype))
    return outputs


def _output(key: str, values: np.ndarray | np.floating, dtype: np.dtype) -> Output:
    with np.errstate(over="ignore"):  # told below
        cast = np.asarray(values).astype(dtype)
    if not np.isfinite(cast.astype(np.float32)).all():
        raise ValueError(f"{key!r} would hold NaN or inf as {dtype}; the training went wrong, or use another dtype")
    return Output(key, cast.shape, NAMES[dtype], functools.partial(np.asarray, cast))
