"""The 64 query rows of a consumer warpgroup of `forward`.

Q K of one key block and P V of the one before are in the tensor cores while the softmax of that block runs:

    tensor cores   | Q K(i)      | P V(i-1)                | Q K(i+1)
    consumer       | wait K(i+1)?  softmax(i)      rescale | ...

and where one consumer still waits for the tensor cores the other one keeps them busy.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.sm90.config import BLOCK_KV, BLOCK_Q, BLOCK_ROWS, CONSUMERS, VALID_ROWS
from pallas_kernels.sm90.registers import to_fp8_operand
from pallas_kernels.sm90.softmax import (
    ROWS,
    START,
    Sums,
    after_step,
    before_step,
    no_sums,
    online_softmax,
    over_rows,
)
from pallas_kernels.sm90.work import Block, Place

f32, i32 = jnp.float32, jnp.int32
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_LOG2E = math.log2(math.e)

# What a step hands to the next: sums, tops, P and its shrink, all of this step, K's scales of the next, and V's groups of both: the
# sums are in units of the first one's scales.
_Carry = tuple[Sums, Array, Array, Array, list[Any], list[Any]]

_accumulator = functools.partial(plgpu.WGMMAAccumulatorRef, dtype=f32)


def consume(block: Block, place: Place, wg: Array, queries_were_read: Callable[[], None]) -> None:
    """Scores, softmax and output of every step, then the division by the row sums.

    Args:
      wg: which of the consumers this is.
      queries_were_read: called where the last product with them is done.
    """
    to_log2: Any = _LOG2E / math.sqrt(block.problem.head_dim)
    if block.problem.scales:
        to_log2 = to_log2 * block.operands.q_scale[place.group, place.block * CONSUMERS + wg]
    rows = _Rows(block, place, wg, to_log2)
    first_scales, next_scales = rows.key_scales(i32(0)), rows.key_scales(i32(1))
    groups = [rows.value_group(i32(step)) for step in (0, 1)] if block.problem.value_groups else []
    s = rows.first_products()
    start = plgpu.layout_cast(jnp.full((BLOCK_Q,), START, f32), ROWS)
    p, top, shrink = rows.softmax(s, rows.to_scores(first_scales), start)
    rows.wait_for_keys(i32(1))
    sums = no_sums(block.problem.head_dim, block.problem.promote_every)
    carry = (sums, top, rows.to_operand(p), shrink, next_scales, groups)
    sums, top, p, shrink, _, groups = lax.fori_loop(1, place.steps, rows.step, carry)
    queries_were_read()
    acc = sums.total() * over_rows(shrink, (BLOCK_Q, block.problem.head_dim + VALID_ROWS)) + rows.last_output(p)
    rows.store(acc, top, groups)


class _Rows(NamedTuple):
    """A consumer's rows of an item, and what is done with them. `to_log2`: takes products to scores in log2, but for K's scale."""

    block: Block
    place: Place
    wg: Array
    to_log2: Any

    def slot(self, step: Array) -> Array:
        return self.place.slot(self.block.problem, step)

    def keys(self, step: Array) -> Any:
        """K of a step, as the right side of Q K."""
        return self.block.memory.k_smem.at[self.slot(step)].transpose((1, 0))

    def values(self, step: Array) -> Any:
        """V of a step and the validity rows, as the right side of P V."""
        return self.block.memory.v_smem.at[self.slot(step)].transpose((1, 0))

    @property
    def queries(self) -> Any:
        return self.block.memory.q_smem.at[self.wg]

    def wait_for_keys(self, step: Array) -> None:
        """Until K of a step has arrived, if there is such a step."""
        barriers = self.block.memory.k_barriers
        pl.when(step < self.place.steps)(lambda: plgpu.barrier_wait(barriers.at[self.slot(step)]))

    def key_scales(self, step: Array) -> list[Any]:
        """K's scales of a step, loaded, one for each group of the key block; those of the last step for any after it.

        A step loads those of the next: its own would come too late, as their products with `to_log2` stand before its matmuls.
        """
        k_scale, count = self.block.operands.k_scale, self.block.problem.scales
        step = jnp.minimum(step, self.place.steps - 1)
        return [k_scale[(*self.place.scales, step * count + i)] for i in range(count)]

    def value_group(self, step: Array) -> Any:
        """The group of V that a step's keys are in, loaded; that of the last step for any after it."""
        tile = lax.div(jnp.minimum(step, self.place.steps - 1), i32(self.block.problem.blocks_per_tile))
        return self.block.value_groups[(*self.place.row, tile)]

    def in_units_of(self, sums: Sums, groups: list[Any]) -> Sums:
        """Sums, in units of the first group's scales, in those of the second's: exact, as scales are powers of two.

        Groups are many steps long where a table lists their tiles together, so the branch is seldom taken. At the end of a step: at
        its beginning ptxas would copy all sums in every step.
        """
        if not groups:
            return sums
        old, new = groups
        columns = self.block.problem.head_dim + VALID_ROWS

        def converted():
            v_scale, group = self.block.operands.v_scale, self.place.group
            scale = plgpu.load(v_scale.at[group, old, 0], layout=_COLUMNS, optimized=False)
            per_unit = plgpu.load(v_scale.at[group, new, 1], layout=_COLUMNS, optimized=False)
            factor = lax.broadcast_in_dim(scale * per_unit, (BLOCK_Q, columns), [1])
            return sums.times(factor)

        return lax.cond(old != new, converted, lambda: sums)

    def to_scores(self, key_scales: list[Any]) -> list[Any]:
        """Factors that take products of q and k to scores in log2: one for each of K's scales, or one alone without any."""
        return [scale * self.to_log2 for scale in key_scales] or [self.to_log2]

    def softmax(self, s: Array, scales: list[Any], top: Array) -> tuple[Array, Array, Array]:
        problem = self.block.problem
        return online_softmax(s, scales, top, problem.log2_p, problem.config.polynomial_columns)

    def to_operand(self, p: Array) -> Array:
        return to_fp8_operand(p) if self.block.problem.scales else p.astype(self.block.problem.operand)

    def first_products(self) -> Array:
        """Q K of the first step."""
        step, memory = i32(0), self.block.memory

        def multiply(s_acc):
            plgpu.wgmma(s_acc, self.queries, self.keys(step))
            return s_acc[...]

        plgpu.barrier_wait(memory.k_barriers.at[self.slot(step)])
        s = pl.run_scoped(multiply, _accumulator((BLOCK_Q, BLOCK_KV)))
        plgpu.barrier_arrive(memory.k_consumed_barriers.at[self.slot(step)])
        return s

    def step(self, step: Array, carry: _Carry) -> _Carry:
        """Scores and softmax of this step beside P V of the one before."""
        sums, top, p, shrink, key_scales, groups = carry
        memory, problem = self.block.memory, self.block.problem
        v_slot = self.slot(step - 1)
        scales, next_scales = self.to_scores(key_scales), self.key_scales(step + 1)
        next_groups = [groups[1], self.value_group(step + 1)] if groups else []
        sums = before_step(sums, shrink, step, problem.promote_every)
        # Before the matmuls, not between them: a branch there would part the zeros of a fresh accumulator from the first P V, into
        # which they fold (34 instructions a step). There is nothing to wait for: V was copied before the K that has arrived.
        plgpu.barrier_wait(memory.v_barriers.at[v_slot])
        if problem.config.take_turns:
            plgpu.barrier_wait(memory.turn_barriers.at[self.wg])
        recent, p, top, new_shrink = self.products(step, p, scales, top, shrink, sums.recent)
        plgpu.barrier_arrive(memory.v_consumed_barriers.at[v_slot])
        # Converted after the wait for P V: before it, ptxas serializes every wgmma (C7513).
        operand = self.to_operand(p)
        sums = self.in_units_of(after_step(sums, recent, shrink), groups)
        return sums, top, operand, new_shrink, next_scales, next_groups

    def products(self, step, p, scales, top, shrink, recent):
        """(P V of the step before, added to `recent` where that isn't None; new P; its tops; its shrink)."""
        shape = (BLOCK_Q, self.block.problem.head_dim + VALID_ROWS)

        def fresh_output(s_acc, o_acc):
            results = self.overlapped(step, s_acc, o_acc, p, scales, top)
            return plgpu.wgmma_accumulator_load(o_acc, wait_n=0), *results

        def running_output(s_acc, state):
            o_acc, *results = state
            values = self.overlapped(step, s_acc, o_acc, p, scales, top)
            for ref, value in zip(results, values, strict=True):
                ref[...] = value

        def with_scores(s_acc):
            plgpu.wgmma(s_acc, self.queries, self.keys(step))
            if recent is None:
                return pl.run_scoped(functools.partial(fresh_output, s_acc), _accumulator(shape))
            blank = plgpu.layout_cast(jnp.zeros((BLOCK_Q, BLOCK_KV), f32), plgpu.Layout.WGMMA)
            start = plgpu.WGMMAAccumulatorRef.init(recent)
            return pl.run_state(functools.partial(running_output, s_acc))((start, blank, top, shrink))

        return pl.run_scoped(with_scores, _accumulator((BLOCK_Q, BLOCK_KV)))

    def overlapped(self, step, s_acc, o_acc, p, scales, top):
        """P V is issued behind Q K; softmax as soon as Q K is done, while P V runs."""
        memory = self.block.memory
        plgpu.wgmma(o_acc, p, self.values(step - 1))
        if self.block.problem.config.take_turns:
            plgpu.barrier_arrive(memory.turn_barriers.at[1 - self.wg])
        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
        plgpu.barrier_arrive(memory.k_consumed_barriers.at[self.slot(step)])
        results = self.softmax(s, scales, top)
        # The branch ends a basic block: without it ptxas moves the wait for P V above the exponentials it should overlap.
        self.wait_for_keys(step + 1)
        return lax.optimization_barrier(results)

    def last_output(self, p: Array) -> Array:
        """P V of the last step."""
        step, memory = self.place.steps - 1, self.block.memory

        def multiply(o_acc):
            plgpu.wgmma(o_acc, p, self.values(step))
            return o_acc[...]

        plgpu.barrier_wait(memory.v_barriers.at[self.slot(step)])
        pv = pl.run_scoped(multiply, _accumulator((BLOCK_Q, self.block.problem.head_dim + VALID_ROWS)))
        plgpu.barrier_arrive(memory.v_consumed_barriers.at[self.slot(step)])
        return pv

    def store(self, acc: Array, top: Array, groups: list[Any]) -> None:
        """Output and log-sum-exp to global memory. `acc`: sums of P V and, in the extra columns, of P."""
        problem, operands, memory, place = self.block.problem, self.block.operands, self.block.memory, self.place
        dim = problem.head_dim
        rows = pl.ds(place.block * BLOCK_ROWS + self.wg * BLOCK_Q, BLOCK_Q)
        total = acc[:, dim:].max(axis=1)  # these columns are equal: each the row sums of the rounded P over valid keys
        valid = plgpu.load(operands.query_valid.at[rows], layout=ROWS, optimized=False) > 0
        o = acc[:, :dim] * over_rows(1 / total, (BLOCK_Q, dim))
        if problem.scales:
            v_scale = operands.v_scale.at[place.group]
            if groups:
                v_scale = v_scale.at[groups[0], 0, pl.ds(0, dim)]
            v_scale = plgpu.load(v_scale, layout=_COLUMNS, optimized=False)
            o *= lax.broadcast_in_dim(v_scale, (BLOCK_Q, dim), [1])
        # Selected, not multiplied: a NaN scale of the tile must not reach its padded rows.
        o = jnp.where(over_rows(valid, o.shape), o, 0.0)
        if problem.workers < problem.items:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before is stored from here
        memory.o_smem[self.wg] = o.astype(problem.dtype)
        if self.block.lse is not None:
            natural = (top + jnp.log2(total) - problem.log2_p) * math.log(2)
            memory.lse_smem[self.wg] = jnp.where(valid, natural, 0.0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory.o_smem.at[self.wg], self.block.out.at[place.batch, rows, place.head])
        if self.block.lse is not None:
            plgpu.copy_smem_to_gmem(memory.lse_smem.at[self.wg], self.block.lse.at[place.batch, place.head, rows])
