"""How fast is the forward at real sizes: the kernel alone, with quantization, and the quantization by itself."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_cases.facts import copy_bandwidth
from benchmarks.gpu_cases.results import NOT_MEASURED
from benchmarks.gpu_cases.timing import BF16_LIMIT, FP8_LIMIT, Size, kernels, median_seconds, rates, size_of
from fps_jax.plan import AttentionPlan
from fps_jax.tiles import TileLayout, propose_tiles
from fps_jax.windows import propose_window
from pallas_kernels import fwd_sm90, quantize_sm90, tuning


def build_plan(shape: Size, density: float, scales: int | None) -> AttentionPlan:
    """The window of a density on the tiles that are proposed for the grid."""
    layout = TileLayout(shape.grid, shape.tile or propose_tiles(shape.grid)[0].tile)
    window = None if density == 1 else propose_window(layout, density)
    return AttentionPlan.build(shape.grid, layout.tile, window, scales_per_tile=scales, quantize=scales is not None)


def random_inputs(plan: AttentionPlan, shape: Size) -> list[jax.Array]:
    """q, k, v in tile order, bf16; padding holds numbers too, as it may."""
    like = (1, plan.layout.num_stored, shape.heads, shape.head_dim)
    return [jax.random.normal(key, like, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)]


def call_arguments(plan: AttentionPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """(table, what quantization needs) of a plan."""
    table = {"key_tiles": jnp.asarray(plan.key_tiles), "counts": jnp.asarray(plan.counts)}
    valid = jnp.asarray(plan.layout.valid)
    return table, {"q_valid": valid, "k_valid": valid, "tile_size": plan.layout.stored}


def make_operands(plan: AttentionPlan, q: Any, k: Any, v: Any) -> quantize_sm90.Operands:
    _, padding = call_arguments(plan)
    if plan.tokens_per_scale is None:
        return quantize_sm90.unquantized(q, k, v, **padding)
    return quantize_sm90.quantize(q, k, v, **padding, tokens_per_scale=plan.tokens_per_scale)


def tuning_of(plan: AttentionPlan, head_dim: int) -> tuple[tuning.TuningKey, dict[str, int]]:
    """(key, the other arguments of `tuning.choose_config` and, with head_dim, of `tuning.candidates`)."""
    width = plan.key_tiles.shape[-1] / plan.layout.num_tiles
    key = tuning.tuning_key(head_dim=head_dim, density=width, tokens_per_scale=plan.tokens_per_scale)
    fits = {"operand_bytes": 1 if plan.quantize else 2, "output_bytes": 2, "blocks_per_tile": plan.layout.stored // 128}
    return key, fits


def attention(toy: bool, *, size: str, density: float, scales: int | None) -> Iterator[dict[str, Any]]:
    """Forward by a real 3D window. `scales`: FP8 scales a tile; None for bf16 without quantization."""
    shape = size_of(size, toy)
    plan = build_plan(shape, density, scales)
    table, padding = call_arguments(plan)
    q, k, v = random_inputs(plan, shape)
    key, fits = tuning_of(plan, shape.head_dim)
    config = tuning.choose_config(key, **fits)
    flop = shape.flop(plan.density)
    limit = BF16_LIMIT if scales is None else FP8_LIMIT
    what = {
        "density": plan.density,
        "window": plan.window,
        "tile": plan.tile,
        "tokens": shape.tokens,
        "stored_tokens": plan.layout.num_stored,
        "tuning": asdict(config),
    }
    with kernels(toy):
        operands = jax.jit(lambda q, k, v: make_operands(plan, q, k, v))(q, k, v)
        fixed = {"batch": 1, "tile_size": plan.layout.stored, "dtype": q.dtype, "config": config, "with_lse": False}
        alone = median_seconds(lambda: fwd_sm90.attention(operands, **table, **fixed), toy)
        yield {"part": "kernel", **what, **rates(alone, flop, limit)}
        # Also in bf16 mode the operands change layout: the price of calling it, though nothing is rounded.
        whole = jax.jit(
            lambda q, k, v: fwd_sm90.forward(
                q, k, v, **table, **padding, tokens_per_scale=plan.tokens_per_scale, config=config
            )[0]
        )
        del operands
        included = median_seconds(lambda: whole(q, k, v), toy)
        yield {
            "part": "with quantization" if scales is not None else "with layout",
            **what,
            **rates(included, flop, limit),
        }


def quantization(toy: bool, *, size: str, scales: int) -> Iterator[dict[str, Any]]:
    """The passes from bf16 q, k, v to operands, fused and by XLA, beside the copy bandwidth of this very process."""
    shape = size_of(size, toy)
    plan = build_plan(shape, 1, scales)
    _, padding = call_arguments(plan)
    q, k, v = random_inputs(plan, shape)
    copy = copy_bandwidth(toy)
    yield {"part": "copy", **copy}
    # One read in bf16 and one write in FP8 of each, and V read once more for its channel maxima.
    moved = 3 * q.size * (2 + 1) + 2 * v.size
    with kernels(toy):
        for name, fused in (("fused", True), ("by XLA", False)):
            run = jax.jit(
                lambda q, k, v, fused=fused: quantize_sm90.quantize(
                    q, k, v, **padding, tokens_per_scale=plan.tokens_per_scale or 0, fused=fused
                )
            )
            timing = median_seconds(lambda run=run: run(q, k, v), toy)
            if isinstance(timing["seconds"], str):
                yield {"part": name, **timing, "GB_s": NOT_MEASURED, "share_of_copy": NOT_MEASURED}
                continue
            rate = moved / timing["seconds"]
            yield {"part": name, **timing, "GB_s": rate / 1e9, "share_of_copy": rate / 1e12 / copy["TB_s"]}
