"""The gradient of FP8 attention against finite differences, in float64, of the function that it is the gradient of."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.pattern import TilePattern
from tests.pallas_kernels.straight_through import attention, frozen
from tests.reference import rel_l2
from tests.tile_by_tile import portable_takes

TILE = 16
VALID = np.arange(4 * TILE) % TILE < TILE - 3
TABLE: dict[str, Any] = {
    "key_tiles": np.array([[2, 0, 3], [1, 3, 2], [0, 1, 2], [3, 1, 0]], np.int32),
    "counts": np.array([3, 2, 1, 3], np.int32),
    "valid": VALID,
}
SIZES = {
    "a scale of V for all tokens": {"tokens_per_scale": 8},
    "for groups": {"tokens_per_scale": 16, "tokens_per_value_scale": 2 * TILE},
    "centred keys": {"tokens_per_scale": 8, "center_k": True},
}
STEP = 1e-4  # the error is its square times a third derivative; in float64 the difference itself is good to 1e-11


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES)
def case(request):
    """A pattern, q, k, v and d_out; and, for directions in each of q, k and v, the slopes of sum(d_out * output)."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = rng.standard_normal((4, 2, 4 * TILE, 2, 16), np.float32)
    k += 2 * rng.standard_normal((1, 1, 2, 16), np.float32)  # so that centring is something
    pattern = TilePattern.build(**TABLE, **request.param)
    fixed = frozen(q, k, v, pattern)

    def value(*operands):
        return np.vdot(d_out, attention(np, *operands, fixed, pattern))

    slopes = []
    for i in range(3):
        for _ in range(4):
            along = [rng.standard_normal(q.shape) if j == i else np.zeros(()) for j in range(3)]
            ends = [value(*(x + sign * STEP * a for x, a in zip((q, k, v), along, strict=True))) for sign in (1, -1)]
            slopes.append((i, along[i], (ends[0] - ends[1]) / (2 * STEP)))
    value_there = attention(np, q, k, v, fixed, pattern)
    return pattern, [jnp.asarray(x) for x in (q, k, v, d_out)], value_there, slopes


@pytest.mark.parametrize(
    ("implementation", "heads"), [("reference", "whole"), ("portable", "whole"), ("portable", "tile by tile")]
)
def test_the_gradient_of_fp8_attention_is_straight_through_every_rounding(case, implementation, heads):
    pattern, (q, k, v, d_out), value_there, slopes = case
    call = functools.partial(block_sparse_attention, pattern=pattern, implementation=implementation)
    with portable_takes(heads):
        out, vjp = jax.vjp(call, q, k, v)
        grads = [np.asarray(g, np.float64) for g in vjp(d_out)]
    assert rel_l2(out, value_there) < 1e-6  # the same function, there
    for i, along, slope in slopes:
        # A slope along a random direction is about as large as the gradient: what is wrong with it shows, whatever it is.
        assert np.vdot(grads[i], along) == pytest.approx(slope, abs=1e-5 * np.linalg.norm(grads[i])), "qkv"[i]
