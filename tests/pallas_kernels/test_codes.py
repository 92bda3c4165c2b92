"""Keys and values that are rounded once, V with scales of groups of tokens: what a cache and a mesh rest on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.block_sparse import attention_to_codes, block_sparse_attention
from pallas_kernels.interpret import interpret
from pallas_kernels.pattern import TilePattern
from pallas_kernels.reference import KeyValueCodes, key_value_codes
from pallas_kernels.sm90 import forward as fwd_sm90
from tests.pallas_kernels import interpreted
from tests.reference import rel_l2
from tests.tile_by_tile import portable_takes

TILE, GROUP = 32, 64
VALID = np.arange(4 * TILE) % TILE < TILE - 3
TABLE: dict[str, Any] = {
    "key_tiles": np.array([[2, 0, 3], [1, 3, 2], [0, 1, 2], [3, 1, 0]], np.int32),
    "counts": np.array([3, 2, 1, 3], np.int32),
    "valid": VALID,
}
SIZES: dict[str, Any] = {"tokens_per_scale": 16, "tokens_per_value_scale": GROUP}


def operands(dtype=jnp.float32, tokens: int = 4 * TILE, head_dim: int = 16):
    """q, k, v, d_out; V's channels of other sizes in each group, and NaN at padding."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 2, tokens, 2, head_dim), np.float32)
    x[2] *= 2.0 ** rng.integers(-9, 10, (tokens // GROUP, 1, 1, head_dim)).repeat(GROUP, 0).reshape(tokens, 1, head_dim)
    x[:3, :, ~VALID[np.arange(tokens) % VALID.size]] = np.nan
    return [jnp.asarray(a, dtype) for a in x]


def test_scales_of_groups_are_the_powers_of_two_above_what_they_would_be_alone():
    _, _, v, _ = operands()
    scales = np.asarray(reference.value_scales(v, jnp.asarray(VALID), GROUP))
    largest = np.nanmax(np.abs(np.asarray(v)).reshape(2, 2, GROUP, 2, 16), axis=2)
    assert np.array_equal(np.frexp(scales)[0], np.full(scales.shape, 0.5, np.float32)), "powers of two"
    assert (largest <= 448 * scales * (1 + 1e-6)).all()
    assert (largest > 224 * scales * (1 - 1e-6)).all(), "no larger than needed"


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (0, 1),
        (448, 1),
        (449, 2),
        (448 * 2.0**-7, 2.0**-7),
        (2.0**-60, 2.0**-40),
        (448 * 2.0**40, 2.0**40),
        (450 * 2.0**40, np.nan),
        (np.inf, np.nan),
        (np.nan, np.nan),
    ],
)
def test_the_limits_of_a_groups_scale(largest, scale):
    v = np.zeros((1, 2 * GROUP, 1, 16), np.float32)
    v[0, 3, 0, 5] = largest
    scales = np.asarray(
        jax.jit(reference.value_scales, static_argnums=2)(jnp.asarray(v), jnp.ones(2 * GROUP, bool), GROUP)
    )
    np.testing.assert_array_equal(scales[0, :, 0, 5], [scale, 1])
    assert (np.delete(scales, 5, axis=3) == 1).all()


