"""The record that all implementations take: its arrays are data, its sizes static. What it refuses: test_block_sparse."""

import dataclasses

import jax
import numpy as np
import pytest

from fps_jax import AttentionPlan
from pallas_kernels.pattern import TilePattern

PLAN = AttentionPlan.build((4, 8, 15), (4, 8, 8), (1, 1, 1), scales_per_tile=2)  # two tiles of 256 slots, padded


def test_another_table_is_not_compiled_for_and_another_size_is():
    traced = []

    @jax.jit
    def call(pattern: TilePattern):
        traced.append(pattern.tokens_per_scale)
        return pattern.key_tiles.sum() + pattern.counts.sum()

    first = PLAN.pattern
    other = dataclasses.replace(first, key_tiles=first.key_tiles[::-1], k_valid=~first.k_valid)
    for pattern in (first, other, dataclasses.replace(first, tokens_per_scale=None)):
        call(pattern)
    assert traced == [128, None]


def test_a_plans_pattern_is_its_arrays_and_sizes():
    pattern = PLAN.pattern
    assert (pattern.tile_size, pattern.tokens_per_scale) == (256, 128)
    valid = PLAN.layout.valid
    for got, want in ((pattern.key_tiles, PLAN.key_tiles), (pattern.counts, PLAN.counts), (pattern.k_valid, valid)):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype
    np.testing.assert_array_equal(pattern.q_valid, valid)


def test_a_plan_whose_table_is_wrong_has_no_pattern(monkeypatch):
    """What `attend` and a kernel that is called directly take is checked in one place."""
    monkeypatch.setattr(AttentionPlan, "counts", np.array([1, 2], np.int32))
    with pytest.raises(ValueError, match=r"counts lie in \[1, 2\]; each must be in \[1, 1\]"):
        _ = PLAN.pattern


def test_groups_are_tiles_where_nothing_is_quantized():
    assert (PLAN.pattern.num_key_tiles, PLAN.pattern.group_size) == (2, 128)
    assert dataclasses.replace(PLAN.pattern, tokens_per_scale=None).group_size == 256
