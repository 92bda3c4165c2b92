"""Online softmax of a consumer warpgroup of `fwd_sm90`: P of a key block, and sums that are rescaled only where a maximum moved.

Row maxima are rounded up to powers of two (`reference.row_top`): they seldom move, and where they do, sums change exactly.
"""

from typing import NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import any_in_warp_is_not_1
from pallas_kernels.tuning import BLOCK_KV, BLOCK_Q, VALID_ROWS

ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of an accumulator
# Below any score, and finite: the first step's exp2(start - top) is then 0, not NaN, even where a score is -inf.
START = -1e30


class Sums(NamedTuple):
    """P V of the steps so far, row sums beside it: `recent` and, in FP8, `promoted` times `factor` (a value for each row).

    The tensor cores add up FP8 products with fewer bits than float32 has. A few steps are theirs (`recent`); those before are added
    up in float32 registers (`promoted`), relative to the maximum of an earlier step.
    """

    recent: Float[Array, "M H+8"]
    promoted: Float[Array, "M H+8"] | None = None
    factor: Float[Array, "M"] | None = None

    def total(self) -> Float[Array, "M H+8"]:
        if self.promoted is None or self.factor is None:
            return self.recent
        return self.promoted * over_rows(self.factor, self.promoted.shape) + self.recent


def no_sums(head_dim: int, *, promoting: bool) -> Sums:
    zeros = plgpu.layout_cast(jnp.zeros((BLOCK_Q, head_dim + VALID_ROWS), jnp.float32), plgpu.Layout.WGMMA)
    if not promoting:
        return Sums(zeros)
    return Sums(zeros, zeros, plgpu.layout_cast(jnp.ones(BLOCK_Q, jnp.float32), ROWS))


def rescaled(sums: Sums, shrink: Float[Array, "M"], step: Int[Array, ""], promote_every: int) -> Sums:
    """Sums relative to a new maximum, `shrink` of the old one. Most steps of a warp have nothing to do."""
    moved = any_in_warp_is_not_1(shrink) != 0
    if sums.promoted is None:
        return lax.cond(moved, lambda: Sums(sums.recent * over_rows(shrink, sums.recent.shape)), lambda: sums)
    # Recent sums have no factor of their own: they are promoted before the maximum moves. So one branch does for both.
    due = step & (promote_every - 1) == 0
    zeros = no_sums(sums.recent.shape[1] - VALID_ROWS, promoting=False).recent
    return lax.cond(moved | due, lambda: Sums(zeros, sums.total(), shrink), lambda: sums)


def online_softmax(
    s: Float[Array, "M keys"], scales: list[Array], top: Float[Array, "M"], log2_p: float
) -> tuple[Float[Array, "M keys"], Float[Array, "M"], Float[Array, "M"]]:
    """(P times 2**log2_p, new tops, the factor by which earlier sums shrink) of a block of products.

    Args:
      scales: take products to scores in log2: one for all keys, or one for each half.
      top: `reference.row_top` of the scores so far, in log2: whole numbers, `START` before the first block.
    """
    parts = [s] if len(scales) == 1 else [s[:, : BLOCK_KV // 2], s[:, BLOCK_KV // 2 :]]
    new_top = top
    for part, scale in zip(parts, scales, strict=True):
        new_top = jnp.maximum(new_top, part.max(axis=1) * scale)
    new_top = _ceil(new_top)
    shift = new_top - log2_p
    p = [jnp.exp2(part * scale - over_rows(shift, part.shape)) for part, scale in zip(parts, scales, strict=True)]
    return p[0] if len(p) == 1 else jnp.concatenate(p, axis=1), new_top, jnp.exp2(top - new_top)


def over_rows(x: Float[Array, "M"], shape: tuple[int, ...]) -> Float[Array, "M N"]:
    """A value for each row, as an array of this shape."""
    return lax.broadcast_in_dim(x, shape, [0])


def _ceil(x: Array) -> Array:
    nearest = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)  # the only rounding that Mosaic has
    return jnp.where(nearest < x, nearest + 1, nearest)
