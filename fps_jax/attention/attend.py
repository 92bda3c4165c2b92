"""Attention: the only place that chooses an implementation."""

import functools
import logging
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fps_jax.attention.plan import AttentionPlan
from fps_jax.attention.tiles import TileLayout
from pallas_kernels.block_sparse import block_sparse_attention, check_operands
from pallas_kernels.platform import target_platform

# Scores held at a time off the GPU: memory stays linear in tokens, and more gains nothing (2 to 128 MB are alike on a CPU).
_CHUNK_BYTES = 64 * 2**20

Implementation = Literal["auto", "dense", "reference", "portable", "sm90"]

log = logging.getLogger("fps_jax")


class TokenAttention(Protocol):
    """The self-attention of a DiT: the token order it wants, and what a block calls.

    layout: tokens come in this tile order, padded; None for raster order. Called with q, k, v `[B, S, N, H]`, softmax scale
    H**-0.5, output in q's dtype; `layer` is the block's index (int32, traced); `taps` takes named intermediates, or is None.
    """

    @property
    def layout(self) -> TileLayout | None: ...

    def __call__(self, q: Array, k: Array, v: Array, /, *, layer: Array, taps: dict[str, Array] | None) -> Array: ...


@dataclass(frozen=True)
class DenseAttention:
    """Every token attends every token, in raster order."""

    layout: TileLayout | None = None

    def __call__(self, q: Array, k: Array, v: Array, /, *, layer: Array, taps: dict[str, Array] | None) -> Array:
        return dense_attention(q, k, v)


@dataclass(frozen=True)
class PlannedAttention:
    """`attend` with one plan in every layer, apart from `dense_layers`, which attend everything without rounding."""

    plan: AttentionPlan
    dense_layers: tuple[int, ...] = ()
    implementation: Implementation = "auto"

    @property
    def layout(self) -> TileLayout:
        return self.plan.layout

    def __call__(self, q: Array, k: Array, v: Array, /, *, layer: Array, taps: dict[str, Array] | None) -> Array:
        planned = functools.partial(attend, plan=self.plan, implementation=self.implementation)
        if not self.dense_layers:
            return planned(q, k, v)
        dense = functools.partial(attend, plan=self.plan.dense())
        is_dense = (jnp.array(self.dense_layers, jnp.int32) == layer[None]).any()
        return jax.lax.cond(is_dense, dense, planned, q, k, v)


def attend(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    plan: AttentionPlan,
    implementation: Implementation = "auto",
) -> Float[Array, "B S N H"]:
    """Self-attention by a plan: block-sparse, FP8, both or neither; softmax scale H**-0.5. Differentiable, memory linear in tokens.

    Args:
      q, k, v: one dtype of float32, bf16, f16; tokens in tile order (`plan.to_tiles`), head dim a multiple of 16. Padded slots may
        hold anything.
      plan: from `AttentionPlan.build`, made once and outside jit.
      implementation: 'dense' (this device's fused dense attention; for a plan that is), 'reference' (specification; all pairs of
        tokens in memory), 'portable' (plain XLA, any device), 'sm90' (Hopper kernel), or 'auto': the fastest that runs here.
    Returns: q's dtype, tile order, 0 at padded slots.
    Raises: ValueError for operands that don't fit the plan; NotImplementedError for an implementation that can't run here.
    Source: FPSAttention (arXiv 2506.04648) section 3.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_operands(q, k, v)
    layout = plan.layout
    if q.shape[1] != layout.num_stored or k.shape[1] != layout.num_stored:
        raise ValueError(
            f"q has {q.shape[1]} and k {k.shape[1]} tokens; this plan of grid {plan.grid} stores {layout.num_stored}: "
            "pass plan.to_tiles(q), plan.to_tiles(k), plan.to_tiles(v)"
        )
    if plan.per_head and len(plan.windows) != q.shape[2]:
        raise ValueError(
            f"plan has windows for {len(plan.windows)} heads, q has {q.shape[2]} heads; give one a head, or one for all"
        )
    is_dense = plan.whole_grid and not plan.quantize
    if implementation == "dense" and not is_dense:
        what = "quantizes" if plan.quantize else "has a window"
        raise ValueError(
            f"implementation='dense' attends everything unrounded, and this plan {what}; use 'auto' or another plan"
        )
    if implementation == "dense" or (implementation == "auto" and is_dense):
        _log_choice("dense")
        return _dense_in_tiles(q, k, v, layout)
    return block_sparse_attention(q, k, v, plan.pattern, implementation=implementation)


@functools.cache  # said once
def _log_choice(name: str) -> None:
    log.info("self-attention of a whole-grid, unquantized plan runs as %r", name)


def _dense_in_tiles(q: Array, k: Array, v: Array, layout: TileLayout) -> Array:
    """Queries stay in tile order; keys and values lose their padding, which spares the fused kernel a mask."""
    valid = jnp.asarray(layout.valid)[None, :, None, None]
    # Padded queries are replaced before and after: whatever they hold reaches no output and no gradient.
    out = dense_attention(jnp.where(valid, q, 0), layout.from_tiles(k), layout.from_tiles(v))
    return jnp.where(valid, out, 0)


def dense_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B K N H"],
    v: Float[Array, "B K N H"],
    key_mask: Bool[Array, "B K"] | None = None,
) -> Float[Array, "B Q N H"]:
    """Softmax attention over all keys, scale H**-0.5, softmax in float32, output in q's dtype.

    cuDNN's fused kernel for 16-bit inputs on a GPU; elsewhere plain XLA over chunks of queries, so that memory stays linear
    in tokens. `key_mask` (true: attend) hides padded keys.
    """
    if target_platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return _chunked(q, k, v, key_mask)


def _chunked(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    chunk = max(64, _CHUNK_BYTES // (4 * keys * heads * batch))
    k = k.transpose(0, 2, 3, 1)  # [B, N, H, K]: matmul-ready once, not once a chunk
    v = v.transpose(0, 2, 1, 3)
    bias = None if key_mask is None else jnp.where(key_mask, 0.0, -jnp.inf).astype(jnp.float32)[:, None, None, :]

    @jax.checkpoint  # else the scores of all chunks are kept for the backward
    def attend_chunk(block):  # [B, N, q, H]
        scores = jnp.matmul(block, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        if bias is not None:
            scores = scores + bias
        scores = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = jnp.matmul(scores.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / scores.sum(-1, keepdims=True)).astype(q.dtype)

    if queries <= chunk:
        return attend_chunk(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    num_chunks = -(-queries // chunk)
    chunk = -(-queries // num_chunks)
    padded = jnp.pad(q, ((0, 0), (0, num_chunks * chunk - queries), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, num_chunks, chunk, heads, head_dim).transpose(1, 0, 3, 2, 4)
    out = jax.lax.map(attend_chunk, blocks)  # [C, B, N, q, H]
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, head_dim)[:, :queries]
