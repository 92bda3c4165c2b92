"""Synthetic checkpoints with the exact files, keys and shapes of the real ones and seeded random weights: noise, not pictures.

For tests, benchmarks and trying the converter without a download.
"""

import dataclasses
import math
import os
import pathlib
import zlib
from typing import Any

import numpy as np

from fps_convert import mapping
from fps_convert.comfyui import tokenizer_output
from fps_convert.flax_to_torch import write_rest, write_weights
from fps_convert.formats.readers import FLOATS
from fps_convert.formats.writers import Output
from fps_convert.layouts import LAYOUTS
from fps_convert.mapping import Row, SourceTensor
from fps_jax.choices import LayoutName
from fps_jax.config import (
    COMPONENTS,
    WAN_T2V_1_3B,
    Component,
    DiTConfig,
    ImageEncoderConfig,
    Task,
    TextEncoderConfig,
    VAEConfig,
    WanConfig,
)
from fps_jax.files import new_directory, write_json

_BLOCK = 1 << 20  # random numbers that are drawn; larger tensors repeat them, shifted, which is as good and far faster


def tiny_config(task: Task = "t2v", **changes: Any) -> WanConfig:
    """The smallest checkpoint that exercises every kind of tensor: two layers, a few dozen channels.

    Args:
      task: 't2v', 'i2v' or 'flf2v'; the latter two come with an image tower unless `image_encoder=None`.
      changes: fields of WanConfig to replace.
    """
    tower = ImageEncoderConfig(image_size=28, dim=80, mlp_dim=96, num_heads=1, num_layers=2)
    image: dict[str, Any] = {"in_channels": 36, "image_dim": tower.dim} if task != "t2v" else {}
    if task == "flf2v":
        image["image_positions"] = 2 * tower.num_tokens
    config = WanConfig(
        dit=DiTConfig(task=task, dim=48, mlp_dim=64, num_heads=2, num_layers=2, text_dim=24, **image),
        vae=VAEConfig(base_dim=4),
        text_encoder=TextEncoderConfig(vocab_size=416, dim=24, mlp_dim=40, num_heads=3, head_dim=8, num_layers=2),
        image_encoder=None if task == "t2v" else tower,
        flow_shift=16.0 if task == "flf2v" else 5.0,
        flow_shift_480p=3.0 if task == "i2v" else None,
    )
    return dataclasses.replace(config, **changes)


def _scale(row: Row) -> tuple[float, float]:
    """Mean and deviation that keep activations near 1: like an initialised network's, with norms near 1."""
    if row.path.endswith("/scale"):
        return 1.0, 0.1
    if row.form != "same":
        return 0.0, 1 / math.sqrt(math.prod(row.shape[:-1]))
    if row.path.endswith("/bias"):
        return 0.0, 0.02
    return 0.0, 0.5 if "embedding" in row.path else 0.1


def weights(tensor: SourceTensor, dtype: str, seed: int) -> np.ndarray:
    """Normal numbers that depend on the seed and the key alone."""
    mean, deviation = _scale(tensor.rows[0])
    rng = np.random.default_rng([seed, zlib.crc32(tensor.key.encode())])
    size = math.prod(tensor.shape)
    block = (rng.standard_normal(min(size, _BLOCK), np.float32) * deviation + mean).astype(FLOATS[dtype])
    if size <= _BLOCK:
        return block.reshape(tensor.shape)
    flat = np.empty(size, FLOATS[dtype])
    for start in range(0, size, _BLOCK):
        length = min(_BLOCK, size - start)
        flat[start : start + length] = np.roll(block, start // _BLOCK)[:length]
    return flat.reshape(tensor.shape)


def write_checkpoint(
    path: str | os.PathLike,
    config: WanConfig = WAN_T2V_1_3B,
    *,
    layout: LayoutName,
    tokenizer_dir: str | os.PathLike | None = None,
    dtypes: dict[str, str] | None = None,
    components: tuple[Component, ...] = COMPONENTS,
    shard_bytes: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint in a real layout, a tensor at a time.

    Args:
      path: the directory to write.
      config: what to write; its `flow_shift` only goes into the diffusers layout.
      layout: the name of one in `layouts.LAYOUTS`.
      tokenizer_dir: a tokenizer's files to copy; None writes a stand-in that tokenizes nothing.
      dtypes: 'F32', 'F16' or 'BF16' by component; F32 where left out.
      components: leave some out to make a checkpoint that is not whole.
      shard_bytes: write safetensors in shards of at most so many bytes.
      seed: of the weights; a component's weights are the same whatever else is written.
      overwrite: replace a non-empty directory.
    """
    wanted = LAYOUTS[layout]
    with new_directory(path, overwrite=overwrite) as fresh:
        for name in components:
            if name == "image_encoder" and config.image_encoder is None:
                continue
            dtype = (dtypes or {}).get(name, "F32")
            outputs = [
                Output(tensor.key, tensor.shape, dtype, lambda t=tensor, d=dtype: weights(t, d, seed))
                for tensor in mapping.tensors(mapping.rows(name, config), wanted.places[name].naming)
            ]
            if wanted.loose and name == "text_encoder" and tokenizer_dir is not None:
                outputs += tokenizer_output(pathlib.Path(tokenizer_dir))
            write_weights(fresh, name, config, wanted, outputs, lambda _: None, shard_bytes=shard_bytes)
        if tokenizer_dir is None:
            stand_in = fresh / "stand_in"
            stand_in.mkdir()
            write_json({"version": "1.0", "model": {"type": "Unigram", "vocab": []}}, stand_in / "tokenizer.json")
            tokenizer_dir = stand_in
        write_rest(fresh, config, wanted, pathlib.Path(tokenizer_dir))
        if (fresh / "stand_in").is_dir():
            (fresh / "stand_in" / "tokenizer.json").unlink()
            (fresh / "stand_in").rmdir()
