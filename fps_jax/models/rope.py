"""Rotary position embedding over a 3D token grid.

Source: Wan-Video/Wan2.1 wan/modules/model.py (rope_params, rope_apply): interleaved pairs, one frequency ladder an axis.
"""

import functools

import jax.numpy as jnp
import numpy as np
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


@functools.lru_cache(maxsize=16)
def rope_table(grid: tuple[int, int, int], head_dim: int, first_frame: int = 0) -> Float[np.ndarray, "2 S H/2"]:
    """Cosines and sines for the tokens of a grid (F, Y, X) in raster order, float32.

    first_frame: the latent frame that the grid begins at; there is no last one. Rows and columns begin at 0.
    Angles are float64: in float32 the last frames of a long video would be off by 1e-5 rad.
    """
    ladders = zip(grid, axis_frequencies(head_dim), strict=True)
    starts = (first_frame, 0, 0)
    axes = [
        (start + np.arange(n, dtype=np.float64))[:, None] * frequencies
        for start, (n, frequencies) in zip(starts, ladders, strict=True)
    ]
    shapes = [tuple(n if a == axis else 1 for a in range(3)) for axis, n in enumerate(grid)]
    angles = np.concatenate(
        [
            np.broadcast_to(angle.reshape(*shape, -1), (*grid, angle.shape[-1])).reshape(-1, angle.shape[-1])
            for angle, shape in zip(axes, shapes, strict=True)
        ],
        axis=-1,
    )
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def apply_rope(x: Float[Array, "B S N H"], table: Float[Array, "2 *B S H/2"]) -> Float[Array, "B S N H"]:
    """Rotate the pairs (x[2i], x[2i+1]) by the angles of `table`, in float32; the result is float32.

    `table` is `[2, S, H/2]`, or `[2, B, S, H/2]` where the samples' grids differ. cos 1 and sin 0 leave a token alone.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = (t[..., None, :] if t.ndim == 3 else t[None, :, None, :] for t in jnp.asarray(table))
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
