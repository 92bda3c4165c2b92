"""RoPE tables and the time embedding against float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from fps_jax.attention.tiles import TileLayout
from fps_jax.models.dit_layers import time_sinusoid
from fps_jax.models.rope import apply_rope, rope_table


def test_rotation_is_upstreams_complex_product():
    """Upstream: view_as_complex of interleaved pairs times exp(i angle), complex128 (wan/modules/model.py rope_apply)."""
    grid, d = (3, 2, 4), 32
    x = np.random.default_rng(0).normal(size=(1, 24, 2, d)).astype(np.float32)
    ladders = (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6))
    f, y, z = np.unravel_index(np.arange(24), grid)
    angles = np.concatenate(
        [p[:, None] / 10000 ** (np.arange(0, n, 2) / n) for p, n in zip((f, y, z), ladders, strict=True)], axis=1
    )
    complex_x = x[..., 0::2] + 1j * x[..., 1::2].astype(np.float64)
    rotated = complex_x * np.exp(1j * angles)[None, :, None]
    want = np.stack([rotated.real, rotated.imag], -1).reshape(x.shape)
    got = apply_rope(jnp.asarray(x), rope_table(grid, d))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_time_sinusoid_is_right_to_float32_over_the_whole_range():
    t = np.concatenate([np.arange(0, 1001, 37), np.random.default_rng(1).uniform(0, 1000, 50), [1000]]).astype(
        np.float32
    )
    angles = t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    want = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    got = jax.jit(lambda t: time_sinusoid(t, 256))(jnp.asarray(t))
    np.testing.assert_allclose(got, want, atol=3e-7)  # plain float32 is off by 6e-5


def test_a_program_holds_no_rope_table_of_all_tokens_as_a_constant():
    """On a mesh every device would hold it whole. XLA folds what it can of constants, so the compiled program is asked."""
    layout = TileLayout((4, 8, 8), (2, 4, 4))

    def rotate(x):
        return apply_rope(x, layout.to_tiles(rope_table(layout.grid, 64)))

    text = jax.jit(rotate).lower(jax.ShapeDtypeStruct((1, layout.num_stored, 1, 64), jnp.float32)).compile().as_text()
    constants = [
        math.prod(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\]\S* constant\(", text)
    ]
    assert constants, "the axes' tables are constants"
    assert max(constants) <= 2 * 8 * 32 < layout.num_stored * 32
