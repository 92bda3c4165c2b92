"""Dense attention in plain XLA and its gradient against NumPy's float64 definition, in blocks of queries or all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.attention import chunked
from fps_jax.attention.chunked import chunked_attention
from tests import windows_by_definition as definition
from tests.reference import rel_l2

ROUNDING = 2e-6  # float32 against float64, as in test_attend


def operands(queries=37, keys=37, batch=2, heads=2, dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, n, heads, dim)), dtype) for n in (queries, keys, keys, queries)]


@functools.partial(jax.jit, static_argnames=("platform", "rows"))  # both are read while it is traced
def both(q, k, v, d_out, key_mask=None, *, platform="cpu", rows=None):
    del platform, rows
    out, vjp = jax.vjp(functools.partial(chunked_attention, key_mask=key_mask), q, k, v)
    return out, *vjp(d_out)


@pytest.fixture(params=["cpu", "other"])
def platform(request, monkeypatch):
    """One head after the other, or all together."""
    monkeypatch.setattr(chunked, "target_platform", lambda: request.param)
    return request.param


def by_definition(q, k, v, d_out, mask):
    return [definition.attention(q, k, v, mask), *definition.gradients(q, k, v, mask, d_out)]


@pytest.mark.parametrize("rows", [8, 100])  # five blocks, of which the last is short, and one
def test_output_and_gradients_are_the_definitions(platform, rows, monkeypatch):
    monkeypatch.setattr(chunked, "_rows", lambda k, heads: rows)
    want = by_definition(*operands(), np.ones((1, 37, 37), bool))
    for got, wanted in zip(both(*operands(), platform=platform, rows=rows), want, strict=True):
        assert rel_l2(got, wanted) <= ROUNDING


def test_masked_keys_take_no_part_and_get_no_gradient(platform):
    x = operands(queries=20)
    mask = np.ones((2, 37), bool)
    mask[0, 5:] = mask[1, ::3] = False
    got = both(*x, jnp.asarray(mask), platform=platform)
    for sample, seen in enumerate(mask):
        one = slice(sample, sample + 1)
        want = by_definition(*(a[one] for a in x), np.broadcast_to(seen, (1, 20, 37)))
        for a, wanted in zip(got, want, strict=True):
            assert rel_l2(a[one], wanted) <= ROUNDING
        for gradient in got[2:]:
            assert not np.asarray(gradient[one][:, ~seen]).any()


def test_16_bit_operands_keep_their_dtype_and_gradients_near_float32s(platform):
    want = by_definition(*operands(dtype=jnp.bfloat16), np.ones((1, 37, 37), bool))
    for got, wanted in zip(both(*operands(dtype=jnp.bfloat16), platform=platform), want, strict=True):
        assert got.dtype == jnp.bfloat16
        assert rel_l2(got.astype(jnp.float32), wanted) <= 2**-6  # P, dS and the results are rounded to 8 bits


def test_inside_shard_map_over_batch_and_heads():
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    axes = jax.P("batch", None, "heads")
    sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(axes,) * 4, out_specs=(axes,) * 4))
    for a, b in zip(sharded(*operands()), both(*operands()), strict=True):
        assert rel_l2(a, b) <= ROUNDING
