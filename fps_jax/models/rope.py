"""Rotary position embedding over a 3D token grid.

Source: Wan-Video/Wan2.1 wan/modules/model.py (rope_params, rope_apply): interleaved pairs, one frequency ladder an axis.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

THETA = 10000.0


def axis_frequencies(head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radians a token of each axis's pairs, frames first, float64; the axes' pairs follow each other in a head.

    The head dim is cut into d - 4(d//6), 2(d//6) and 2(d//6) for the three axes.
    """
    sixth = head_dim // 6
    f, y, x = (
        THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) for dim in (head_dim - 4 * sixth, 2 * sixth, 2 * sixth)
    )
    return f, y, x


def rope_table(grid: tuple[int, int, int], head_dim: int, first_frame: int = 0) -> Float[Array, "2 S H/2"]:
    """Cosines and sines for the tokens of a grid (F, Y, X) in raster order, float32.

    first_frame: the latent frame that the grid begins at; there is no last one. Rows and columns begin at 0.
    Angles are float64: in float32 the last frames of a long video would be off by 1e-5 rad. A program holds a small table an axis,
    and puts the large one together when it runs: on a mesh each device its part, where it would hold all of a constant.
    """
    axes = lax.optimization_barrier(tuple(jnp.asarray(table) for table in _axis_tables(grid, head_dim, first_frame)))
    shapes = [tuple(n if a == axis else 1 for a in range(3)) for axis, n in enumerate(grid)]
    parts = [
        jnp.broadcast_to(table.reshape(2, *shape, -1), (2, *grid, table.shape[-1]))
        for table, shape in zip(axes, shapes, strict=True)
    ]
    return jnp.concatenate(parts, axis=-1).reshape(2, -1, head_dim // 2)


@functools.lru_cache(maxsize=16)
def _axis_tables(
    grid: tuple[int, int, int], head_dim: int, first_frame: int
) -> tuple[Float[np.ndarray, "2 n pairs"], ...]:
    """Cosines and sines of each axis's angles at its n places."""
    angles = (
        np.arange(start, start + n, dtype=np.float64)[:, None] * frequencies
        for start, n, frequencies in zip((first_frame, 0, 0), grid, axis_frequencies(head_dim), strict=True)
    )
    return tuple(np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32) for angle in angles)


def apply_rope(x: Float[Array, "B S N H"], table: Float[Array, "2 *B S H/2"]) -> Float[Array, "B S N H"]:
    """Rotate the pairs (x[2i], x[2i+1]) by the angles of `table`, in float32; the result is float32.

    `table` is `[2, S, H/2]`, or `[2, B, S, H/2]` where the samples' grids differ. cos 1 and sin 0 leave a token alone.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = (t[..., None, :] if t.ndim == 3 else t[None, :, None, :] for t in jnp.asarray(table))
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
