"""Block-sparse attention forward for Hopper (sm_90a), in FP8 or bf16: Pallas Mosaic GPU.

A thread block computes 128 query rows of one head over the key blocks that a table lists: one warpgroup copies (TMA), two compute
64 rows each, and while their tensor cores multiply for one key block they exponentiate for another (FlashAttention-3's overlap,
arXiv 2407.08608). The program of a thread block is `body`; docs/kernels.md explains the whole.

Source: FPSAttention (arXiv 2506.04648) section 3 for what is computed; `pallas_kernels.reference.attention` is its specification.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pattern import TilePattern
from pallas_kernels.platform import multiprocessors, target_device, target_platform
from pallas_kernels.reference import KeyValueCodes
from pallas_kernels.sm90 import quantize, tuned
from pallas_kernels.sm90.body import body
from pallas_kernels.sm90.call_shape import CallShape
from pallas_kernels.sm90.config import BLOCK_KV, BLOCK_ROWS, CONSUMERS, ForwardConfig
from pallas_kernels.sm90.work import Problem, scratch


def forward(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    pattern: TilePattern,
    *,
    config: ForwardConfig | None = None,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B N Sq"]]:
    """As `pallas_kernels.reference.attention`, with P rounded against the running maximum, as `portable.forward` has it.

    A key tile that is listed must hold a valid key (tile layouts always do): K of one without reads as 0, whose score could
    become a row's maximum and cost P its precision.

    Args:
      config: None for the tuned one (`pallas_kernels.sm90.tuned`).
    Raises: NotImplementedError for what the kernel doesn't do (`CallShape.unsupported`); ValueError for a config that doesn't fit.
    """
    call = CallShape.of(pattern, head_dim=q.shape[3], dtype=q.dtype)
    reason = call.unsupported()
    if reason is not None:
        raise NotImplementedError(f"implementation='sm90': {reason}")
    operands = quantize.quantize(q, k, v, pattern)
    if config is None:
        config = tuned.choose_config(call)
    return attention(operands, pattern, batch=q.shape[0], dtype=q.dtype, config=config)


def forward_to_codes(
    q: Float[Array, "B Sq N H"], codes: KeyValueCodes, pattern: TilePattern
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B N Sq"]]:
    """`forward` to keys and values that are rounded already."""
    config = tuned.choose_config(CallShape.of(pattern, head_dim=q.shape[3], dtype=q.dtype))
    return attention(quantize.to_codes(q, codes, pattern), pattern, batch=q.shape[0], dtype=q.dtype, config=config)


def missing_device() -> str | None:
    """Why the kernel can't run on JAX's default device; None on one of compute capability 9.0."""
    device = target_device()
    capability = getattr(device, "compute_capability", None)
    if target_platform() != "gpu" or capability != "9.0":
        found = device.platform if capability is None else f"{device.device_kind} ({capability})"
        return f"needs an NVIDIA GPU of compute capability 9.0 (H100, H200), found {found}; use 'portable'"
    return None


@functools.partial(jax.jit, static_argnames=("batch", "dtype", "config", "with_lse"))
def attention(
    operands: quantize.Operands,
    pattern: TilePattern,
    *,
    batch: int,
    dtype: Any,
    config: ForwardConfig,
    with_lse: bool = True,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B N Sq"] | None]:
    """The kernel itself, on operands that `quantize` made.

    Args:
      pattern: its table, of which what lies outside is clipped, to the keys there are and to counts of 1 and more.
      dtype: of the output.
      with_lse: False leaves the log-sum-exp out, and None in its place.
    """
    key_tiles, tile_size = pattern.key_tiles, pattern.tile_size
    groups, seq, head_dim = operands.q.shape
    scales = 0
    if operands.k_scale is not None:
        scales = operands.k_scale.shape[1] * BLOCK_KV // operands.k.shape[1]
    problem = Problem(
        batch=batch,
        heads=groups // batch,
        head_dim=head_dim,
        query_blocks=seq // BLOCK_ROWS,
        workers=_workers(groups * (seq // BLOCK_ROWS), config),
        blocks_per_tile=tile_size // BLOCK_KV,
        shared_table=key_tiles.ndim == 2,
        scales=scales,
        value_groups=pattern.tokens_per_value_scale is not None,
        dtype=dtype,
        operand=operands.q.dtype,
        config=config,
    )
    if problem.blocks_per_tile % config.cluster:
        raise ValueError(
            f"cluster={config.cluster} doesn't divide the {problem.blocks_per_tile} blocks of a tile of {tile_size}; use 1"
        )
    if config.polynomial_columns and not scales:
        raise ValueError(
            f"polynomial_columns={config.polynomial_columns} is for FP8, and these operands are {operands.q.dtype}; use 0"
        )
    CallShape.of(pattern, head_dim=head_dim, dtype=jnp.dtype(dtype)).check_fits(config)
    k_tiles = operands.k.shape[1] // tile_size
    # A copy from beyond the keys, or a row without a key, would hang the GPU. Tables that are traced can't be refused.
    key_tiles, counts = jnp.clip(key_tiles, 0, k_tiles - 1), jnp.clip(pattern.counts, 1, key_tiles.shape[-1])
    table = key_tiles.reshape(-1, *key_tiles.shape[-2:])  # a single table where heads share it
    out_types = [
        jax.ShapeDtypeStruct((batch, seq, problem.heads, head_dim), dtype),
        jax.ShapeDtypeStruct((batch, problem.heads, seq), jnp.float32),
    ]
    if operands.k_scale is not None:
        operands = operands._replace(k_scale=_scales_by_step(operands.k_scale, key_tiles, k_tiles, batch))
    inputs = [x for x in operands if x is not None]
    if pattern.tokens_per_value_scale is not None:
        inputs.append(table // (pattern.tokens_per_value_scale // tile_size))
    kernel = plgpu.kernel(
        functools.partial(body, problem, len(inputs), with_lse),
        out_type=out_types if with_lse else out_types[:1],
        scratch_types=scratch(problem),
        grid=(problem.workers,),
        grid_names=("worker",),
        cluster=(config.cluster,),
        cluster_names=("member",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        # approx_math: exp2 as one instruction. The barriers are ours: the automatic ones would serialize the matmuls.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    out, *lse = kernel(*inputs, table, counts.reshape(table.shape[:2]))
    return out, lse[0] if with_lse else None


def _workers(blocks: int, config: ForwardConfig) -> int:
    """Clusters to launch: one for each item, or as many as the GPU runs at a time."""
    items = blocks // config.cluster
    return min(items, max(1, multiprocessors() // config.cluster)) if config.persistent else items


def _scales_by_step(k_scale: Array, key_tiles: Array, k_tiles: int, batch: int) -> Array:
    """Scales of K in the order in which the rows of the table use them: [G, Tq, K * scales of a tile].

    A consumer would otherwise read the table and then the scale that it points to, and wait for both between two matmuls.
    """
    tiles = k_scale.reshape(batch, -1, k_tiles, k_scale.shape[1] // k_tiles)
    take = jax.vmap(
        lambda scales, table: jnp.take(scales, table, axis=1, mode="clip"), (1, 0 if key_tiles.ndim == 3 else None), 1
    )
    return take(tiles, key_tiles).reshape(k_scale.shape[0], key_tiles.shape[-2], -1)
