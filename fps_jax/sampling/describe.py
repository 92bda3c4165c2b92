"""What a checkpoint is and what memory it takes, without loading its weights."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fps_jax.causal import preset_name
from fps_jax.checkpoints.open import open_description
from fps_jax.checkpoints.placement import builds
from fps_jax.config import DiTConfig, WanConfig
from fps_jax.models.dit import param_dtype
from fps_jax.models.params import abstract_params, flatten
from fps_jax.models.vae import decode_bytes
from fps_jax.sampling.presets import PRESETS
from fps_jax.sampling.request import latent_shape
from fps_jax.sizes import token_grid, video_size


def describe(
    model: str | os.PathLike, height: int | None = None, width: int | None = None, num_frames: int | None = None
) -> str:
    """A page of text for people: task, layout, sizes, dtypes, parameters, and estimated bytes on one device in bf16.

    height, width, num_frames: of the estimate; None for the checkpoint's own.
    Raises: as `WanPipeline.from_pretrained`, and ValueError for a frame size that Wan can't make.
    """
    opened = open_description(model)
    config = opened.config
    dtypes = {
        name: sorted({str(dtype) for dtype in stored.values()}) for name, stored in opened.stored_dtypes().items()
    }
    own = config.sampling
    height, width, num_frames = (
        mine if given is None else given
        for given, mine in ((height, own.height), (width, own.width), (num_frames, own.num_frames))
    )
    shape = latent_shape(1, height, width, num_frames, config)
    kind = f"Wan2.1 {config.task.upper()}, {opened.layout} layout, flow shift {_shift(config)}"
    lines = [f"{opened.directory}", kind]
    if config.preset != "wan":
        lines.append(f"sampled by preset {config.preset}: {PRESETS[config.preset].words()}")
    if config.causal is not None:
        name = preset_name(config.causal)
        lines.append(f"block diffusion, for fps-stream{f', preset {name}' if name else ''}: {config.causal.words()}")
    lines.append("")
    for name, build in builds(config).items():
        if name in opened.components:
            kinds = ", ".join(dtypes.get(name, ["not downloaded"]))
            lines.append(f"  {name:14} {_count(build):>9} parameters  {kinds:18} {_sizes(config, name)}")
        else:
            lines.append(f"  {name:14} not in this checkpoint: pass image_embeds to sample")
    lines += ["", *(f"  note: {note}" for note in opened.notes)] if opened.notes else []
    tokens = math.prod(token_grid(shape[2:], config.dit.patch_size))
    lines += [
        "",
        f"memory at {width} x {height}, {num_frames} frames ({tokens:,} tokens), bfloat16, one device (estimates)",
        "",
    ]
    lines += [f"  {stage:14} {needed / 1e9:7.1f} GB" for stage, needed in memory(config, shape).items()]
    return "\n".join(lines)


def memory(config: WanConfig, latent_shape: tuple[int, ...]) -> dict[str, int]:
    """Estimated bytes on the device by stage of a bf16 sample; the stages come one after the other.

    The DiT's and the VAE's weights are there throughout, the text encoder's only for its own stage. `benchmarks/memory.py`
    compiles the real programs and records what XLA says.
    """
    height, width, _ = video_size(latent_shape[2:])
    tokens = math.prod(token_grid(latent_shape[2:], config.dit.patch_size))
    bf16 = jnp.dtype(jnp.bfloat16)
    weights = {
        name: sum(
            leaf.size
            * (
                param_dtype(path, bf16) if name == "dit" else np.dtype("f4") if name != "text_encoder" else bf16
            ).itemsize
            for path, leaf in flatten(abstract_params(build))
        )
        for name, build in builds(config).items()
    }
    resident = weights["dit"] + weights["vae"]
    return {
        "text encoding": resident + weights["text_encoder"] + 2**30,
        "denoising": resident + _activations(config.dit, tokens),
        "VAE decode": resident + decode_bytes(config.vae, height, width),
    }


def _activations(config: DiTConfig, tokens: int) -> int:
    """Residual stream and its normed copy in float32, then the larger of q, k, v with rotations and the MLP's middle."""
    attention, mlp = 4 * 2 * config.dim + 2 * 3 * config.dim, 2 * 2 * config.mlp_dim
    return tokens * (4 * 3 * config.dim + max(attention, mlp))


def _count(build: Any) -> str:
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(build)))
    return f"{total / 1e9:.2f} B" if total >= 1e9 else f"{total / 1e6:.1f} M" if total >= 1e6 else f"{total:,}"


def _shift(config: WanConfig) -> str:
    small = config.flow_shift_480p
    return f"{config.flow_shift:g}" + ("" if small is None else f" ({small:g} up to 480 x 832)")


def _sizes(config: WanConfig, name: str) -> str:
    if name == "vae":
        return f"base width {config.vae.base_dim}, {config.vae.z_dim} latent channels"
    c: Any = getattr(config, name)
    head_dim = c.dim // c.num_heads if name != "text_encoder" else c.head_dim
    return f"{c.num_layers} layers, dim {c.dim}, {c.num_heads} heads x {head_dim}, mlp {c.mlp_dim}"
