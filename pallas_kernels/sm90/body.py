"""The program of one thread block of `forward`: a warpgroup that copies, here, and two that compute, in `consumer`."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.sm90.config import BLOCK_KV, BLOCK_Q, BLOCK_ROWS, CONSUMERS, VALID_ROWS
from pallas_kernels.sm90.consumer import consume
from pallas_kernels.sm90.quantize import Operands
from pallas_kernels.sm90.work import Block, Memory, Place, Problem, each_item, load_next, place_of


def body(problem: Problem, num_inputs: int, with_lse: bool, *refs: Any) -> None:
    """What every warpgroup runs. `refs`: the operands that there are, V's groups, table, counts, output, log-sum-exp, `Memory`."""
    given = [*refs[:num_inputs], *(None,) * (len(Operands._fields) + 1 - num_inputs)]
    operands: Any = Operands(*given[:-1])
    table, counts, out, *rest = refs[num_inputs:]
    lse = rest.pop(0) if with_lse else None
    block = Block(problem, operands, given[-1], table, counts, out, lse, Memory(*rest))
    wg = lax.axis_index("wg")

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(problem.config.consumer_registers, action="increase")
        _consumer(block, wg)

    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(problem.config.producer_registers, action="decrease")
        _copier(block)


def _consumer(block: Block, wg: Array) -> None:
    problem, memory = block.problem, block.memory
    q_barrier, q_smem = memory.q_barriers.at[wg], memory.q_smem.at[wg]

    def load_queries(item, first):
        place = place_of(block, item, first)
        rows = pl.ds(place.block * BLOCK_ROWS + wg * BLOCK_Q, BLOCK_Q)
        plgpu.copy_gmem_to_smem(block.operands.q.at[place.group, rows], q_smem, q_barrier)

    def item_body(item, first):
        place = place_of(block, item, first)
        plgpu.barrier_wait(q_barrier)
        consume(block, place, wg, lambda: load_next(problem, item, lambda item: load_queries(item, first)))
        return first + place.steps

    if problem.config.take_turns:
        pl.when(wg == 1)(lambda: plgpu.barrier_arrive(memory.turn_barriers.at[0]))
    load_queries(lax.axis_index("worker"), jnp.int32(0))
    each_item(problem, item_body)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # shared memory must outlive its readers; what they wrote lasts


def _copier(block: Block) -> None:
    stages, memory = block.problem.config.stages, block.memory

    def item_body(item, first):
        place = place_of(block, item, first)
        _copy_keys(block, place)
        return first + place.steps

    steps = each_item(block.problem, item_body)

    # Every phase of every barrier is waited for: a block of a cluster must not end before its peer's last arrivals here.
    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        plgpu.barrier_wait(memory.k_consumed_barriers.at[step & (stages - 1)])
        plgpu.barrier_wait(memory.v_consumed_barriers.at[step & (stages - 1)])


def _copy_keys(block: Block, place: Place) -> None:
    """Copies K and V of every step into the ring, each as soon as its slot was consumed."""
    problem, operands, memory = block.problem, block.operands, block.memory
    stages, cluster = problem.config.stages, problem.config.cluster
    # Each block of a cluster copies half of K and V and multicasts it to both.
    shared: dict[str, Any] = {"collective_axes": "member"} if cluster > 1 else {}

    @pl.loop(0, place.steps)
    def _(step):
        slot, used = place.slot(problem, step), place.first + step >= stages
        keys = pl.ds(_key_block(block, place, step) * BLOCK_KV, BLOCK_KV)
        k_barrier, v_barrier = memory.k_barriers.at[slot], memory.v_barriers.at[slot]
        pl.when(used)(lambda: plgpu.barrier_wait(memory.k_consumed_barriers.at[slot]))
        plgpu.copy_gmem_to_smem(operands.k.at[place.group, keys], memory.k_smem.at[slot], k_barrier, **shared)
        pl.when(used)(lambda: plgpu.barrier_wait(memory.v_consumed_barriers.at[slot]))
        v_smem = memory.v_smem.at[slot, pl.ds(0, problem.head_dim)]
        plgpu.copy_gmem_to_smem(operands.v.at[place.group, :, keys], v_smem, v_barrier, **shared)
        # 8 rows are one row of swizzle tiles and can't be halved: each block copies its own.
        ones_smem = memory.v_smem.at[slot, pl.ds(problem.head_dim, VALID_ROWS)]
        plgpu.copy_gmem_to_smem(operands.key_valid.at[:, keys], ones_smem, v_barrier)


def _key_block(block: Block, place: Place, step: Array) -> Array:
    """The block of 128 keys of a step: tiles as the table lists them, their blocks in order."""
    blocks, table = block.problem.blocks_per_tile, block.table
    if blocks == 1:
        return table[(*place.row, step)]
    if blocks & (blocks - 1):
        index, inside = lax.div(step, jnp.int32(blocks)), lax.rem(step, jnp.int32(blocks))
    else:  # a division of signed numbers costs more than a shift, and ptxas can't know that a step isn't negative
        index, inside = lax.shift_right_logical(step, jnp.int32(blocks.bit_length() - 1)), step & (blocks - 1)
    return table[(*place.row, index)] * blocks + inside
