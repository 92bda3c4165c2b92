"""What threads do with the registers that hold a wgmma accumulator, beyond what Pallas has: inline Mosaic GPU code.

Checked on the versions of jax that `mosaic.VERSIONS_CHECKED` names. In interpret mode `EMULATED` is computed instead.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.reference import FP8

_ROWS = plgpu.Layout.WGMMA.reduce(1)

# In each group of 16 columns a thread holds other columns of a float32 accumulator than of an 8-bit A operand: as an operand, its
# k-th pair of registers means column _ORDER16[k] of the accumulator.
_ORDER16 = np.array([8 * ((k % 4) // 2) + 2 * (k // 4) + k % 2 for k in range(16)])


def kv_order(n: int) -> Int[np.ndarray, "n"]:
    """The order in which `to_fp8_operand` leaves columns: its result equals p[:, kv_order(n)]. V's keys are stored in this order.

    Raises: ValueError where n is not a multiple of 16.
    """
    if n % 16:
        raise ValueError(f"{n} keys are no multiple of 16, the columns that are reordered together; pad them")
    i = np.arange(n)
    return i // 16 * 16 + _ORDER16[i % 16]


def to_fp8_operand(p: Float[Array, "M K"]) -> Float[Array, "M K"]:
    """p (float32, wgmma accumulator layout) as e4m3 in the layout of an 8-bit A operand, its columns in `kv_order`.

    One conversion for each pair of values; no shuffle, no shared memory. Moving the values to the columns they belong to would
    cost 32 stores and three barriers a step; relabelling the registers costs nothing, and V is written to match.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,), return_type=plgpu.ShapeDtypeStruct(p.shape, FP8, plgpu.Layout.WGMMA_8BIT)
    )
    def relabel_fp8(_, accumulator):
        from jax.extend.mlir import ir

        layout = mgpu.WGMMA_LAYOUT_8BIT
        registers = np.empty(layout.registers_shape(accumulator.shape), dtype=object)
        for row, column, *rest in np.ndindex(registers.shape):
            pair = [accumulator.registers[(row, 2 * column + half, *rest)] for half in (0, 1)]
            registers[(row, column, *rest)] = mgpu.utils.vector_concat(pair)
        relabelled = mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
        return relabelled.astype(ir.Float8E4M3FNType.get())

    return relabel_fp8(p)  # pyright: ignore[reportCallIssue]  # the decorator binds the first argument


def any_in_warp_is_not_1(x: Float[Array, "M"]) -> Int[Array, ""]:
    """1 in the warps that hold an element of x, a value for each row of a wgmma accumulator, other than 1 (NaN too); else 0.

    A warp votes in two instructions, where a reduction over the warpgroup would need shared memory and barriers. So this may only
    decide what a warp does by itself.
    """

    @plgpu.inline_mgpu(arg_types=(_ROWS,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT))
    def vote_not_1(_, rows):
        from jax.extend.mlir import ir
        from jax.extend.mlir.dialects import arith
        from jaxlib.mlir.dialects import vector

        one = mgpu.utils.c(1.0, ir.F32Type.get())
        values = [vector.extract(register, [], [0]) for register in rows.registers.flat]
        vote = _any_in_warp([arith.cmpf(arith.CmpFPredicate.UNE, value, one) for value in values])
        return mgpu.FragmentedArray.splat(arith.extui(ir.IntegerType.get_signless(32), vote), (), is_signed=True)

    return vote_not_1(x)  # pyright: ignore[reportCallIssue]  # the decorator binds the first argument


