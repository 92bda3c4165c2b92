"""How fast is the forward at real sizes: the kernel alone, with quantization, and the quantization by itself."""

import functools
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import jax

from benchmarks.gpu_cases.facts import copy_bandwidth
from benchmarks.gpu_cases.results import NOT_MEASURED
from benchmarks.gpu_cases.timing import BF16_LIMIT, FP8_LIMIT, Size, kernels, median_seconds, rates, size_of
from fps_jax.tuning.autotune import Task
from pallas_kernels import fwd_sm90, quantize_sm90, tuning


def make_task(shape: Size, density: float, scales: int | None) -> Task:
    """The call: the window of a density on the tiles that are proposed for the grid. `scales`: a tile; None for bf16."""
    return Task(
        grid=shape.grid,
        heads=shape.heads,
        head_dim=shape.head_dim,
        tile=shape.tile,
        density=density,
        scales_per_tile=scales,
    )


def attention(
    toy: bool, *, size: str, density: float, scales: int | None, options: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Forward by a real 3D window. `scales`: FP8 scales a tile; None for bf16 without quantization. `options`: of the config."""
    task = make_task(size_of(size, toy), density, scales)
    plan, flop, pattern = task.plan, task.flop, task.plan.pattern
    q, k, v = task.inputs()
    config = replace(tuning.choose_config(task.key, **task.fits), **options or {})
    limit = BF16_LIMIT if scales is None else FP8_LIMIT
    what = {
        "density": plan.density,
        "window": plan.window,
        "tile": plan.tile,
        "tokens": plan.layout.num_tokens,
        "stored_tokens": plan.layout.num_stored,
        "tuning": asdict(config),
    }
    with kernels(toy):
        operands = jax.jit(functools.partial(quantize_sm90.quantize, pattern=pattern))(q, k, v)
        fixed = {"batch": 1, "dtype": q.dtype, "config": config, "with_lse": False}
        alone = median_seconds(lambda: fwd_sm90.attention(operands, pattern, **fixed), toy)
        yield {"part": "kernel", **what, **rates(alone, flop, limit)}
        # Also in bf16 mode the operands change layout: the price of calling it, though nothing is rounded.
        whole = jax.jit(lambda q, k, v: fwd_sm90.forward(q, k, v, pattern, config=config)[0])
        del operands
        included = median_seconds(lambda: whole(q, k, v), toy)
        yield {
            "part": "with quantization" if scales is not None else "with layout",
            **what,
            **rates(included, flop, limit),
        }


def quantization(toy: bool, *, size: str, scales: int) -> Iterator[dict[str, Any]]:
    """The passes from bf16 q, k, v to operands, fused and by XLA, beside the copy bandwidth of this very process."""
    task = make_task(size_of(size, toy), 1, scales)
    q, k, v = task.inputs()
    copy = copy_bandwidth(toy)
    yield {"part": "copy", **copy}
    # One read in bf16 and one write in FP8 of each, and V read once more for its channel maxima.
    moved = 3 * q.size * (2 + 1) + 2 * v.size
    with kernels(toy):
        for name, fused in (("fused", True), ("by XLA", False)):
            run = jax.jit(functools.partial(quantize_sm90.quantize, pattern=task.plan.pattern, fused=fused))
            timing = median_seconds(lambda run=run: run(q, k, v), toy)
            if isinstance(timing["seconds"], str):
                yield {"part": name, **timing, "GB_s": NOT_MEASURED, "share_of_copy": NOT_MEASURED}
                continue
            rate = moved / timing["seconds"]
            yield {"part": name, **timing, "GB_s": rate / 1e9, "share_of_copy": rate / 1e12 / copy["TB_s"]}
