"""Block diffusion with random weights at real size: seconds of a block and of its decoding, once the cache is full."""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_cases.results import NOT_MEASURED
from benchmarks.gpu_cases.weights import random_params
from fps_jax.attention.cache import CacheLayout
from fps_jax.causal import CAUSAL_PRESETS
from fps_jax.config import WAN_T2V_1_3B, DiTConfig, VAEConfig
from fps_jax.models.dit import build_dit, param_dtype
from fps_jax.models.params import abstract_params, flatten
from fps_jax.models.vae import DecodeStream, build_vae
from fps_jax.sampling.block_noise import block_noise
from fps_jax.sampling.rollout import Rollout, text_kv

_BF16 = jnp.dtype(jnp.bfloat16)
_ROUNDS = 5  # blocks that are timed


def stream(toy: bool, *, window: int, scales_per_tile: int | None = None) -> Iterator[dict[str, Any] | None]:
    """T2V-1.3B at 480 x 832 as Self-Forcing makes it (blocks of 3 latent frames in 4 steps and a clean pass), window and no sink.

    scales_per_tile: for a cache of FP8 codes and attention in FP8; None for bf16.

    Seconds, medians of `_ROUNDS` blocks after the cache is full: the block's latents, their decoding to frames on the host, both;
    frames/s of both one after the other, and with the next block begun in between; and of a first block, warm, from noise to its
    frames. The text encoder isn't in it.
    """
    causal = dataclasses.replace(CAUSAL_PRESETS["self-forcing"], window=window)
    dit, vae, rows, columns = WAN_T2V_1_3B.dit, WAN_T2V_1_3B.vae, 60, 104
    if toy:
        dit = DiTConfig(
            task="t2v", dim=128, num_heads=1, num_layers=1, mlp_dim=128, text_dim=32, freq_dim=32, text_len=8
        )  # fmt: skip
        vae, rows, columns = VAEConfig(base_dim=4), 8, 8
    layout = CacheLayout.build(causal, (rows // 2, columns // 2), scales_per_tile=scales_per_tile)
    yield None
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, param_dtype(path, _BF16))
        for path, leaf in flatten(abstract_params(build_dit(dit)))
    }
    params = random_params(shapes)
    text = text_kv(
        dit, params, jax.random.normal(jax.random.key(1), (1, dit.text_len, dit.text_dim), _BF16), dtype=_BF16
    )
    rollout = Rollout(dit, params, text, layout, dtype=_BF16, implementation="portable" if toy else "auto")
    decoder = DecodeStream(vae, random_params(dict(flatten(abstract_params(build_vae(vae)))), jnp.float32))
    steps, full, made = len(causal.steps), window // causal.frames_per_block, []
    for i in range(1 + full + (1 if toy else _ROUNDS)):
        noise = block_noise(0, rollout.next_frame, steps, rollout.next_shape())
        jax.block_until_ready(noise)
        start = time.perf_counter()
        latents = jax.block_until_ready(rollout.block(noise[0], noise[1:]))
        middle = time.perf_counter()
        frames = decoder.push(latents)
        made.append((middle - start, time.perf_counter() - middle, len(frames)))
        yield {"part": f"block {i}", "ok": bool(np.isfinite(frames).all()) and bool(jnp.isfinite(latents).all())}
    # As `Session.ahead` has it: the next block begins once the device was told to decode this one.
    ahead = []
    for _ in range(1 if toy else _ROUNDS):
        start = time.perf_counter()
        decoding = {}
        decoder.begin(np.asarray(latents), decoding)
        noise = block_noise(0, rollout.next_frame, steps, rollout.next_shape())
        latents = rollout.block(noise[0], noise[1:], check=False)
        frames = decoder.frames(decoding)
        rollout.check()
        ahead.append(time.perf_counter() - start)
    yield {"part": "ahead", "ok": bool(np.isfinite(frames).all()) and bool(jnp.isfinite(latents).all())}
    rollout.restart()
    decoder.restart()
    start = time.perf_counter()
    noise = block_noise(0, 0, steps, rollout.next_shape())
    decoder.push(rollout.block(noise[0], noise[1:]))
    first = time.perf_counter() - start
    block, decode = (statistics.median(times) for times in list(zip(*made[1 + full :], strict=True))[:2])
    yield {
        "part": "stream",
        "window": window,
        "frames_a_block": made[-1][2],
        "cache_bytes": int(sum(leaf.nbytes for leaf in jax.tree.leaves(rollout.cache))),
        "seconds": NOT_MEASURED if toy else block + decode,
        "block_seconds": NOT_MEASURED if toy else block,
        "decode_seconds": NOT_MEASURED if toy else decode,
        "frames_per_second": NOT_MEASURED if toy else made[-1][2] / (block + decode),
        "ahead_seconds": NOT_MEASURED if toy else statistics.median(ahead),
        "frames_per_second_ahead": NOT_MEASURED if toy else made[-1][2] / statistics.median(ahead),
        "first_block_seconds": NOT_MEASURED if toy else first,
    }
