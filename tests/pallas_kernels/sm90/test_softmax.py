"""Row maxima in powers of two, and when the Hopper kernel's sums move to float32 registers: what whole calls don't show."""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.pattern import TilePattern
from pallas_kernels.portable.forward import forward
from pallas_kernels.sm90 import softmax
from pallas_kernels.sm90.softmax import Sums

LN2 = math.log(2)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e4, 1e6, 1e8, 1e9, 1e30])
def test_a_top_is_at_most_a_power_of_two_above_its_maximum(size, jit):
    """At any size of scores: else the largest P would be above 1, or so small that e4m3 has few bits for it, or none."""
    magnitude = np.float32(size) * (1 + np.random.default_rng(0).random(4000, np.float32))
    maximum = np.concatenate([magnitude, -magnitude])
    top = np.asarray((jax.jit(reference.row_top) if jit else reference.row_top)(jnp.asarray(maximum)))
    assert (top >= maximum).all()
    ulp = np.spacing(np.abs(top))
    assert (top.astype(np.float64) - maximum <= LN2 + ulp / 2).all()
    if size <= 1e4:  # where float32 tells one power of two from the next
        powers = top / LN2
        assert np.abs(powers - np.round(powers)).max() <= 2 * ulp.max() / LN2


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_a_top_passes_on_what_is_not_finite(special):
    np.testing.assert_array_equal(reference.row_top(jnp.float32(special)), np.float32(special))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e6, 1e8, 3e8, 1e9])
def test_rows_of_equal_scores_are_means_at_any_size_of_scores(size, sign):
    """Every P is then the same, in FP8 too: the output is the mean of V whatever the scores are."""
    seq, dim = 32, 16
    q, k = np.zeros((1, seq, 1, dim), np.float32), np.zeros((1, seq, 1, dim), np.float32)
    k[..., 0] = sign * math.sqrt(4 * size)
    q[..., 0] = math.sqrt(4 * size) * np.linspace(1, 2, seq)[None, :, None]
    v = np.random.default_rng(0).standard_normal((1, seq, 1, dim)).astype(np.float32)
    valid = jnp.ones(seq, bool)
    pattern = TilePattern(
        key_tiles=jnp.zeros((1, 1), jnp.int32), counts=jnp.ones(1, jnp.int32), q_valid=valid, k_valid=valid,
        tile_size=seq, tokens_per_scale=seq // 2,
    )  # fmt: skip
    for attention in (reference.attention, forward):
        out, lse = attention(*map(jnp.asarray, (q, k, v)), pattern)
        want = np.asarray(reference.fake_quant_values(jnp.asarray(v))).mean(1, keepdims=True)
        np.testing.assert_allclose(out, np.broadcast_to(want, out.shape), atol=1e-5)
        assert np.isfinite(lse).all()


@pytest.mark.parametrize("promote_every", [2, 4, 8])
def test_no_more_than_so_many_steps_stay_with_the_tensor_cores(promote_every):
    """No maximum moves here. Interpret mode sums exactly, so a whole call is right however long the tensor cores go on."""
    one = jnp.ones(64)
    sums, steps = Sums(jnp.zeros((64, 136)), jnp.zeros((64, 136)), one), 21
    longest = 0
    for step in range(1, steps):
        with mock.patch.object(softmax, "any_in_warp_is_not_1", return_value=jnp.int32(0)):
            sums = softmax.before_step(sums, one, jnp.int32(step), promote_every)
        assert sums.recent is not None
        sums = softmax.after_step(sums, sums.recent + 1, one)  # P V of the step is 1 everywhere
        assert sums.recent is not None
        longest = max(longest, int(sums.recent.max()))
        np.testing.assert_array_equal(sums.total(), np.full((64, 136), step))
    assert longest == promote_every
