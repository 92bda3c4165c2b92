"""Inline code on registers: that it takes each element for what Mosaic's layouts say it is, and the maximum by bits."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels import registers


def test_kv_order_permutes_within_groups_of_16():
    order = registers.kv_order(48)
    np.testing.assert_array_equal(np.sort(order.reshape(3, 16), axis=1), np.arange(48).reshape(3, 16))
    with pytest.raises(ValueError, match="24 keys are no multiple of 16"):
        registers.kv_order(24)


def elements(layout, shape) -> np.ndarray:
    """Which element each thread holds in each place of its registers: the array's flat indices, tiled as the layout says."""
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, suffix = index.shape[: -len(tile)], index.shape[-len(tile) :]
        split = [part for size, t in zip(suffix, tile, strict=True) for part in (size // t, t)]
        index = index.reshape(*lead, *split)
        first = len(lead)
        outer, inner = range(first, index.ndim, 2), range(first + 1, index.ndim, 2)
        index = index.transpose(*range(first), *outer, *inner)
    return index


def test_kv_order_is_what_mosaics_layouts_say_for_every_element():
    """The register that the relabelling fills holds, read as an operand, column j for column kv_order(n)[j] of the accumulator."""
    shape = (64, 128)
    accumulator, operand = elements(mgpu.WGMMA_LAYOUT, shape), elements(mgpu.WGMMA_LAYOUT_8BIT, shape)
    for name in (
        "warp_dims",
        "lane_dims",
    ):  # the same dimensions of both tilings are threads: registers stay in their thread
        assert getattr(mgpu.WGMMA_LAYOUT, name) == getattr(mgpu.WGMMA_LAYOUT_8BIT, name)
    # As to_fp8_operand does it: registers of neighbouring column tiles joined.
    relabelled = np.concatenate([accumulator[:, 0::2], accumulator[:, 1::2]], axis=-1)
    assert relabelled.shape == operand.shape
    row, column = np.divmod(operand, shape[1])
    np.testing.assert_array_equal(relabelled, row * shape[1] + registers.kv_order(shape[1])[column])


def test_a_threads_rows_are_those_of_the_reduced_layout():
    """`scaled_row_max` writes the maximum of registers[:, :, :, :, half] to [:, :, half] of a layout of row values."""
    row = elements(mgpu.WGMMA_LAYOUT, (64, 128)) // 128
    reduced = elements(mgpu.WGMMA_LAYOUT.reduce([1]), (64,))
    assert mgpu.WGMMA_LAYOUT.warp_dims == (-7,)
    assert mgpu.WGMMA_LAYOUT.lane_dims == (-3, -2)
    for warp, half, lane in np.ndindex(4, 2, 8):
        np.testing.assert_array_equal(row[:, :, warp, :, half, :, lane], reduced[0, warp, half, lane, 0])


@settings(deadline=None, max_examples=100)
@given(
    arrays.arrays(np.float32, (6, 16), elements=st.floats(width=32, allow_nan=False)),
    st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=2),
    st.lists(st.sampled_from([-1, 0, 1]), min_size=6, max_size=6),
)
def test_maxima_by_bits_are_maxima(x, scales, signs):
    """Rows of either sign throughout, of both, of zeros of both signs and of infinities; one part and two."""
    signs = np.array(signs)[:, None]
    x = np.where(signs == 0, x, np.copysign(x, signs.astype(np.float32)))
    parts = np.split(x, len(scales), axis=1)
    factors = [np.full(6, scale, np.float32) for scale in scales]
    with np.errstate(over="ignore"):
        scaled = [part * factor[:, None] for part, factor in zip(parts, factors, strict=True)]
    expected = np.concatenate(scaled, axis=1).max(axis=1)
    (found,) = registers.emulated_row_max(*map(jnp.asarray, (*parts, *factors)))
    tiny = 2.0**-126 * max(1, *scales)  # XLA on a CPU takes denormal numbers for 0, before scales and after
    np.testing.assert_allclose(found, expected, rtol=0, atol=tiny)


@pytest.mark.parametrize("sign", [-1, 1])
def test_maxima_by_bits_of_a_nan_are_nan(sign):
    x = np.full((2, 16), sign, np.float32)
    x[1, 3] = np.nan
    (found,) = registers.emulated_row_max(jnp.asarray(x), jnp.ones(2))
    np.testing.assert_array_equal(np.isnan(found), [False, True])


@pytest.mark.parametrize("columns", [16, 32, 48])
def test_so_many_columns_of_exponentials_are_polynomials_to_7_5e_5(columns):
    x = np.linspace(-29.9, 9, 64 * 128, dtype=np.float32).reshape(128, 64).T.copy()
    (found,) = registers.emulated_exp2(jnp.asarray(x), polynomial_columns=columns)
    error = np.abs(np.asarray(found, np.float64) / np.exp2(x.astype(np.float64)) - 1)
    assert 1e-5 < error.max() < 7.7e-5
    assert (error.max(0) > 1e-5).sum() == columns


def test_a_polynomial_is_nothing_in_e4m3_where_the_power_is():
    x = jnp.asarray(np.full((64, 128), [-1e30, -np.inf, -200.0, -31.0] * 32, np.float32))
    (found,) = registers.emulated_exp2(x, polynomial_columns=48)
    assert np.asarray(found).max() <= 2.0**-29
    assert np.asarray(found).min() >= 0
