"""The program of one thread block of `fwd_sm90`: a warpgroup that copies and two that compute.

In a consumer, Q K of one key block and P V of the one before are in the tensor cores while the softmax of that block runs:

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

from pallas_kernels.quantize_sm90 import Operands
from pallas_kernels.reference import FP8_MAX
from pallas_kernels.registers import to_fp8_operand
from pallas_kernels.shared_memory import swizzled
from pallas_kernels.softmax_sm90 import (
    ROWS,
    START,
    after_step,
    before_step,
    no_sums,
    online_softmax,
    over_rows,
)
from pallas_kernels.tuning import BLOCK_KV, BLOCK_Q, BLOCK_ROWS, CONSUMERS, VALID_ROWS, ForwardConfig

f32, i32 = jnp.float32, jnp.int32
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_LOG2E = math.log2(math.e)

_accumulator = functools.partial(plgpu.WGMMAAccumulatorRef, dtype=f32)


class Problem(NamedTuple):
    """The static side of a launch.

    workers: clusters that are launched, each for the items `worker`, `worker + workers`, ...; an item is a head's block of query
      rows, or two of them in a cluster of two.
    scales: of K in a key block, 0 without quantization.
    dtype: of the output.
    """

    batch: int
    heads: int
    head_dim: int
    query_blocks: int
    workers: int
    blocks_per_tile: int
    shared_table: bool
    scales: int
    dtype: Any
    operand: Any
    config: ForwardConfig

    @property
    def items(self) -> int:
        return self.batch * self.heads * (self.query_blocks // self.config.cluster)

    @property
    def promote_every(self) -> int | None:
        return self.config.promote_every if self.scales else None

    @property
    def log2_p(self) -> float:
        """P is stored times 2 to this."""
        return math.log2(FP8_MAX) if self.scales else 0.0


class Memory(NamedTuple):
    """Shared memory and barriers of a thread block."""

    q_smem: Any
    k_smem: Any
    v_smem: Any  # head_dim rows of V and the validity rows
    o_smem: Any
    lse_smem: Any
    q_barriers: Any
    k_barriers: Any
    v_barriers: Any
    k_consumed_barriers: Any
    v_consumed_barriers: Any
    turn_barriers: Any  # of each consumer


class Place(NamedTuple):
    """What a thread block is at: batch entry, head, both together, block of query rows, its row of table and scales.

    first: steps of the items before this one, where the ring of key blocks stands; steps: of this one.
    """

    batch: Array
    head: Array
    group: Array
    block: Array
    row: tuple[Array, Array]
    scales: tuple[Array, Array]
    first: Array
    steps: Array

    def slot(self, problem: Problem, step: Array) -> Array:
        """Of the ring of key blocks."""
        return (self.first + step) & (problem.config.stages - 1)


def scratch(problem: Problem) -> Memory:
    """Types of `Memory`."""
    config, dim = problem.config, problem.head_dim
    if config.cluster == 1:
        consumed = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.stages)
    else:  # a slot is free when the consumers of both blocks are done: each block's copies write to both
        consumed = plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=CONSUMERS, num_barriers=config.stages)
    return Memory(
        q_smem=swizzled((CONSUMERS, BLOCK_Q, dim), problem.operand),
        k_smem=swizzled((config.stages, BLOCK_KV, dim), problem.operand),
        v_smem=swizzled((config.stages, dim + VALID_ROWS, BLOCK_KV), problem.operand),
        o_smem=swizzled((CONSUMERS, BLOCK_Q, dim), problem.dtype),
        lse_smem=plgpu.SMEM((CONSUMERS, BLOCK_Q), f32),
        q_barriers=plgpu.Barrier(num_barriers=CONSUMERS),
        k_barriers=plgpu.Barrier(num_barriers=config.stages),
        v_barriers=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),  # V and the validity rows
        k_consumed_barriers=consumed,
        v_consumed_barriers=consumed,
        turn_barriers=plgpu.Barrier(num_barriers=CONSUMERS),
    )


def body(problem: Problem, num_inputs: int, with_lse: bool, *refs: Any) -> None:
    """What every warpgroup runs. `refs`: the operands that there are, table, counts, output, log-sum-exp, `Memory`."""
    operands: Any = Operands(*refs[:num_inputs], *(None,) * (len(Operands._fields) - num_inputs))
    table, counts, out, *rest = refs[num_inputs:]
    lse = rest.pop(0) if with_lse else None
    memory = Memory(*rest)

    wg = lax.axis_index("wg")

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(problem.config.consumer_registers, action="increase")
        q_barrier, q_smem = memory.q_barriers.at[wg], memory.q_smem.at[wg]

        def load_queries(place):
            rows = pl.ds(place.block * BLOCK_ROWS + wg * BLOCK_Q, BLOCK_Q)
            plgpu.copy_gmem_to_smem(operands.q.at[place.group, rows], q_smem, q_barrier)

        def consume(item, first):
            place = _place(problem, counts, item, first)
            plgpu.barrier_wait(q_barrier)
            load = lambda item: load_queries(_place(problem, counts, item, first))  # noqa: E731
            _consume(problem, place, operands, memory, out, lse, wg, lambda: load_next(problem, item, load))
            return first + place.steps

        if problem.config.take_turns:
            pl.when(wg == 1)(lambda: plgpu.barrier_arrive(memory.turn_barriers.at[0]))
        load_queries(_place(problem, counts, lax.axis_index("worker"), i32(0)))
        _each_item(problem, consume)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(problem.config.producer_registers, action="decrease")

        def produce(item, first):
            place = _place(problem, counts, item, first)
            _produce(problem, place, operands, table, memory)
            return first + place.steps

        steps = _each_item(problem, produce)
        stages = problem.config.stages

        # Every phase of every barrier is waited for: a block of a cluster must not end before its peer's last arrivals here.
        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(memory.k_consumed_barriers.at[step & (stages - 1)])
            plgpu.barrier_wait(memory.v_consumed_barriers.at[step & (stages - 1)])


def _each_item(problem: Problem, run: Any) -> Array:
    """run(item, steps of the items before) for every item of this worker, returns the steps; the steps of all of them."""
    worker, workers = lax.axis_index("worker"), problem.workers
    if workers == problem.items:
        return run(worker, 0)
    mine = lax.div(i32(problem.items) - worker + workers - 1, i32(workers))
    return lax.fori_loop(0, mine, lambda i, first: run(worker + i * workers, first), i32(0))


def load_next(problem: Problem, item: Array, load: Any) -> None:
    """The queries of the worker's next item, while the last products of this one are under way."""
    if problem.workers == problem.items:
        return
    plgpu.commit_smem()  # all warps have waited for the matmuls that read the queries
    pl.when(item + problem.workers < problem.items)(lambda: load(item + problem.workers))


