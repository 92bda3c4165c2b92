"""Attention: the only place that chooses an implementation."""

import functools
import logging
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fps_jax.attention.chunked import chunked_attention
from fps_jax.attention.plan import AttentionPlan
from fps_jax.attention.tiles import TileLayout
from fps_jax.choices import check_choice
from pallas_kernels.block_sparse import SAVED, block_sparse_attention, check_operands, gathered
from pallas_kernels.pattern import TilePattern
from pallas_kernels.platform import target_platform

Implementation = Literal["auto", "dense", "reference", "portable", "sm90"]

log = logging.getLogger("fps_jax")


class TokenAttention(Protocol):
    """The attention of a DiT: the token order that it wants, what a block calls, and where activations lie.

    layout: tokens come in this tile order, padded; None for raster order. Called with q, k, v `[B, S, N, H]`, softmax scale
    H**-0.5, output in q's dtype; `layer` is the block's index (int32, traced); `taps` takes named intermediates, or is None.
    """

    @property
    def layout(self) -> TileLayout | None: ...

    def __call__(self, q: Array, k: Array, v: Array, /, *, layer: Array, taps: dict[str, Array] | None) -> Array: ...

    def cross(self, q: Array, k: Array, v: Array) -> Array:
        """Attention to text or image tokens, which have no order: q `[B, S, N, H]`, k and v `[B, T, N, H]`."""
        return dense_attention(q, k, v)

    def place(self, x: Array, *, tokens: bool = True, samples: bool = True) -> Array:
        """Activations `[B, S, ...]` where they should lie on a mesh.

        tokens: they may be shared out where the mesh divides them. samples: these too; what is small is better whole everywhere.
        """
        return x

    def place_text(self, x: Array) -> Array:
        """Embedded text `[B, T, D]` where `cross` wants keys and values to be made of it."""
        return x


@dataclass(frozen=True)
class DenseAttention(TokenAttention):
    """Every token attends every token, in raster order."""

    layout: TileLayout | None = None

    def __call__(self, q: Array, k: Array, v: Array, /, *, layer: Array, taps: dict[str, Array] | None) -> Array:
        return dense_attention(q, k, v, name=SAVED)


@dataclass(frozen=True)
class PlannedAttention(TokenAttention):
    """`attend` with one plan in every layer, apart from `dense_layers`, which attend everything without rounding."""

    plan: AttentionPlan
    dense_layers: tuple[int, ...] = ()
    implementation: Implementation = "auto"

    @property
    def layout(self) -> TileLayout:
        return self.plan.layout

    def __call__(self, q: Array, k: Array, v: Array, /, *, layer: Array, taps: dict[str, Array] | None) -> Array:
        _check_tokens(q, k, self.layout)
        return self.rows(q, k, v, self.plan.pattern, layer=layer)

    def rows(
        self, q: Array, k: Array, v: Array, pattern: TilePattern, *, layer: Array, over: str | None = None
    ) -> Array:
        """The same for some of the query tiles, those of `pattern`; k and v are whole, or shared out `over` a mesh axis."""
        planned = functools.partial(
            _attend, plan=self.plan, pattern=pattern, implementation=self.implementation, over=over
        )
        if not self.dense_layers:
            return planned(q, k, v)
        dense = functools.partial(_attend, plan=self.plan.dense(), pattern=pattern, over=over)
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
    if not isinstance(plan, AttentionPlan):
        raise ValueError(f"plan is a {type(plan).__name__}; make one with AttentionPlan.build(grid=(F, Y, X))")
    check_choice("implementation", implementation, Implementation)
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_operands(q, k, v)
    _check_tokens(q, k, plan.layout)
    return _attend(q, k, v, plan=plan, pattern=plan.pattern, implementation=implementation)


def _check_tokens(q: Array, k: Array, layout: TileLayout) -> None:
    if q.shape[1] != layout.num_stored or k.shape[1] != layout.num_stored:
        raise ValueError(
            f"q has {q.shape[1]} and k {k.shape[1]} tokens; this plan of grid {layout.grid} stores {layout.num_stored}: "
            "pass plan.to_tiles(q), plan.to_tiles(k), plan.to_tiles(v)"
        )


def _attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    plan: AttentionPlan,
    pattern: TilePattern,
    implementation: Implementation = "auto",
    over: str | None = None,
) -> Array:
    """`attend` for the query tiles of `pattern`, which is the plan's or some rows of it."""
    if plan.per_head and pattern.key_tiles.shape[0] != q.shape[2]:
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
        if over is not None:
            k, v = gathered(k, over), gathered(v, over)
        return _dense_in_tiles(q, k, v, plan.layout, pattern.q_valid)
    return block_sparse_attention(q, k, v, pattern, implementation=implementation, over=over)


@functools.cache  # said once
def _log_choice(name: str) -> None:
    log.info("self-attention of a whole-grid, unquantized plan runs as %r", name)


def _dense_in_tiles(q: Array, k: Array, v: Array, layout: TileLayout, q_valid: Array) -> Array:
    """Queries stay in tile order; keys and values lose their padding, which spares the fused kernel a mask."""
    valid, slots = q_valid[None, :, None, None], slice(layout.num_stored)
    # Padded queries are replaced before and after: whatever they hold reaches no output and no gradient.
    k, v = layout.from_tiles(k[:, slots]), layout.from_tiles(v[:, slots])
    out = dense_attention(jnp.where(valid, q, 0), k, v, name=SAVED)
    return jnp.where(valid, out, 0)


def dense_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B K N H"],
    v: Float[Array, "B K N H"],
    key_mask: Bool[Array, "B K"] | None = None,
    *,
    name: str | None = None,
) -> Float[Array, "B Q N H"]:
    """Softmax attention over all keys, scale H**-0.5, softmax in float32, output in q's dtype. Memory is linear in tokens.

    cuDNN's fused kernel for 16-bit inputs on a GPU, elsewhere `chunked_attention`.

    Args:
      key_mask: true where a key is attended; hides padded keys.
      name: of output and log-sum-exp to policies of `jax.checkpoint`; cuDNN's have none.
    """
    if target_platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return chunked_attention(q, k, v, key_mask, name=name)


_keeps_named = jax.checkpoint_policies.save_only_these_names(SAVED)


def keeps_attention(primitive: Any, *avals: Any, **parameters: Any) -> bool:
    """Policy of `jax.checkpoint`: keep output and log-sum-exp of self-attention, so that a gradient doesn't run it again.

    cuDNN's have no name and are known by the operation that computes them, which is cross-attention's too.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper" or _keeps_named(primitive, *avals, **parameters)
