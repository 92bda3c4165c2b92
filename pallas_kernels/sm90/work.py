"""What a thread block of `forward` has and does: its arrays and barriers, and the rows of queries that are its work."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.reference import FP8_MAX
from pallas_kernels.sm90.config import BLOCK_KV, BLOCK_Q, CONSUMERS, VALID_ROWS, ForwardConfig
from pallas_kernels.sm90.shared_memory import swizzled

f32, i32 = jnp.float32, jnp.int32


class Problem(NamedTuple):
    """The static side of a launch.

    workers: clusters that are launched, each for the items `worker`, `worker + workers`, ...; an item is a head's block of query
      rows, or two of them in a cluster of two.
    scales: of K in a key block, 0 without quantization. value_groups: V has scales for groups of tokens.
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
    value_groups: bool
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


class Block(NamedTuple):
    """What every warpgroup of a thread block has: the launch, arrays in global memory (`lse` may be None), shared memory."""

    problem: Problem
    operands: Any  # `Operands` of references
    value_groups: Any  # of each key tile of the table; may be None
    table: Any
    counts: Any
    out: Any
    lse: Any
    memory: Memory


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
    first: Array | int
    steps: Array

    def slot(self, problem: Problem, step: Array) -> Array:
        """Of the ring of key blocks."""
        return (self.first + step) & (problem.config.stages - 1)


def place_of(block: Block, item: Array, first: Array | int) -> Place:
    """Where an item is; `first` as `Place` has it."""
    problem = block.problem
    pairs = problem.query_blocks // problem.config.cluster
    group, pair = lax.div(item, i32(pairs)), lax.rem(item, i32(pairs))
    query_block = pair * problem.config.cluster + lax.axis_index("member")
    head = lax.rem(group, i32(problem.heads))
    tile = lax.div(query_block, i32(problem.blocks_per_tile))
    row = (i32(0) if problem.shared_table else head, tile)
    return Place(
        batch=lax.div(group, i32(problem.heads)),
        head=head,
        group=group,
        block=query_block,
        row=row,
        scales=(group, tile),
        first=first,
        steps=block.counts[row] * problem.blocks_per_tile,
    )


def each_item(problem: Problem, run: Callable[[Array, Any], Array]) -> Array:
    """Calls run(item, steps of the items before), which returns the steps up to its end, for every item of this worker.

    Returns: the steps of all of them.
    """
    worker, workers = lax.axis_index("worker"), problem.workers
    if workers == problem.items:
        return run(worker, 0)
    mine = lax.div(i32(problem.items) - worker + workers - 1, i32(workers))
    return lax.fori_loop(0, mine, lambda i, first: run(worker + i * workers, first), i32(0))


def load_next(problem: Problem, item: Array, load: Callable[[Array], None]) -> None:
    """The queries of the worker's next item, while the last products of this one are under way."""
    if problem.workers == problem.items:
        return
    plgpu.commit_smem()  # all warps have waited for the matmuls that read the queries
    pl.when(item + problem.workers < problem.items)(lambda: load(item + problem.workers))
