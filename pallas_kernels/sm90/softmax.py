"""Online softmax of a consumer warpgroup of `forward`: P of a key block, and sums that are rescaled only where a maximum moved.

Row maxima are rounded up to powers of two (`reference.row_top`): they seldom move, and where they do, sums change exactly.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.sm90.config import BLOCK_KV, BLOCK_Q, VALID_ROWS
from pallas_kernels.sm90.registers import any_in_warp_is_not_1, exp2, next_tops

ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of an accumulator
# Below any score, and finite: the first step's exp2(start - top) is then 0, not NaN, even where a score is -inf.
START = -1e30


class Sums(NamedTuple):
    """P V of the steps so far, row sums beside it: `recent` plus `promoted` times `factor` (a value for each row), what there is.

    The tensor cores add up FP8 products with fewer bits than float32 has. So only the most recent steps are theirs (`recent`), none
    where every step is promoted. Those before are added up in float32 registers (`promoted`), relative to the maximum of then.
    Without FP8 all steps are the tensor cores'.
    """

    recent: Float[Array, "M H+8"] | None
    promoted: Float[Array, "M H+8"] | None
    factor: Float[Array, "M"] | None

    def total(self) -> Float[Array, "M H+8"]:
        """The whole sum, relative to the maximum of the last step that is in it."""
        if self.promoted is None or self.recent is None:
            return self.recent if self.promoted is None else self.promoted  # pyright: ignore[reportReturnType]
        return _by_row(self.promoted, self.factor) + self.recent

    def times(self, factor: Float[Array, "M H+8"]) -> "Sums":
        """All of it, multiplied."""
        recent, promoted = (None if x is None else x * factor for x in (self.recent, self.promoted))
        return self._replace(recent=recent, promoted=promoted)


def no_sums(head_dim: int, promote_every: int | None) -> Sums:
    """Where a row of key blocks starts. `promote_every`: of the config, None without FP8."""
    zeros = zero_sums(head_dim)
    if promote_every is None:
        return Sums(zeros, None, None)
    if promote_every == 1:
        return Sums(None, zeros, None)
    return Sums(zeros, zeros, plgpu.layout_cast(jnp.ones(BLOCK_Q, jnp.float32), ROWS))


def zero_sums(head_dim: int) -> Float[Array, "M H+8"]:
    return plgpu.layout_cast(jnp.zeros((BLOCK_Q, head_dim + VALID_ROWS), jnp.float32), plgpu.Layout.WGMMA)


def before_step(sums: Sums, shrink: Float[Array, "M"], step: Int[Array, ""], promote_every: int | None) -> Sums:
    """Rescaled for a new maximum, of which the old one is `shrink`. Most steps of a warp have nothing to do: it seldom moves."""
    if sums.recent is None:
        return sums  # `after_step` does it: a multiply-add does both
    moved = any_in_warp_is_not_1(shrink) != 0
    if sums.promoted is None:
        return lax.cond(moved, lambda: sums._replace(recent=_by_row(sums.recent, shrink)), lambda: sums)
    # Recent sums have no factor of their own: they are promoted before the maximum moves. So one branch does for both.
    due = lax.rem(step, jnp.int32(promote_every or 1)) == 0
    return lax.cond(moved | due, lambda: _promoted(sums, shrink), lambda: sums)


def _promoted(sums: Sums, shrink: Array) -> Sums:
    whole = sums.total()
    return Sums(jnp.zeros_like(whole), whole, shrink)


def after_step(sums: Sums, recent: Float[Array, "M H+8"], shrink: Float[Array, "M"]) -> Sums:
    """With the tensor cores' sum of the step; `shrink` as `before_step` had it."""
    if sums.recent is None:
        return sums._replace(promoted=_by_row(sums.promoted, shrink) + recent)
    return sums._replace(recent=recent)


def _by_row(x: Any, factor: Any) -> Array:
    return x * over_rows(factor, x.shape)


def online_softmax(
    s: Float[Array, "M keys"], scales: list[Array], top: Float[Array, "M"], log2_p: float, polynomial_columns: int = 0
) -> tuple[Float[Array, "M keys"], Float[Array, "M"], Float[Array, "M"]]:
    """(P times 2**log2_p, new tops, the factor by which earlier sums shrink) of a block of products.

    Args:
      scales: take products to scores in log2: one for all keys, or one for each half.
      top: `reference.row_top` of the scores so far, in log2: whole numbers, `START` before the first block.
      polynomial_columns: of the config.
    """
    parts = [s] if len(scales) == 1 else [s[:, : BLOCK_KV // 2], s[:, BLOCK_KV // 2 :]]
    row_scales = [plgpu.layout_cast(jnp.full_like(top, scale), ROWS) for scale in scales]
    new_top, shrink = next_tops(parts, row_scales, top)
    shift = new_top - log2_p
    columns = polynomial_columns // len(parts)
    p = [exp2(part * scale - over_rows(shift, part.shape), columns) for part, scale in zip(parts, scales, strict=True)]
    return p[0] if len(p) == 1 else jnp.concatenate(p, axis=1), new_top, shrink


def over_rows(x: Float[Array, "M"], shape: tuple[int, ...]) -> Float[Array, "M N"]:
    """A value for each row, as an array of this shape."""
    return lax.broadcast_in_dim(x, shape, [0])
