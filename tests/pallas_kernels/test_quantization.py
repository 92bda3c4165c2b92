"""FP8 quantization: rounding against ml_dtypes, scales, and the values that break others: zero, denormal, inf, NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import reference
from pallas_kernels.pattern import TilePattern

ALL = jnp.ones(8, bool)
ULP = 2.0**-23


def quantize(x, valid=ALL, tokens_per_scale=4):
    return reference.quantize_tokens(jnp.asarray(x, jnp.float32), valid, tokens_per_scale)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(1e-30, 1e30), st.booleans(), st.booleans())
def test_values_are_the_nearest_e4m3_numbers_of_x_over_the_scale(seed, size, bf16, jit):
    x = np.random.default_rng(seed).standard_normal((2, 8, 3, 16)).astype(np.float32) * np.float32(size)
    if bf16:
        x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    values, scales = jax.jit(quantize)(x) if jit else quantize(x)
    amax = np.abs(x.reshape(2, 2, 4, 3, 16)).max((2, 4))
    np.testing.assert_allclose(scales, amax / np.float32(448), rtol=2 * ULP)  # XLA multiplies by the reciprocal of 448
    scaled = x.astype(np.float64) / np.repeat(amax / 448.0, 4, axis=1)[..., None]
    # Rounded to multiples of 2^-11 first: a divider's last bits then decide nothing, not even where bf16 values lie just between
    # two codes. Only values at the middle of two such multiples may take either, which bf16 values hardly ever are.
    margin = 0 if bf16 else 4 * ULP
    nearest = [
        np.clip(np.round(scaled * (1 + d) * 2048) / 2048, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        for d in (-margin, margin)
    ]
    assert np.logical_or.reduce([np.asarray(values) == n for n in nearest]).all()
    back = np.asarray(values, np.float32) * np.repeat(np.asarray(scales), 4, axis=1)[..., None]
    # A bit of 448 is 2e-6 of half a step.
    assert (np.abs(back - x) <= np.repeat(amax, 4, axis=1)[..., None] / 28 * (1 + 1e-5)).all()


def test_every_boundary_between_two_codes_is_rounded_as_ml_dtypes_does():
    # 0 to 448, denormals too
    codes = np.arange(0, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (codes[1:] + codes[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([codes, middles, *near, np.array([1e-30, 463.9, 1e30], np.float32)])
    x = np.concatenate([x, -x]).astype(np.float32)
    want = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(reference.nearest_fp8)(x), want)
    np.testing.assert_array_equal(np.asarray(reference.round_to_fp8(jnp.asarray(x)), np.float32), want)
    assert np.isnan(reference.nearest_fp8(jnp.float32(np.nan)))


def test_rounding_does_not_rest_on_a_cast_and_back():
    """XLA for GPUs leaves out a cast to e4m3 that is cast back: P was not rounded there."""
    program = str(jax.make_jaxpr(reference.nearest_fp8)(jnp.ones(3)))
    assert "reduce_precision" in program
    assert "f8_e4m3" not in program


def test_a_product_with_the_reciprocal_gives_the_same_codes_but_for_a_handful():
    """As the fused kernel divides, for every bf16 mantissa of x and of the amax: x from the amax to 2^-20 of it."""
    mantissa = np.arange(128, 256, dtype=np.float32) / 128
    amax = mantissa[:, None, None]
    x = mantissa * np.float32(2) ** -np.arange(20, dtype=np.float32)[:, None]
    scale = np.asarray(reference.scale_of(jnp.asarray(amax)))
    codes = np.asarray(reference.codes_of(jnp.asarray(x)[None], jnp.asarray(scale)), np.float32)
    steps = np.round(x * (1 / scale * np.float32(2048)))
    by_product = (steps / np.float32(2048)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    other = (codes != by_product) & (x <= amax)
    assert other.sum() < 10
    assert ((x / amax)[other] < 2.0**-14).all()
    assert (np.abs(codes - by_product)[x <= amax] <= 2.0**-9).all()


@pytest.mark.parametrize("x", [448.0, 460.0, 464.0, 465.0, 1e9, np.inf])
def test_rounding_saturates_where_a_plain_cast_gives_nan(x):
    assert float(reference.round_to_fp8(jnp.float32(x))) == 448
    assert float(reference.round_to_fp8(jnp.float32(-x))) == -448


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-39, 448 * 2.0**-127])
def test_zero_and_denormal_tiles_have_scale_one_and_become_zero(tiny):
    values, scales = quantize(np.full((1, 8, 1, 16), tiny))
    assert (np.asarray(scales) == 1).all()
    assert not np.asarray(values, np.float32).any()


def test_the_smallest_normal_scale_is_used():
    _, scales = quantize(np.full((1, 8, 1, 16), 448 * 2.0**-126))
    assert (np.asarray(scales) == 2.0**-126).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_makes_its_own_scale_nan_and_no_other(bad):
    x = np.ones((1, 8, 2, 16), np.float32)
    x[0, 5, 1, 3] = bad
    values, scales = quantize(x)
    want = np.ones((1, 2, 2), bool)
    want[0, 1, 1] = False
    assert np.array_equal(np.isfinite(scales), want)
    assert np.isnan(np.asarray(values, np.float32)[0, 4:, 1]).all()
    v8, v_scales = reference.quantize_values(jnp.asarray(x), ALL)
    assert np.isnan(np.asarray(v_scales)[0, 0, 1, 3])
    assert np.isfinite(np.asarray(v_scales)).sum() == 2 * 16 - 1
    assert np.isnan(np.asarray(v8, np.float32)[0, :, 1, 3]).all()


def test_padding_enters_no_scale_and_becomes_zero():
    x = np.ones((1, 8, 1, 16), np.float32)
    x[:, 6:] = np.nan
    valid = jnp.arange(8) < 6
    values, scales = quantize(x, valid)
    assert (np.asarray(scales) == np.float32(1) / 448).all()
    assert not np.asarray(values, np.float32)[:, 6:].any()
    empty = jnp.arange(8) < 4  # a group of padding alone, as in a short edge tile
    values, scales = quantize(np.where(np.arange(8)[None, :, None, None] < 4, x, np.nan), empty)
    assert np.asarray(scales)[0, 1, 0] == 1
    assert not np.asarray(values, np.float32)[:, 4:].any()


def test_fake_quant_rounds_forward_and_passes_gradients_through():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 3, 16), np.float32))
    out, vjp = jax.vjp(lambda x: reference.fake_quant(x, tokens_per_scale=4), x)
    values, scales = quantize(x)
    back = np.asarray(values, np.float32) * np.repeat(np.asarray(scales), 4, axis=1)[..., None]
    np.testing.assert_allclose(out, back, rtol=4 * ULP)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape, np.float32))
    np.testing.assert_array_equal(vjp(g)[0], g)
    assert reference.fake_quant(x.astype(jnp.bfloat16), tokens_per_scale=4).dtype == jnp.bfloat16
    out, vjp = jax.vjp(lambda v: reference.fake_quant_values(v), x)
    assert float(jnp.abs(out - x).max()) > 0
    np.testing.assert_array_equal(vjp(g)[0], g)


def test_a_scale_of_its_own_keeps_small_tokens_from_underflow():
    x = np.random.default_rng(0).standard_normal((1, 8, 1, 16)).astype(np.float32)
    x[:, 4:] *= 2.0**-20  # e4m3 spans 2^-9 to 2^8.8
    for tokens_per_scale, kept in ((8, False), (4, True)):
        back = np.asarray(reference.fake_quant(jnp.asarray(x), tokens_per_scale=tokens_per_scale))[:, 4:]
        error = np.linalg.norm(back - x[:, 4:]) / np.linalg.norm(x[:, 4:])
        assert (error < 0.05) == kept


@pytest.mark.parametrize("size", [0.0, 1e-39, 1e-30, 1e30])
def test_the_gradient_is_the_identity_at_any_size(size):
    x = jnp.full((1, 8, 1, 16), size)
    grad = jax.grad(lambda x: reference.fake_quant(x, tokens_per_scale=4).sum() + reference.fake_quant_values(x).sum())
    assert (np.asarray(grad(x)) == 2).all()


@pytest.mark.parametrize("tokens_per_scale", [0, 3, 16])
def test_groups_that_do_not_divide_the_tokens_are_refused(tokens_per_scale):
    with pytest.raises(ValueError, match=f"tokens_per_scale={tokens_per_scale} doesn't divide 8 tokens"):
        reference.fake_quant(jnp.ones((1, 8, 1, 16)), tokens_per_scale=tokens_per_scale)


def test_with_outlier_channels_a_scale_per_tile_beats_one_per_tensor_and_more_beat_one():
    """Means over seeds: which e4m3 steps the outliers fall on is chance. benchmarks/fp8_error.py has the full table."""
    tokens, tile, dim = 1024, 256, 64
    valid = jnp.ones(tokens, bool)
    pattern = TilePattern(
        key_tiles=jnp.tile(jnp.arange(4), (4, 1)), counts=jnp.full(4, 4), q_valid=valid, k_valid=valid,
        tile_size=tile, tokens_per_scale=None,
    )  # fmt: skip
    errors = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        q, k, v = (rng.standard_normal((1, tokens, 1, dim)).astype(np.float32) for _ in range(3))
        outliers = rng.permutation(dim)[:3]
        q[..., outliers] *= 20
        k[..., outliers] *= 20
        q *= 2 / (np.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(dim)).std()
        x = [jnp.asarray(a) for a in (q, k, v)]
        run = [
            np.asarray(reference.attention(*x, pattern=dataclasses.replace(pattern, tokens_per_scale=size))[0])
            for size in (None, tokens, tile, tile // 2, tile // 4)
        ]
        errors.append([np.linalg.norm(out - run[0]) / np.linalg.norm(run[0]) for out in run[1:]])
    per_tensor, per_tile, two, four = np.mean(errors, axis=0)
    assert per_tensor > per_tile > two > four