def test_codes_of_a_group_are_those_of_the_whole_bit_for_bit():
    """What a scale of all tokens can't have: there V's codes rest on frames to come."""
    _, k, v, _ = operands()
    whole = key_value_codes(k, v, jnp.asarray(VALID), **SIZES)
    for start in range(0, 4 * TILE, GROUP):
        part = slice(start, start + GROUP)
        alone = key_value_codes(k[:, part], v[:, part], jnp.asarray(VALID[part]), **SIZES)
        group = slice(start // GROUP, start // GROUP + 1)
        want = KeyValueCodes(
            whole.k[:, part],
            whole.v[:, part],
            whole.k_scale[:, start // 16 :][:, : GROUP // 16],
            whole.v_scale[:, group],
        )
        for a, b in zip(alone, want, strict=True):
            assert np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    of_all = key_value_codes(k, v, jnp.asarray(VALID), tokens_per_scale=16)
    first = key_value_codes(k[:, :GROUP], v[:, :GROUP], jnp.asarray(VALID[:GROUP]), tokens_per_scale=16)
    assert not np.array_equal(np.asarray(of_all.v[:, :GROUP], np.float32), np.asarray(first.v, np.float32))


def by_definition(q, k, v) -> np.ndarray:
    """Attention in float64 to V rounded by hand, group by group; q and k as the specification rounds them."""
    v = np.where(VALID[None, :, None, None], np.asarray(v, np.float64), 0).reshape(2, 2, GROUP, 2, 16)
    scale = np.exp2(np.ceil(np.log2(np.abs(v).max(2, keepdims=True) / 448)))
    codes = (np.round(v / scale * 2048) / 2048).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    v = (codes.astype(np.float64) * scale).reshape(2, 4 * TILE, 2, 16)
    q, k = (
        np.asarray(reference.fake_quant(x, tokens_per_scale=16, valid=jnp.asarray(VALID)), np.float64) for x in (q, k)
    )
    out = np.zeros(q.shape)
    for row, count in enumerate(TABLE["counts"]):
        tiles = TABLE["key_tiles"][row, :count]
        keys = np.flatnonzero(VALID & np.isin(np.arange(4 * TILE) // TILE, tiles))
        rows = slice(row * TILE, (row + 1) * TILE)
        scores = np.einsum("bqnh,bknh->bnqk", q[:, rows], k[:, keys]) / 4
        top = np.exp2(np.ceil(scores.max(-1, keepdims=True) / np.log(2)))
        p = (448 * np.exp(scores) / top).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        out[:, rows] = np.einsum("bnqk,bknh->bqnh", p / p.sum(-1, keepdims=True), v[:, keys])
    return np.where(VALID[None, :, None, None], out, 0)


@pytest.mark.parametrize("heads", ["whole", "tile by tile"])
@pytest.mark.parametrize("ordered", [True, False])
def test_attention_is_the_definition_by_every_channel(heads, ordered):
    q, k, v, _ = operands()
    pattern = TilePattern.build(**TABLE, **SIZES, ordered=ordered)
    want = by_definition(q, k, v)
    for implementation in ("reference", "portable"):
        with portable_takes(heads):
            got = np.asarray(block_sparse_attention(q, k, v, pattern, implementation=implementation))
        # A P whose float32 score straddles a boundary of e4m3 is rounded the other way: none of these, or few
        assert max(rel_l2(got[..., i], want[..., i]) for i in range(16)) <= 1e-3


@pytest.mark.parametrize("tokens_per_value_scale", [GROUP, None])
@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_attention_to_codes_is_bit_for_bit_that_to_what_they_were(implementation, tokens_per_value_scale):
    q, k, v, _ = operands(jnp.bfloat16)
    sizes = SIZES | {"tokens_per_value_scale": tokens_per_value_scale}
    pattern = TilePattern.build(**TABLE, **sizes)
    codes = key_value_codes(k, v, pattern.k_valid, **sizes)
    got = attention_to_codes(q, codes, pattern, implementation=implementation)
    want = block_sparse_attention(q, k, v, pattern, implementation=implementation)
    assert np.array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_gradients_are_those_of_the_specification():
    """Straight through the rounding, at the de-quantized values."""
    q, k, v, d_out = operands()
    pattern = TilePattern.build(**TABLE, **SIZES)
    grads = [
        jax.vjp(functools.partial(block_sparse_attention, pattern=pattern, implementation=name), q, k, v)[1](d_out)
        for name in ("portable", "reference")
    ]
    for a, b in zip(*grads, strict=True):
        assert rel_l2(a, b) <= 1e-5


def _kernel_to_codes() -> dict[str, Any]:
    """Whether the Hopper kernel gives the same bits to codes as to k and v, by either way of quantization."""
    rng = np.random.default_rng(0)
    tile, tiles = 128, 4
    valid = np.arange(tile * tiles) % tile < tile - 5
    q, k, v = (jnp.asarray(rng.standard_normal((1, tile * tiles, 2, 64)), jnp.bfloat16) for _ in range(3))
    sizes: dict[str, Any] = {"tokens_per_scale": 64, "tokens_per_value_scale": 2 * tile}
    pattern = TilePattern.build(
        key_tiles=np.array([[3, 0, 1, 2]] * tiles, np.int32), counts=np.full(tiles, 4, np.int32), valid=valid, **sizes
    )
    codes = key_value_codes(k, v, pattern.k_valid, **sizes)
    fwd_sm90.missing_device = lambda: None
    with interpret():
        to_codes = attention_to_codes(q, codes, pattern, implementation="sm90")
        plain = block_sparse_attention(q, k, v, pattern, implementation="sm90")
        spec = block_sparse_attention(q, k, v, pattern, implementation="reference")
        return {"bits": bool((to_codes == plain).all()), "error": rel_l2(to_codes, spec)}


def test_the_hopper_kernel_to_codes():
    got = interpreted.run(_kernel_to_codes)
    assert got["bits"]
    assert got["error"] <= 2e-2, "P against the running maximum, as tests of the kernel say"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_value_scale": 48}, "tokens_per_value_scale=48 is no number of whole tiles of 32 stored tokens"),
        ({"tokens_per_value_scale": 96}, "tokens_per_value_scale=96 .* divides the 128 keys"),
        (
            {"tokens_per_scale": None},
            "tokens_per_value_scale=64 without tokens_per_scale: nothing is quantized; give both",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TilePattern.build(**TABLE, **(SIZES | change))


def test_codes_that_do_not_fit_a_pattern_are_refused():
    q, k, v, _ = operands()
    pattern = TilePattern.build(**TABLE, **SIZES)
    codes = key_value_codes(k, v, pattern.k_valid, **SIZES)
    of_all = key_value_codes(k, v, pattern.k_valid, tokens_per_scale=16)
    for wrong, other, message in (
        (
            of_all,
            pattern,
            r"scales \(2, 8, 2\) and \(2, 1, 2, 16\); this pattern needs float8_e4m3fn with .*\(2, 2, 2, 16\)",
        ),
        (codes._replace(k=k), pattern, "codes are float32 and float8_e4m3fn"),
        (codes, TilePattern.build(**TABLE), "tokens_per_scale=None .*codes are attended in FP8"),
        (codes, TilePattern.build(**TABLE, **SIZES, center_k=True), "center_k=True"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_to_codes(q, wrong, other)
    with pytest.raises(NotImplementedError, match="attention to codes has no gradient; use block_sparse_attention"):
        jax.grad(lambda q: attention_to_codes(q, codes, pattern).sum())(q)
