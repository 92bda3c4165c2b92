"""What threads do with the registers that hold a wgmma accumulator, beyond what Pallas has: inline Mosaic GPU code.

Checked on the versions of jax that `mosaic.VERSIONS_CHECKED` names. In interpret mode the `emulated_` function of each is
computed instead.
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

# 2**f for |f| <= 1/2, rising powers of f: the smallest largest relative error (7.5e-5) of degree 3.
_EXP2 = (0.9999280571937561, 0.6932609677314758, 0.2426111251115799, 0.0551716685295105)
_EXP2_LEAST = -30.0
# A float32 plus this has a whole number in its low bits; without it again, the float32 is rounded to that.
_ROUNDING = 1.5 * 2**23
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_ROWS_OF_WARP = 16  # of the 64 of a wgmma accumulator

# In each group of 16 columns a thread holds other columns of a float32 accumulator than of an 8-bit A operand: as an operand, its
# k-th pair of registers means column _ORDER16[k] of the accumulator.
_ORDER16 = np.array([8 * ((k % 4) // 2) + 2 * (k // 4) + k % 2 for k in range(16)])


def _inline(emulated: Callable[..., list[Array]], arg_types: tuple[Any, ...], return_type: Any) -> Callable[..., Any]:
    """`plgpu.inline_mgpu`; `emulated` of the same arguments, flattened, gives the results in interpret mode."""

    def decorate(code):
        code.emulated = emulated
        return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)(code)

    return decorate


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

    @_inline(emulated_relabel, (plgpu.Layout.WGMMA,), plgpu.ShapeDtypeStruct(p.shape, FP8, plgpu.Layout.WGMMA_8BIT))
    def relabel_fp8(_, accumulator):
        from jax.extend.mlir import ir

        layout = mgpu.WGMMA_LAYOUT_8BIT
        registers = np.empty(layout.registers_shape(accumulator.shape), dtype=object)
        for row, column, *rest in np.ndindex(registers.shape):
            pair = [accumulator.registers[(row, 2 * column + half, *rest)] for half in (0, 1)]
            registers[(row, column, *rest)] = mgpu.utils.vector_concat(pair)
        relabelled = mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
        return relabelled.astype(ir.Float8E4M3FNType.get())

    return relabel_fp8(p)


def any_in_warp_is_not_1(x: Float[Array, "M"]) -> Int[Array, ""]:
    """1 in the warps that hold an element of x, a value for each row of a wgmma accumulator, other than 1 (NaN too); else 0.

    A warp votes in two instructions, where a reduction over the warpgroup would need shared memory and barriers. So this may only
    decide what a warp does by itself.
    """

    @_inline(emulated_vote, (_ROWS,), plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT))
    def vote_not_1(_, rows):
        from jax.extend.mlir import ir
        from jax.extend.mlir.dialects import arith
        from jaxlib.mlir.dialects import vector

        one = mgpu.utils.c(1.0, ir.F32Type.get())
        values = [vector.extract(register, [], [0]) for register in rows.registers.flat]
        vote = _any_in_warp([arith.cmpf(arith.CmpFPredicate.UNE, value, one) for value in values])
        return mgpu.FragmentedArray.splat(arith.extui(ir.IntegerType.get_signless(32), vote), (), is_signed=True)

    return vote_not_1(x)


def next_tops(
    parts: Sequence[Float[Array, "M _"]], scales: Sequence[Float[Array, "M"]], top: Float[Array, "M"]
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """(tops with a block of scores `part * scale`: whole numbers; by what sums relative to the tops before it shrink).

    Tops seldom move. So a warp votes once, and where none of its rows may have moved it jumps over everything but the search for
    the largest score: rounding up, the shrink's exponential, and a second look.

    The search takes about half the instructions of `part.max(axis=1)`. Hopper has a maximum of three numbers (VIMNMX3) for integers
    only. Floats that aren't negative are in the order of their bits, so the largest integer is the row's maximum wherever one score
    isn't negative. Negative floats are in the opposite order: where a row is negative throughout, the largest integer is its
    smallest score, and its maximum takes a second look, for the smallest of the bits. That matters only to a row whose top is
    negative too: such a row always votes for the long way. A NaN votes for it as well, and makes both results NaN, as does inf.

    Args:
      parts: ranges of columns of a float32 wgmma accumulator.
      scales: for each of them, positive.
      top: of the blocks before: whole numbers, or NaN.
    """
    row = plgpu.ShapeDtypeStruct(top.shape, jnp.float32, _ROWS)

    @_inline(emulated_next_tops, ((plgpu.Layout.WGMMA,) * len(parts), (_ROWS,) * len(scales), _ROWS), (row, row))
    def tops_by_bits(_, accumulators, factors, tops):
        from jax.extend.mlir import ir
        from jax.extend.mlir.dialects import arith
        from jaxlib.mlir.dialects import math, scf, vector

        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        floats, integers = arith.CmpFPredicate, arith.CmpIPredicate

        def of_half(rows, half):
            """A thread's value of a row array in one of its two rows."""
            return vector.extract(rows.registers[:, :, half].item(), [], [0])

        def row_bits(half):
            """Of each part, a thread's elements in one of its two rows, and their scale."""
            for accumulator, factor in zip(accumulators, factors, strict=True):
                pairs = accumulator.registers[:, :, :, :, half].flat
                bits = [arith.bitcast(i32, vector.extract(pair, [], [i])) for pair in pairs for i in (0, 1)]
                yield bits, of_half(factor, half)

        def over_row(op, half):
            scaled = [
                arith.bitcast(i32, arith.mulf(arith.bitcast(f32, functools.reduce(op, bits)), factor))
                for bits, factor in row_bits(half)
            ]
            best = functools.reduce(op, scaled)
            for distance in (1, 2):  # a row's columns are in four neighbouring threads
                best = op(best, mgpu.utils.shfl_bfly(best, distance))
            return best

        def raised(old, largest, smallest):
            negative = arith.cmpi(integers.slt, largest, mgpu.utils.c(0, i32))
            maximum = arith.bitcast(f32, arith.select(negative, smallest, largest))
            new = math.ceil(arith.maximumf(old, maximum))
            infinite = arith.cmpf(floats.OEQ, new, mgpu.utils.c(np.inf, f32))
            return arith.select(infinite, mgpu.utils.c(np.nan, f32), new)

        def like_tops(values):
            registers = np.empty_like(tops.registers)
            for half, value in enumerate(values):
                registers[:, :, half] = vector.broadcast(ir.VectorType.get((1,), f32), value)
            return mgpu.FragmentedArray(_registers=registers, _layout=tops.layout, _is_signed=None)

        old = [of_half(tops, half) for half in (0, 1)]
        largest = [over_row(arith.maxsi, half) for half in (0, 1)]
        # Unordered comparisons: true of a NaN. "Below 0" is of floats, so that -0.0 isn't.
        may_move = [arith.cmpf(floats.ULT, x, mgpu.utils.c(0.0, f32)) for x in old]
        may_move += [arith.cmpf(floats.UGT, arith.bitcast(f32, x), y) for x, y in zip(largest, old, strict=True)]
        branch = scf.IfOp(_any_in_warp(may_move), [f32] * 4, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            smallest = [over_row(arith.minui, half) for half in (0, 1)]
            new = [raised(*x) for x in zip(old, largest, smallest, strict=True)]
            shrink = (tops - like_tops(new)).exp2(approx=True)
            scf.yield_([*new, *(of_half(shrink, half) for half in (0, 1))])
        with ir.InsertionPoint(branch.else_block):  # pyright: ignore[reportArgumentType, reportCallIssue]  # there is one
            scf.yield_([*old, *[mgpu.utils.c(1.0, f32)] * 2])
        return like_tops(branch.results[:2]), like_tops(branch.results[2:])

    return tops_by_bits(tuple(parts), tuple(scales), top)


def exp2(x: Float[Array, "M N"], polynomial_columns: int = 0) -> Float[Array, "M N"]:
    """2**x of a float32 wgmma accumulator, `polynomial_columns` of its columns (spread evenly) without the special-function unit.

    That unit does 16 a cycle and multiprocessor, and is as busy as the tensor cores are with FP8 products. FlashAttention-4 (arXiv
    2603.05451) takes some of its work to the multiply-adders: 2**x = 2**round(x) * 2**(x - round(x)), a polynomial, and its
    exponent's bits. Relative error 7.5e-5; less than 2**-30 becomes 2**-30, which e4m3 rounds to 0. A NaN is lost.

    Args:
      x: below 127.
      polynomial_columns: a multiple of 8.
    """

    @_inline(
        functools.partial(emulated_exp2, polynomial_columns=polynomial_columns),
        (plgpu.Layout.WGMMA,),
        plgpu.ShapeDtypeStruct(x.shape, jnp.float32, plgpu.Layout.WGMMA),
    )
    def exp2_by_both(_, accumulator):
        from jax.extend.mlir import ir
        from jax.extend.mlir.dialects import arith
        from jaxlib.mlir.dialects import math

        powers = accumulator.exp2(approx=True)
        registers = powers.registers.copy()
        i32 = ir.IntegerType.get_signless(32)

        def polynomial(pair):
            def constant(value):
                return mgpu.utils.c(value, pair.type)

            integers = ir.VectorType.get(pair.type.shape, i32)
            pair = arith.maximumf(pair, constant(_EXP2_LEAST))
            shifted = arith.addf(pair, constant(_ROUNDING))
            rest = arith.subf(pair, arith.subf(shifted, constant(_ROUNDING)))  # from the nearest whole number
            value = constant(_EXP2[-1])
            for coefficient in _EXP2[-2::-1]:
                value = math.fma(value, rest, constant(coefficient))
            up = arith.shli(arith.bitcast(integers, shifted), mgpu.utils.c(23, integers))
            return arith.bitcast(pair.type, arith.addi(arith.bitcast(integers, value), up))

        for index in np.ndindex(registers.shape):
            if _is_polynomial(index[1], registers.shape[1], polynomial_columns // 8):
                registers[index] = polynomial(accumulator.registers[index])
        return mgpu.FragmentedArray(_registers=registers, _layout=powers.layout, _is_signed=None)

    return exp2_by_both(x)


def _is_polynomial(column: int, columns: int, polynomials: int) -> bool:
    """Whether a tile of 8 columns is one of so many that are spread evenly over all."""
    return (column + 1) * polynomials // columns > column * polynomials // columns


def _any_in_warp(conditions: list[Any]) -> Any:
    """Whether one of these holds in one of the warp's threads; alike in all of them."""
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith
    from jaxlib.mlir.dialects import nvvm

    full_warp = mgpu.utils.c(0xFFFFFFFF, ir.IntegerType.get_signless(32))
    return nvvm.vote_sync(full_warp, functools.reduce(arith.ori, conditions), "any")


def emulated_relabel(p: Array) -> list[Array]:
    """What `to_fp8_operand` computes. Clipped, as the hardware's conversion saturates and XLA's gives NaN."""
    return [jnp.clip(p[:, kv_order(p.shape[1])], -448, 448).astype(FP8)]


def emulated_vote(x: Array) -> list[Array]:
    """Over the warpgroup: interpret mode has no warps, and what the vote decides is a branch of all its rows."""
    return [(x != 1).any().astype(jnp.int32)]


def emulated_exp2(x: Array, polynomial_columns: int) -> list[Array]:
    tiles = x.shape[1] // 8
    polynomial = [_is_polynomial(tile, tiles, polynomial_columns // 8) for tile in range(tiles)]
    least = jnp.maximum(x, _EXP2_LEAST)
    whole = jnp.round(least)
    value = jnp.polyval(jnp.asarray(_EXP2[::-1], jnp.float32), least - whole)
    bits = lax.bitcast_convert_type(value, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return [jnp.where(np.repeat(polynomial, 8), lax.bitcast_convert_type(bits, jnp.float32), jnp.exp2(x))]


def emulated_next_tops(*parts_and_scales_and_top: Array) -> list[Array]:
    """By bits and by the votes of warps, of 16 rows each, so that the same tricks are tested."""
    *parts_and_scales, top = parts_and_scales_and_top
    parts, scales = np.split(np.arange(len(parts_and_scales)), 2)

    def over_row(reduce: Any, dtype: Any) -> Array:
        def bits(x):
            return lax.bitcast_convert_type(x, dtype)

        best = [
            lax.bitcast_convert_type(reduce(bits(parts_and_scales[part]), axis=1), jnp.float32)
            * parts_and_scales[scale]
            for part, scale in zip(parts, scales, strict=True)
        ]
        # A NaN of a GPU's arithmetic has no sign, a CPU's may.
        best = [jnp.where(jnp.isnan(x), jnp.nan, x) for x in best]
        return lax.bitcast_convert_type(reduce(jnp.stack([bits(x) for x in best]), axis=0), jnp.float32)

    largest = over_row(jnp.max, jnp.int32)
    may_move = ~((top >= 0) & (largest <= top))
    vote = jnp.repeat(may_move.reshape(-1, _ROWS_OF_WARP).any(1), _ROWS_OF_WARP)
    new = jnp.ceil(jnp.maximum(top, jnp.where(jnp.signbit(largest), over_row(jnp.min, jnp.uint32), largest)))
    new = jnp.where(jnp.isposinf(new), jnp.nan, new)
    return [jnp.where(vote, new, top), jnp.where(vote, jnp.exp2(top - new), 1)]
