"""How fast is the forward at real sizes, and is it right there: configs timed, checked, and the best beside dense attention."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import jax

from benchmarks.gpu_cases import programs
from benchmarks.gpu_cases.correct import bars
from benchmarks.gpu_cases.facts import copy_bandwidth
from benchmarks.gpu_cases.results import NOT_MEASURED
from benchmarks.gpu_cases.timing import BF16_LIMIT, FP8_LIMIT, median_seconds, rates, size_of
from fps_jax.tuning.autotune import AGREE
from fps_jax.tuning.timing import summary
from pallas_kernels.sm90 import quantize as quantize_sm90
from pallas_kernels.sm90.config import ForwardConfig
from pallas_kernels.sm90.tuned import choose_config

Key = tuple[str, float, int | None]
# What this process has timed and found right: (size, density, scales) -> config -> seconds.
_timed: dict[Key, dict[ForwardConfig, float]] = {}


def config_of(toy: bool, size: str, density: float, scales: int | None, options: dict[str, Any]) -> ForwardConfig:
    """What the tuned table names, or the default, with these options."""
    task = programs.task_of(toy, size, density, scales)
    chosen = replace(choose_config(task.call), **options)
    # As `CallShape.candidates`: the copier's second loop spills with 24 registers.
    if chosen.persistent and scales is None:
        chosen = replace(chosen, consumer_registers=232, producer_registers=40)
    return chosen


def attention(
    toy: bool,
    *,
    size: str,
    density: float,
    scales: int | None,
    options: dict[str, Any] | None = None,
    quantized: bool = False,
) -> Iterator[dict[str, Any] | None]:
    """Forward by a real 3D window. `scales`: FP8 scales a tile; None for bf16. `quantized`: also with the passes before it."""
    task = programs.task_of(toy, size, density, scales)
    config = config_of(toy, size, density, scales, options or {})
    kernel = programs.forward(toy, size, density, scales, config)
    quantize = programs.quantizer(toy, size, scales)
    error_of = programs.last_tile_error(toy, size, density, scales)
    yield None
    with programs.kernels(toy):
        qkv, operands = programs.inputs(toy, size), programs.operands(toy, size, scales)
        error = error_of(qkv, *kernel(operands))
        what = {
            "ok": error["rel_l2"] <= AGREE and error["rel_l2_lse"] <= bars(scales, toy).lse,
            **error,
            "density": task.plan.density,
            "window": task.plan.window,
            "tile": task.plan.tile,
            "config": asdict(config),
        }
        limit = BF16_LIMIT if scales is None else FP8_LIMIT
        timing = median_seconds(lambda: kernel(operands), toy)
        if what["ok"] and not toy:
            _timed.setdefault((size, density, scales), {})[config] = timing["seconds"]
        tuned = {"key": asdict(task.key), "measured_on": task.measured_on()}
        yield {"part": "kernel", **what, **rates(timing, task.flop, limit), **tuned}
        if quantized:
            # In bf16 mode the operands change layout: the price of calling it, though nothing is rounded.
            name = "with quantization" if scales is not None else "with layout"
            timing = median_seconds(lambda: kernel(quantize(*qkv)), toy)
            yield {"part": name, **rates(timing, task.flop, limit)}


def cudnn(toy: bool, *, size: str) -> Iterator[dict[str, Any] | None]:
    """cuDNN through jax.nn.dot_product_attention, bf16, on the real tokens without padding."""
    call = _cudnn(toy, size)
    yield None
    yield rates(median_seconds(call, toy), size_of(size, toy).flop(), BF16_LIMIT)


@functools.cache
def _cudnn(toy: bool, size: str) -> Callable[[], jax.Array]:
    shape = size_of(size, toy)
    like = jax.ShapeDtypeStruct((1, shape.tokens, shape.heads, shape.head_dim), programs.BF16)
    run = programs.compiled(
        toy,
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="xla" if toy else "cudnn"),
        *[like] * 3,
    )

    @functools.cache
    def arrays() -> list[jax.Array]:
        return [jax.random.normal(key, like.shape, like.dtype) for key in jax.random.split(jax.random.key(0), 3)]

    return lambda: run(*arrays())


def pairs(toy: bool, *, size: str, density: float, scales: int | None) -> Iterator[dict[str, Any] | None]:
    """The best config of this process and cuDNN in turns: the ratio that clocks and heat can't move."""
    dense = _cudnn(toy, size)
    yield None
    times = _timed.get((size, density, scales))
    if not times:
        yield {"not available": "needs a GPU" if toy else "no config of this process was right"}
        return
    config = min(times, key=times.__getitem__)
    kernel = programs.forward(toy, size, density, scales, config)
    operands = programs.operands(toy, size, scales)
    ours, theirs = [], []
    for _ in range(5):
        theirs.append(median_seconds(dense, toy, rounds=1)["seconds"])
        ours.append(median_seconds(lambda: kernel(operands), toy, rounds=1)["seconds"])
    ratios = sorted(d / o for d, o in zip(theirs, ours, strict=True))
    flop = programs.task_of(toy, size, density, scales).flop
    yield {
        "config": asdict(config),
        **rates(summary(ours, 1), flop, BF16_LIMIT if scales is None else FP8_LIMIT),
        "cudnn": summary(theirs, 1),
        "ratio": ratios[2],
        "ratios": ratios,
    }


def quantization(toy: bool, *, size: str, scales: int) -> Iterator[dict[str, Any] | None]:
    """The passes from bf16 q, k, v to operands, fused and by XLA, beside the copy bandwidth of this very process."""
    task = programs.task_of(toy, size, 1.0, scales)
    fused = programs.quantizer(toy, size, scales)
    pattern = task.plan.pattern
    by_xla = programs.compiled(toy, quantize_sm90.by_xla, *[programs.like(task)] * 3, pattern)
    yield None
    qkv = programs.inputs(toy, size)
    copy = copy_bandwidth(toy)
    yield {"part": "copy", **copy}
    # One read in bf16 and one write in FP8 of each, and V read once more for its channel maxima.
    moved = 3 * qkv[0].size * (2 + 1) + 2 * qkv[2].size
    with programs.kernels(toy):
        for name, run in (("fused", fused), ("by XLA", lambda *x: by_xla(*x, pattern))):
            timing = median_seconds(lambda run=run: run(*qkv), toy)
            if isinstance(timing["seconds"], str):
                yield {"part": name, **timing, "GB_s": NOT_MEASURED, "share_of_copy": NOT_MEASURED}
                continue
            rate = moved / timing["seconds"]
            yield {"part": name, **timing, "GB_s": rate / 1e9, "share_of_copy": rate / 1e12 / copy["TB_s"]}
