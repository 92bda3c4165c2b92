"""The record that all implementations take: its arrays are data, its sizes static. What it refuses: test_block_sparse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

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


def test_a_plan_has_the_pattern_that_the_op_makes_of_its_arrays():
    x = jnp.zeros((1, PLAN.layout.num_stored, 2, 16))
    table = {"key_tiles": PLAN.key_tiles, "counts": PLAN.counts, "valid": PLAN.layout.valid, "q_valid": None}
    built = TilePattern.build(x, x, **table, tokens_per_scale=PLAN.tokens_per_scale)
    assert jax.tree.structure(built) == jax.tree.structure(PLAN.pattern)  # the sizes
    for a, b in zip(jax.tree.leaves(built), jax.tree.leaves(PLAN.pattern), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_groups_are_tiles_where_nothing_is_quantized():
    assert (PLAN.pattern.num_key_tiles, PLAN.pattern.group_size) == (2, 128)
    assert dataclasses.replace(PLAN.pattern, tokens_per_scale=None).group_size == 256
