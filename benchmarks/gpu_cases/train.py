"""A training step with random weights at real size: the trainer's own programs, full fine-tuning in bf16 with float32 masters."""

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_cases.results import NOT_MEASURED
from benchmarks.gpu_cases.weights import random_params
from fps_jax.attention.attend import PlannedAttention
from fps_jax.attention.schedule import FPSSchedule
from fps_jax.config import WAN_T2V_1_3B, DiTConfig
from fps_jax.models.dit import DENSE, build_dit
from fps_jax.models.params import abstract_params, flatten
from fps_jax.sizes import latent_grid, token_grid

_ROUNDS = 3


def step(toy: bool, *, regime: int | None) -> Iterator[dict[str, Any] | None]:
    """One step of T2V-1.3B on one sample of 480 x 832 x 81, by `fps-train`'s preset 'paper': the gradient and the update.

    regime: of the default schedule; None for dense attention (cuDNN, forward and backward). FPSAttention is slow in the backward,
    plain XLA until its kernel exists.
    """
    from fps_train.batch import Batch
    from fps_train.config import PRESETS
    from fps_train.plan import BucketPlan, peak_flops, sample_flops
    from fps_train.state import Parts, init_state
    from fps_train.step import Interval, StepOptions, gradient, update

    config, grid = WAN_T2V_1_3B.dit, latent_grid(480, 832, 81)
    if toy:
        config, grid = (
            DiTConfig(
                task="t2v", dim=128, num_heads=1, num_layers=1, mlp_dim=128, text_dim=32, freq_dim=32, text_len=8
            ),
            (4, 16, 32),
        )  # fmt: skip
    tokens = token_grid(grid)
    attention = DENSE
    if regime is not None:
        plan = FPSSchedule.default(tokens).plans(tokens)[regime]
        attention = PlannedAttention(plan, implementation="portable" if toy else "auto")
    paper = PRESETS["paper"]
    options = StepOptions(Parts(config, "bfloat16"), paper.flow, paper.remat)
    yield None
    params = random_params(dict(flatten(abstract_params(build_dit(config)))), jnp.float32)
    num_params = sum(leaf.size for _, leaf in flatten(params))
    state = jax.jit(functools.partial(init_state, options=paper.optimizer, num_steps=1000))(params)
    del params
    keys = jax.random.split(jax.random.key(1))
    batch = Batch(
        jax.random.normal(keys[0], (1, config.out_channels, *grid), jnp.bfloat16),
        jax.random.normal(keys[1], (1, config.text_len, config.text_dim), jnp.bfloat16),
        jnp.zeros(1, jnp.uint32),
    )
    interval = Interval(jnp.float32(0.0), jnp.float32(1.0))
    times = []
    for i in range(1 if toy else _ROUNDS + 1):
        yield {"part": f"starting: step {i}"}
        start = time.perf_counter()
        grads, micro = gradient(
            state.params, {}, None, batch, jnp.uint32(i), interval, None, options=options, attention=attention
        )
        jax.block_until_ready(grads)
        middle = time.perf_counter()
        state, seen = update(state, grads, micro.loss[None], options=paper.optimizer, num_steps=1000)
        jax.block_until_ready(state)
        times.append((middle - start, time.perf_counter() - middle))
        del grads
        yield {"part": f"step {i}", "ok": bool(seen.finite) and int(micro.first_bad) == -1}
    timed = times[1:] or times
    seconds = [statistics.median(of) for of in zip(*timed, strict=True)]
    peak, stats = peak_flops(), jax.local_devices()[0].memory_stats() or {}
    flops = sample_flops(config, BucketPlan((config.out_channels, *grid), tokens, ()), attention, num_params)
    yield {
        "part": "step",
        "density": 1.0 if regime is None else attention.plan.density,
        "remat": paper.remat,
        "seconds": NOT_MEASURED if toy else sum(seconds),
        "gradient_seconds": NOT_MEASURED if toy else seconds[0],
        "update_seconds": NOT_MEASURED if toy else seconds[1],
        "first_seconds": NOT_MEASURED if toy else sum(times[0]),
        "mfu": NOT_MEASURED if toy or peak is None else flops / (sum(seconds) * peak),
        "peak_bytes": NOT_MEASURED if toy else stats.get("peak_bytes_in_use"),
    }