def _place(problem: Problem, counts: Any, item: Array, first: Array) -> Place:
    pairs = problem.query_blocks // problem.config.cluster
    group, pair = lax.div(item, i32(pairs)), lax.rem(item, i32(pairs))
    block = pair * problem.config.cluster + lax.axis_index("member")
    head = lax.rem(group, i32(problem.heads))
    tile = lax.div(block, i32(problem.blocks_per_tile))
    row = (i32(0) if problem.shared_table else head, tile)
    return Place(
        batch=lax.div(group, i32(problem.heads)),
        head=head,
        group=group,
        block=block,
        row=row,
        scales=(group, tile),
        first=first,
        steps=counts[row] * problem.blocks_per_tile,
    )


def _key_block(problem: Problem, place: Place, table: Any, step: Array) -> Array:
    """The block of 128 keys of a step: tiles as the table lists them, their blocks in order."""
    blocks = problem.blocks_per_tile
    if blocks == 1:
        return table[(*place.row, step)]
    if blocks & (blocks - 1):
        index, inside = lax.div(step, i32(blocks)), lax.rem(step, i32(blocks))
    else:  # a division of signed numbers costs more than a shift, and ptxas can't know that a step isn't negative
        index, inside = lax.shift_right_logical(step, i32(blocks.bit_length() - 1)), step & (blocks - 1)
    return table[(*place.row, index)] * blocks + inside


