"""Tile order: every token once, sub-tiles, proposals, exact gradients."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fps_jax.attention.tiles import TileLayout, propose_tiles

sizes = st.integers(1, 9)
grids = st.tuples(sizes, sizes, sizes)


@st.composite
def layouts(draw):
    grid = draw(grids)
    return TileLayout(grid, tuple(draw(st.integers(1, n)) for n in grid), draw(st.sampled_from([8, 64])))


@settings(deadline=None, max_examples=80)
@given(layouts())
def test_every_token_has_one_slot_in_its_own_tile(layout):
    slots = layout.slots
    assert len(np.unique(slots)) == layout.num_tokens == len(slots)
    for token, place in enumerate(itertools.product(*map(range, layout.grid))):
        cell = [c // t for c, t in zip(place, layout.tile, strict=True)]
        number = 0
        for c, n in zip(cell, layout.tile_grid, strict=True):  # raster order over (F, Y, X)
            number = number * n + c
        assert slots[token] // layout.stored == number
    assert layout.valid.sum() == layout.num_tokens
    assert layout.valid_counts.sum() == layout.num_tokens
    assert layout.stored % layout.alignment == 0
    sub_tile = layout.sub_tile
    padding = (
        64 * layout.parts - math.prod(layout.tile) if sub_tile is None else layout.part_slots - math.prod(sub_tile)
    )
    assert 0 <= padding < (64 if sub_tile is None else layout.alignment)
    assert np.array_equal(layout.tokens[slots], np.arange(layout.num_tokens))
    # tokens of a part come first in it, then its padding
    parts = layout.valid.reshape(-1, layout.part_slots if sub_tile else layout.stored)
    assert not (parts[:, 1:] & ~parts[:, :-1]).any()


@settings(deadline=None, max_examples=80)
@given(layouts())
def test_the_same_tokens_share_a_scale_whatever_the_alignment(layout):
    """So a schedule means the same on every device, which each store tiles as their implementation likes it."""
    kernel = TileLayout(layout.grid, layout.tile)
    assert kernel.alignment == 64
    assert layout.allowed_scales == kernel.allowed_scales
    for scales in layout.allowed_scales:
        group, same = (a.slots // a.tokens_per_scale(scales) for a in (layout, kernel))
        assert np.array_equal(group, same)


def test_stored_slots_follow_the_alignment():
    def stored(tile, alignment):
        layout = TileLayout((9, 9, 9), tile, alignment)
        return layout.parts, layout.part_slots, layout.stored

    assert stored((7, 9, 4), 8) == stored((7, 9, 4), 64) == (4, 64, 256)  # four slabs of 63 tokens
    assert stored((2, 2, 3), 8) == (1, 16, 16)  # 12 tokens: one part, one scale
    assert stored((2, 2, 3), 64) == (1, 64, 64)
    assert stored((4, 4, 7), 8) == (2, 56, 112)  # two of (4, 2, 7)
    assert stored((4, 4, 7), 64) == (2, 64, 128)
    assert stored((5, 5, 5), 8) == stored((5, 5, 5), 64) == (2, 64, 128)  # in raster order: 64 tokens, then 61
    for tile in ((2, 2, 3), (4, 4, 7)):
        assert TileLayout((9, 9, 9), tile, 8).granularities == TileLayout((9, 9, 9), tile).granularities


@pytest.mark.parametrize("alignment", [0, 3, 128, 8.0, True, "8"])
def test_other_alignments_are_refused(alignment):
    with pytest.raises(
        ValueError, match=r"alignment=.* is not a divisor of 64 slots; use 8, or 64 for the Hopper kernel"
    ):
        TileLayout((7, 12, 12), (7, 6, 6), alignment)


@settings(deadline=None, max_examples=20)
@given(layouts())
def test_permutations_are_inverse_and_each_the_others_transpose(layout):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, layout.num_tokens, 3), np.float32))
    tiled, vjp = jax.vjp(layout.to_tiles, x)
    assert np.array_equal(layout.from_tiles(tiled), x)
    assert not np.asarray(tiled)[:, ~layout.valid].any()
    g = jnp.asarray(rng.standard_normal(tiled.shape, np.float32))
    assert np.array_equal(vjp(g)[0], layout.from_tiles(g))
    _, vjp = jax.vjp(layout.from_tiles, tiled)
    assert np.array_equal(vjp(x)[0], tiled)


def test_a_group_of_64_slots_is_a_sub_tile_where_the_tile_can_be_cut():
    layout = TileLayout((7, 9, 8), (7, 9, 4))
    assert layout.sub_tile == (7, 9, 1)
    column = np.arange(7 * 9 * 8).reshape(7, 9, 8) % 8  # x of each token
    by_group = np.full(layout.num_stored, -1)
    by_group[layout.slots] = column.reshape(-1)
    for number, group in enumerate(by_group.reshape(-1, 64)):
        assert set(group) == {number, -1}, "one slab and one padded slot"
        assert group[63] == -1
    assert TileLayout((7, 6, 6), (7, 6, 6)).sub_tile == (7, 3, 3)  # two axes, where no single one has four parts
    assert TileLayout((5, 5, 5), (5, 5, 5)).sub_tile is None  # raster order, padded at its end
    assert np.array_equal(TileLayout((5, 5, 5), (5, 5, 5)).slots, np.arange(125))


@pytest.mark.parametrize(
    ("grid", "tile", "waste"),
    [
        ((21, 45, 80), (7, 9, 4), 0.016),
        ((21, 80, 45), (7, 4, 9), 0.016),
        ((21, 30, 52), (7, 6, 6), 0.055),
        ((21, 52, 30), (7, 6, 6), 0.055),
        ((18, 48, 80), (6, 8, 8), 0.0),  # STA's own grid and tile
        ((21, 60, 60), (7, 6, 6), 0.016),  # square, 960 pixels
        ((13, 45, 80), (1, 15, 16), 0.067),  # 49 frames
        ((5, 30, 52), (5, 6, 4), 0.067),  # 17 frames
        ((1, 45, 80), (1, 15, 16), 0.067),  # one picture at 720p
    ],
)
def test_proposed_tiles_of_the_sizes_that_wan_samples(grid, tile, waste):
    best = propose_tiles(grid)[0]
    assert best.tile == tile
    assert best.waste == pytest.approx(waste, abs=5e-4)
    assert TileLayout(grid, tile).waste == pytest.approx(best.waste)
    assert best.tile_grid == TileLayout(grid, tile).tile_grid


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(1, 9), st.integers(1, 24), st.integers(1, 24)).filter(lambda grid: math.prod(grid) < 2048))
def test_small_grids_are_cut_into_tiles_enough_for_windows(grid):
    best = propose_tiles(grid)[0]
    assert math.prod(best.tile_grid) >= min(12, math.prod(grid))
    assert all(count >= min(2, length) for count, length in zip(best.tile_grid, grid, strict=True))


@settings(deadline=None, max_examples=30)
@given(st.tuples(st.integers(1, 24), st.integers(1, 60), st.integers(1, 90)))
def test_every_grid_has_a_proposal_that_fits(grid):
    best = propose_tiles(grid)[0]
    layout = TileLayout(grid, best.tile)
    assert layout.stored == best.stored
    assert layout.waste == pytest.approx(best.waste)
    assert all(p.stored % 64 == 0 for p in propose_tiles(grid))


def test_granularities_are_those_of_the_method():
    assert TileLayout((7, 9, 4), (7, 9, 4)).granularities == (1, 2, 4)  # 256 stored
    assert TileLayout((7, 9, 2), (7, 9, 2)).granularities == (1, 2, 2)  # 128
    assert TileLayout((7, 6, 9), (7, 6, 9)).granularities == (1, 2, 3)  # 384
    assert TileLayout((2, 2, 2), (2, 2, 2)).granularities == (1, 1, 1)  # 64
    assert TileLayout((7, 6, 9), (7, 6, 9)).allowed_scales == (1, 2, 3, 6)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ((8, 6, 6), r"tile=\(8, 6, 6\) is larger than the grid \(7, 12, 12\); good tiles for it: \(1, 4, 6\)"),
        ((7, 12, 0), "tile=.* is not three positive whole numbers"),
        ((7, 12), "tile=.* is not three positive whole numbers"),
        ((7.0, 6, 6), "tile=.* is not three positive whole numbers"),
    ],
)
def test_bad_tiles_are_refused_and_good_ones_named(tile, message):
    with pytest.raises(ValueError, match=message):
        TileLayout((7, 12, 12), tile)


def test_a_tile_of_thousands_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"tile=\(21, 30, 52\) stores more than 2048 tokens.*good tiles"):
        TileLayout((21, 30, 52), (21, 30, 52))


def test_tokens_of_another_number_are_refused():
    layout = TileLayout((3, 4, 5), (3, 2, 5))
    with pytest.raises(ValueError, match=r"x has shape \(1, 61, 2\); axis 1 must hold 60 tokens"):
        layout.to_tiles(jnp.zeros((1, 61, 2)))
    with pytest.raises(ValueError, match="axis 1 must hold 128 tokens"):
        layout.from_tiles(jnp.zeros((1, 60, 2)))