def scaled_row_max(parts: Sequence[Float[Array, "M _"]], scales: Sequence[Float[Array, "M"]]) -> Float[Array, "M"]:
    """The largest of `part * scale` in each row, in about half the instructions of `part.max(axis=1)`; NaN for a NaN.

    Hopper has a maximum of three numbers (VIMNMX3) for integers only. Floats that aren't negative are in the order of their bits,
    so the largest integer is the row's maximum wherever one isn't negative. Negative floats are in the opposite order: a warp with
    a row that is negative throughout looks again, for the smallest of the bits.

    Args:
      parts: ranges of columns of a float32 wgmma accumulator.
      scales: for each of them, positive.
    """

    @plgpu.inline_mgpu(
        arg_types=((plgpu.Layout.WGMMA,) * len(parts), (_ROWS,) * len(scales)),
        return_type=plgpu.ShapeDtypeStruct(parts[0].shape[:1], jnp.float32, _ROWS),
    )
    def max_by_bits(_, accumulators, factors):
        from jax.extend.mlir import ir
        from jax.extend.mlir.dialects import arith
        from jaxlib.mlir.dialects import scf, vector

        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        zero = mgpu.utils.c(0, i32)

        def row_bits(half):
            """Of each part, a thread's elements in one of its two rows, and their scale."""
            for accumulator, factor in zip(accumulators, factors, strict=True):
                pairs = accumulator.registers[:, :, :, :, half].flat
                bits = [arith.bitcast(i32, vector.extract(pair, [], [i])) for pair in pairs for i in (0, 1)]
                yield bits, vector.extract(factor.registers[:, :, half].item(), [], [0])

        def over_row(op, half):
            scaled = [
                arith.bitcast(i32, arith.mulf(arith.bitcast(f32, functools.reduce(op, bits)), factor))
                for bits, factor in row_bits(half)
            ]
            best = functools.reduce(op, scaled)
            for distance in (1, 2):  # a row's columns are in four neighbouring threads
                best = op(best, mgpu.utils.shfl_bfly(best, distance))
            return best

        def negative(x):
            return arith.cmpi(arith.CmpIPredicate.slt, x, zero)

        largest = [over_row(arith.maxsi, half) for half in (0, 1)]
        look_again = scf.IfOp(_any_in_warp([negative(x) for x in largest]), [i32, i32], has_else=True)
        with ir.InsertionPoint(look_again.then_block):
            smallest = [over_row(arith.minui, half) for half in (0, 1)]
            scf.yield_([arith.select(negative(x), y, x) for x, y in zip(largest, smallest, strict=True)])
        with ir.InsertionPoint(look_again.else_block):  # pyright: ignore[reportArgumentType, reportCallIssue]  # there is one
            scf.yield_(largest)

        registers = np.empty_like(factors[0].registers)
        for half, bits in enumerate(look_again.results):
            registers[:, :, half] = vector.broadcast(ir.VectorType.get((1,), f32), arith.bitcast(f32, bits))
        return mgpu.FragmentedArray(_registers=registers, _layout=factors[0].layout, _is_signed=None)

    return max_by_bits(tuple(parts), tuple(scales))  # pyright: ignore[reportCallIssue]  # the decorator binds the first argument


def ceil(x: Float[Array, "M"]) -> Float[Array, "M"]:
    """x, a value for each row of a wgmma accumulator, rounded up: one instruction each. Pallas rounds to nearest only."""

    @plgpu.inline_mgpu(arg_types=(_ROWS,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, _ROWS))
    def ceil_rows(_, rows):
        from jaxlib.mlir.dialects import math

        return rows._pointwise(math.ceil)

    return ceil_rows(x)  # pyright: ignore[reportCallIssue]  # the decorator binds the first argument


def _any_in_warp(conditions: list[Any]) -> Any:
    """Whether one of these holds in one of the warp's threads; alike in all of them."""
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith
    from jaxlib.mlir.dialects import nvvm

    full_warp = mgpu.utils.c(0xFFFFFFFF, ir.IntegerType.get_signless(32))
    return nvvm.vote_sync(full_warp, functools.reduce(arith.ori, conditions), "any")


def _emulated_relabel(p: Array) -> list[Array]:
    """What `to_fp8_operand` computes. Clipped, as the hardware's conversion saturates and XLA's gives NaN."""
    return [jnp.clip(p[:, kv_order(p.shape[1])], -448, 448).astype(FP8)]


def _emulated_vote(x: Array) -> list[Array]:
    """Over the warpgroup: interpret mode has no warps."""
    return [(x != 1).any().astype(jnp.int32)]


def _emulated_max(*parts_and_scales: Array) -> list[Array]:
    """By bits too, so that the same trick is tested."""
    parts, scales = np.split(np.arange(len(parts_and_scales)), 2)

    def over_row(reduce: Any, dtype: Any) -> Array:
        def bits(x):
            return lax.bitcast_convert_type(x, dtype)

        best = [
            lax.bitcast_convert_type(reduce(bits(parts_and_scales[part]), axis=1), jnp.float32)
            * parts_and_scales[scale]
            for part, scale in zip(parts, scales, strict=True)
        ]
        return lax.bitcast_convert_type(reduce(jnp.stack([bits(x) for x in best]), axis=0), jnp.float32)

    largest = over_row(jnp.max, jnp.int32)
    return [jnp.where(jnp.signbit(largest), over_row(jnp.min, jnp.uint32), largest)]


# Inline code, by the name of its function: what to compute instead of it in interpret mode.
EMULATED: dict[str, Callable[..., list[Array]]] = {
    "relabel_fp8": _emulated_relabel,
    "vote_not_1": _emulated_vote,
    "max_by_bits": _emulated_max,
    "ceil_rows": lambda x: [jnp.ceil(x)],
}