def _produce(problem: Problem, place: Place, operands: Any, table: Any, memory: Memory) -> None:
    """Copies K and V of every step into the ring, each as soon as its slot was consumed."""
    stages, cluster = problem.config.stages, problem.config.cluster
    # Each block of a cluster copies half of K and V and multicasts it to both.
    shared: dict[str, Any] = {"collective_axes": "member"} if cluster > 1 else {}

    @pl.loop(0, place.steps)
    def _(step):
        slot, used = place.slot(problem, step), place.first + step >= stages
        keys = pl.ds(_key_block(problem, place, table, step) * BLOCK_KV, BLOCK_KV)
        k_barrier, v_barrier = memory.k_barriers.at[slot], memory.v_barriers.at[slot]
        pl.when(used)(lambda: plgpu.barrier_wait(memory.k_consumed_barriers.at[slot]))
        plgpu.copy_gmem_to_smem(operands.k.at[place.group, keys], memory.k_smem.at[slot], k_barrier, **shared)
        pl.when(used)(lambda: plgpu.barrier_wait(memory.v_consumed_barriers.at[slot]))
        v_smem = memory.v_smem.at[slot, pl.ds(0, problem.head_dim)]
        plgpu.copy_gmem_to_smem(operands.v.at[place.group, :, keys], v_smem, v_barrier, **shared)
        # 8 rows are one row of swizzle tiles and can't be halved: each block copies its own.
        ones_smem = memory.v_smem.at[slot, pl.ds(problem.head_dim, VALID_ROWS)]
        plgpu.copy_gmem_to_smem(operands.key_valid.at[:, keys], ones_smem, v_barrier)


def _consume(
    problem: Problem,
    place: Place,
    operands: Any,
    memory: Memory,
    out: Any,
    lse: Any,
    wg: Array,
    queries_were_read: Callable[[], None],
) -> None:
    """64 query rows: scores, softmax and output of every step, then the division by the row sums."""
    dim = problem.head_dim
    row = place.block * BLOCK_ROWS + wg * BLOCK_Q
    q_smem = memory.q_smem.at[wg]
    to_log2: Any = _LOG2E / math.sqrt(dim)
    if problem.scales:
        to_log2 = to_log2 * operands.q_scale[place.group, place.block * CONSUMERS + wg]

    def score_scales(step):
        """Factors that take products of q and k to scores in log2, one for each group of the key block."""
        if not problem.scales:
            return [to_log2]
        first = step * problem.scales
        return [operands.k_scale[(*place.scales, first + i)] * to_log2 for i in range(problem.scales)]

    def slot_of(step):
        return place.slot(problem, step)

    def softmax(s, scales, top):
        return online_softmax(s, scales, top, problem.log2_p)

    def to_operand(p):
        return to_fp8_operand(p) if problem.scales else p.astype(problem.operand)

    def first_scores(s_acc):
        plgpu.wgmma(s_acc, q_smem, memory.k_smem.at[slot_of(i32(0))].transpose((1, 0)))
        return s_acc[...]

    scales = score_scales(i32(0))
    plgpu.barrier_wait(memory.k_barriers.at[slot_of(i32(0))])
    s = pl.run_scoped(first_scores, _accumulator((BLOCK_Q, BLOCK_KV)))
    plgpu.barrier_arrive(memory.k_consumed_barriers.at[slot_of(i32(0))])
    p, top, shrink = softmax(s, scales, plgpu.layout_cast(jnp.full((BLOCK_Q,), START, f32), ROWS))
    pl.when(place.steps > 1)(lambda: plgpu.barrier_wait(memory.k_barriers.at[slot_of(i32(1))]))
    sums = no_sums(dim, problem.promote_every)

    def step_body(step, carry):
        """Scores and softmax of this step beside P V of the one before."""
        sums, top, p, shrink = carry
        k_slot, v_slot = slot_of(step), slot_of(step - 1)
        scales = score_scales(step)
        sums = before_step(sums, shrink, step, problem.promote_every)

        def meanwhile(s_acc, o_acc):
            plgpu.wgmma(o_acc, p, memory.v_smem.at[v_slot].transpose((1, 0)))
            if problem.config.take_turns:
                plgpu.barrier_arrive(memory.turn_barriers.at[1 - wg])
            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            plgpu.barrier_arrive(memory.k_consumed_barriers.at[k_slot])
            results = softmax(s, scales, top)
            # The branch ends a basic block: without it ptxas moves the wait for P V above the exponentials it should overlap.
            pl.when(step + 1 < place.steps)(lambda: plgpu.barrier_wait(memory.k_barriers.at[slot_of(step + 1)]))
            return lax.optimization_barrier(results)

        def fresh_output(s_acc, o_acc):
            results = meanwhile(s_acc, o_acc)
            return plgpu.wgmma_accumulator_load(o_acc, wait_n=0), *results

        def running_output(s_acc, state):
            o_acc, *results = state
            for ref, value in zip(results, meanwhile(s_acc, o_acc), strict=True):
                ref[...] = value

        def with_scores(s_acc):
            plgpu.wgmma(s_acc, q_smem, memory.k_smem.at[k_slot].transpose((1, 0)))
            if sums.recent is None:
                return pl.run_scoped(functools.partial(fresh_output, s_acc), _accumulator((BLOCK_Q, dim + VALID_ROWS)))
            blank = plgpu.layout_cast(jnp.zeros((BLOCK_Q, BLOCK_KV), f32), plgpu.Layout.WGMMA)
            start = plgpu.WGMMAAccumulatorRef.init(sums.recent)
            return pl.run_state(functools.partial(running_output, s_acc))((start, blank, top, shrink))

        # Before the matmuls, not between them: a branch there would part the zeros of a fresh accumulator from the first P V, into
        # which they fold (34 instructions a step). There is nothing to wait for: V was copied before the K that has arrived.
        plgpu.barrier_wait(memory.v_barriers.at[v_slot])
        if problem.config.take_turns:
            plgpu.barrier_wait(memory.turn_barriers.at[wg])
        recent, p, top, new_shrink = pl.run_scoped(with_scores, _accumulator((BLOCK_Q, BLOCK_KV)))
        plgpu.barrier_arrive(memory.v_consumed_barriers.at[v_slot])
        # Converted after the wait for P V: before it, ptxas serializes every wgmma (C7513).
        return after_step(sums, recent, shrink), top, to_operand(p), new_shrink

    sums, top, p, shrink = lax.fori_loop(1, place.steps, step_body, (sums, top, to_operand(p), shrink))
    queries_were_read()
    last = slot_of(place.steps - 1)

    def last_output(o_acc):
        plgpu.wgmma(o_acc, p, memory.v_smem.at[last].transpose((1, 0)))
        return o_acc[...]

    plgpu.barrier_wait(memory.v_barriers.at[last])
    pv = pl.run_scoped(last_output, _accumulator((BLOCK_Q, dim + VALID_ROWS)))
    acc = sums.total() * over_rows(shrink, pv.shape) + pv
    plgpu.barrier_arrive(memory.v_consumed_barriers.at[last])
    _finish(problem, place, operands, memory, acc, top, row, out, lse, wg)


