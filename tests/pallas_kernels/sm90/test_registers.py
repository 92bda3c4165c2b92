"""Inline code on registers: that it takes each element for what Mosaic's layouts say it is, and the maximum by bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels.sm90 import registers


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
    # The same dimensions of both tilings are threads: registers stay in their thread
    for name in (
        "warp_dims",
        "lane_dims",
    ):
        assert getattr(mgpu.WGMMA_LAYOUT, name) == getattr(mgpu.WGMMA_LAYOUT_8BIT, name)
    # As to_fp8_operand does it: registers of neighbouring column tiles joined.
    relabelled = np.concatenate([accumulator[:, 0::2], accumulator[:, 1::2]], axis=-1)
    assert relabelled.shape == operand.shape
    row, column = np.divmod(operand, shape[1])
    np.testing.assert_array_equal(relabelled, row * shape[1] + registers.kv_order(shape[1])[column])


def test_a_threads_rows_are_those_of_the_reduced_layout():
    """`next_tops` writes what it finds in registers[:, :, :, :, half] to [:, :, half] of a layout of row values."""
    row = elements(mgpu.WGMMA_LAYOUT, (64, 128)) // 128
    reduced = elements(mgpu.WGMMA_LAYOUT.reduce([1]), (64,))
    assert mgpu.WGMMA_LAYOUT.warp_dims == (-7,)
    assert mgpu.WGMMA_LAYOUT.lane_dims == (-3, -2)
    for warp, half, lane in np.ndindex(4, 2, 8):
        np.testing.assert_array_equal(row[:, :, warp, :, half, :, lane], reduced[0, warp, half, lane, 0])


_emulated = jax.jit(registers.emulated_next_tops)


def next_tops(x, top, scales=(1.0,)):
    """`registers.next_tops` as interpret mode computes it. `scales`: of the parts, equally wide, that x is cut into."""
    parts = np.split(np.asarray(x, np.float32), len(scales), axis=1)
    factors = [np.full(len(x), scale, np.float32) for scale in scales]
    found = _emulated(*map(jnp.asarray, (*parts, *factors, np.asarray(top, np.float32))))
    return [np.asarray(x) for x in found]


START = -1e30
ROWS = 48  # three warps
TOPS = [START, -130.0, -2.0, -1.0, -0.0, 0.0, 1.0, 7.0, 128.0]


@settings(deadline=None, max_examples=100)
@given(
    arrays.arrays(np.float32, (ROWS, 4), elements=st.floats(-200, 200, width=32)),
    st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=2),
    st.lists(st.sampled_from([-1, 0, 1]), min_size=ROWS, max_size=ROWS),
    st.lists(st.sampled_from(TOPS), min_size=ROWS, max_size=ROWS) | st.sampled_from(TOPS).map(lambda top: [top] * ROWS),
)
def test_tops_are_maxima_rounded_up_whatever_the_warp_votes(x, scales, signs, top):
    """Rows of either sign throughout, of both, of zeros of both signs; below their tops, at them, above; one part and two."""
    signs = np.array(signs)[:, None]
    x = np.where(signs == 0, x, np.copysign(x, signs.astype(np.float32)))
    top = np.array(top, np.float32)
    by_part = np.repeat(np.array(scales, np.float32), 4 // len(scales))
    x = (x / by_part).astype(np.float32)
    scaled = np.where(np.abs(x) < 2.0**-126, 0, x) * by_part  # XLA on a CPU takes denormal numbers for 0
    expected = np.maximum(top, np.ceil(scaled.max(axis=1)))
    found, shrink = next_tops(x, top, scales)
    np.testing.assert_array_equal(found, expected)
    # XLA's exp2 on a CPU rounds x * log(2) to a float32 first.
    np.testing.assert_allclose(shrink, np.exp2(top - expected), rtol=2.0**-16, atol=2.0**-126)


WARP = 16
HELD = np.arange(WARP) != 5  # all rows of a warp but one


@pytest.mark.parametrize(
    ("score", "top", "moved"),
    [
        (3.5, 4.0, False),
        (4.0, 4.0, False),
        (4.5, 4.0, True),
        (-1.0, 4.0, False),
        (-1.0, 0.0, False),
        (-0.0, 0.0, False),
        (0.0, -0.0, False),
        (-0.25, -0.0, False),
        (0.25, -0.0, True),
        (-1.5, -2.0, True),
        (0.0, START, True),
        (-np.inf, 4.0, False),
        (np.nan, 4.0, True),
        (-np.nan, 4.0, True),
        (-np.nan, -4.0, True),
        (np.inf, 4.0, True),
        (3.5, np.nan, True),
    ],
)
def test_a_warp_takes_the_long_way_where_one_of_its_rows_moves(score, top, moved):
    """Which way shows in a row whose top is no whole number, as none is: the long way rounds it up, the short one leaves it."""
    scores, tops = np.full((WARP, 8), -1.0), np.full(WARP, 0.5)
    scores[~HELD], tops[~HELD] = score, top
    found, _ = next_tops(np.concatenate([scores, np.full((WARP, 8), -1.0)]), np.concatenate([tops, np.full(WARP, 0.5)]))
    np.testing.assert_array_equal(found[:WARP][HELD], 1.0 if moved else 0.5)
    np.testing.assert_array_equal(found[WARP:], 0.5)  # another warp, of which none moves


def test_a_row_that_is_negative_throughout_rises_to_its_largest_score():
    """The largest integer, its smallest score, is below its top, and no other row of the warp moves."""
    scores, tops = np.full((WARP, 8), -1.0), np.full(WARP, 1.0)
    scores[5], tops[5] = np.linspace(-9, -1.5, 8), -2.0
    top, shrink = next_tops(scores, tops)
    np.testing.assert_array_equal(top[~HELD], -1)
    np.testing.assert_array_equal(shrink[~HELD], 0.5)
    np.testing.assert_array_equal(top[HELD], 1)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("special", [np.nan, -np.nan, np.inf])
def test_a_score_that_is_not_finite_makes_its_row_nan_from_then_on(special, sign):
    """Also inf: otherwise a later step would find exp2(inf - inf) only by the long way, which it doesn't take."""
    scores, top = np.full((WARP, 8), sign, np.float32), np.full(WARP, START)
    scores[5] = sign
    scores[5, 3] = np.copysign(special, sign) if np.isnan(special) else special
    top, shrink = next_tops(scores, top)
    np.testing.assert_array_equal(np.isnan(top), ~HELD)
    np.testing.assert_array_equal(np.isnan(shrink), ~HELD)
    top, shrink = next_tops(np.full((WARP, 8), sign - 1.0), top)
    np.testing.assert_array_equal(np.isnan(top), ~HELD)
    np.testing.assert_array_equal(np.isnan(shrink), ~HELD)
    np.testing.assert_array_equal(shrink[HELD], 1)


def test_scores_of_minus_infinity_alone_leave_a_top_as_it_is():
    top, shrink = next_tops(np.full((WARP, 8), -np.inf), np.full(WARP, START))
    np.testing.assert_array_equal(top, np.float32(START))
    np.testing.assert_array_equal(shrink, 1)


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
