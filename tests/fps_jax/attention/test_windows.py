"""Windows and plans against the definition, token by token."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fps_jax import AttentionPlan
from fps_jax.attention.tiles import TileLayout, propose_tiles
from fps_jax.attention.windows import axis_window, propose_window, window_density
from tests.windows_by_definition import attended


@st.composite
def cases(draw):
    grid = tuple(draw(st.integers(1, 6)) for _ in range(3))
    tile = tuple(draw(st.integers(1, n)) for n in grid)
    window = tuple(draw(st.integers(1, 7)) for _ in range(3))
    return grid, tile, window


def tokens_attended(plan: AttentionPlan, head: int | None = None) -> np.ndarray:
    """The plan's table spread out over tokens in raster order."""
    tiles = plan.key_tiles if head is None else plan.key_tiles[head]
    counts = plan.counts if head is None else plan.counts[head]
    by_tile = np.zeros((plan.layout.num_tiles, plan.layout.num_tiles), bool)
    for row, (listed, count) in enumerate(zip(tiles, counts, strict=True)):
        by_tile[row, listed[:count]] = True
    tile_of = plan.layout.slots // plan.layout.stored
    return by_tile[tile_of][:, tile_of]


@settings(deadline=None, max_examples=60)
@given(cases())
def test_tables_and_density_are_those_of_the_definition(case):
    grid, tile, window = case
    plan = AttentionPlan.build(grid, tile, window)
    want = attended(grid, tile, window)
    assert np.array_equal(tokens_attended(plan), want)
    assert plan.density == pytest.approx(want.mean(), rel=1e-12)
    assert plan.window == tuple(min(w, n) for w, n in zip(window, plan.layout.tile_grid, strict=True))
    assert plan.key_tiles.dtype == plan.counts.dtype == np.int32
    assert (np.diff(plan.key_tiles) > 0).all(), "rows rise"
    assert plan.key_tiles.shape == (plan.layout.num_tiles, math.prod(plan.window))
    assert (plan.counts == math.prod(plan.window)).all(), "every query tile sees the same number of key tiles"


def test_windows_per_head():
    grid, tile, windows = (4, 6, 6), (2, 2, 2), [(1, 2, 3), (2, 3, 3), (1, 1, 1)]
    plan = AttentionPlan.build(grid, tile, windows)
    assert plan.per_head
    assert plan.key_tiles.shape == (3, 18, 18)
    for head, window in enumerate(windows):
        assert np.array_equal(tokens_attended(plan, head), attended(grid, tile, window))
        assert not plan.key_tiles[head, :, math.prod(window) :].any(), "unused slots are 0"
    assert plan.density == pytest.approx(np.mean([attended(grid, tile, w).mean() for w in windows]))


def test_the_border_shifts_the_window_inward_for_odd_and_even_widths():
    assert axis_window(5, 3).tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    assert axis_window(5, 2).tolist() == [[0, 1], [0, 1], [1, 2], [2, 3], [3, 4]]


def test_no_window_is_the_whole_grid_and_a_wider_one_is_clipped():
    whole = AttentionPlan.build((5, 6, 7), (2, 3, 4), None)
    assert whole == AttentionPlan.build((5, 6, 7), (2, 3, 4), (9, 9, 9))
    assert whole.whole_grid
    assert whole.density == 1.0
    assert hash(whole) == hash(AttentionPlan.build((5, 6, 7), (2, 3, 4)))


@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80), (21, 80, 45), (21, 64, 64)])
@pytest.mark.parametrize("density", [0.12, 0.2, 0.33, 0.5, 1.0])
def test_proposed_windows_come_near_the_target_density(grid, density):
    layout = TileLayout(grid, propose_tiles(grid)[0].tile)
    got = window_density(layout, propose_window(layout, density))
    assert abs(math.log(got / density)) < 0.2
    if density == 1:
        assert got == 1


def test_a_proposed_window_may_be_any_size():
    """Of all densities that a window of a small grid has, each window's own is met exactly."""
    layout = TileLayout((2, 6, 6), (1, 2, 2))
    for window in itertools.product((1, 2), (1, 2, 3), (1, 2, 3)):
        density = window_density(layout, window)
        assert window_density(layout, propose_window(layout, density)) == pytest.approx(density, rel=0.05), window
    assert propose_window(layout, window_density(layout, (1, 1, 1))) == (1, 1, 1)


def test_of_windows_of_one_density_the_most_even_is_proposed():
    even = TileLayout((8, 8, 8), (2, 2, 2))
    assert window_density(even, (2, 2, 2)) == window_density(even, (1, 2, 4))
    assert propose_window(even, 1 / 8) == (2, 2, 2)
    # An axis that is open to its end counts as long as the longest: 6 frames, all that there are, beside 8 rows and columns.
    short = TileLayout((6, 16, 16), (2, 2, 2))
    assert window_density(short, (3, 4, 4)) == window_density(short, (2, 4, 6)) == 1 / 4
    assert propose_window(short, 1 / 4) == (3, 4, 4)
    # Even in tokens: 12 along each axis, though tiles have 6, 1 and 1.
    long = TileLayout((48, 16, 16), (6, 1, 1))
    assert window_density(long, (2, 12, 12)) == window_density(long, (4, 9, 8))
    assert propose_window(long, window_density(long, (2, 12, 12))) == (2, 12, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": (0, 1, 1)}, r"window=\(0, 1, 1\) is not three positive whole numbers"),
        ({"window": (1, 1)}, r"window=\(1, 1\) is not three positive whole numbers"),
        ({"window": [(1, 1, 1), (1, 0, 1)]}, r"window=\(1, 0, 1\) is not three positive"),
        ({"scales_per_tile": 3}, "scales_per_tile=3 doesn't share out evenly the 4 parts.*allowed: 1, 2, 4"),
        ({"scales_per_tile": 0}, "scales_per_tile=0 doesn't share out"),
        ({"scales_per_tile": 1.0}, "scales_per_tile=1.0 doesn't share out"),
        ({"quantize": "no"}, "quantize='no' is not True or False"),
        ({"grid": (0, 3, 3)}, r"grid=\(0, 3, 3\) is not three positive whole numbers"),
    ],
)
def test_bad_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionPlan.build(**{"grid": (7, 12, 12), "tile": (7, 6, 6), **arguments})


@pytest.mark.parametrize("density", [0, 1.5, -0.1, "0.2", True, math.nan])
def test_bad_densities_are_refused(density):
    with pytest.raises(ValueError, match=r"density=.* is not a number in"):
        propose_window(TileLayout((7, 12, 12), (7, 6, 6)), density)


def test_sparse_only_plans_have_no_scales():
    plan = AttentionPlan.build((7, 12, 12), (7, 6, 6), scales_per_tile=2, quantize=False)
    assert plan.tokens_per_scale is None
    assert not plan.quantize
    assert AttentionPlan.build((7, 12, 12), (7, 6, 6), scales_per_tile=2).tokens_per_scale == 128