def _finish(
    problem: Problem,
    place: Place,
    operands: Any,
    memory: Memory,
    acc: Array,
    top: Array,
    row: Array,
    out: Any,
    lse: Any,
    wg: Array,
) -> None:
    """Output and log-sum-exp of a consumer's rows to global memory."""
    dim = problem.head_dim
    total = acc[:, dim:].max(axis=1)  # the extra columns are equal: each the row sums of the rounded P over valid keys
    valid = plgpu.load(operands.query_valid.at[pl.ds(row, BLOCK_Q)], layout=ROWS, optimized=False) > 0
    o = acc[:, :dim] * over_rows(1 / total, (BLOCK_Q, dim))
    if problem.scales:
        v_scale = plgpu.load(operands.v_scale.at[place.group], layout=_COLUMNS, optimized=False)
        o *= lax.broadcast_in_dim(v_scale, (BLOCK_Q, dim), [1])
    # Selected, not multiplied: a NaN scale of the tile must not reach its padded rows.
    o = jnp.where(over_rows(valid, o.shape), o, 0.0)
    if problem.workers < problem.items:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before is stored from here
    memory.o_smem[wg] = o.astype(problem.dtype)
    if lse is not None:
        natural = (top + jnp.log2(total) - problem.log2_p) * math.log(2)
        memory.lse_smem[wg] = jnp.where(valid, natural, 0.0)
    plgpu.commit_smem()
    rows = pl.ds(row, BLOCK_Q)
    plgpu.copy_smem_to_gmem(memory.o_smem.at[wg], out.at[place.batch, rows, place.head])
    if lse is not None:
        plgpu.copy_smem_to_gmem(memory.lse_smem.at[wg], lse.at[place.batch, place.head, rows])
