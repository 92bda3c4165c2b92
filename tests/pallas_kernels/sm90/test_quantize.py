"""What the Hopper kernel reads: values and scales as the specification has them, laid out, padding made harmless."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.interpret import interpret
from pallas_kernels.pattern import TilePattern
from pallas_kernels.sm90 import quantize as quantize_sm90
from pallas_kernels.sm90.registers import kv_order
from tests.pallas_kernels import interpreted

TILE, SEQ = 256, 768


def tokens(seed: int, dtype=jnp.bfloat16, seq: int = SEQ):
    x = np.random.default_rng(seed).standard_normal((2, seq, 3, 64), np.float32)
    return jnp.asarray(x * np.exp(np.random.default_rng(seed + 9).standard_normal((1, seq, 1, 1))), dtype)


def validity(seed: int = 0) -> np.ndarray:
    valid = np.random.default_rng(seed).random(SEQ) < 0.8
    valid[256 + 64 : 256 + 128] = False  # a whole group of the second tile
    valid[512:700] = False  # the last tile starts with padding
    return valid


def tiles_of(valid: Any, tokens_per_scale: int | None, tile_size: int = TILE) -> TilePattern:
    """A pattern of these tiles, each attending itself; quantization doesn't look at the table."""
    tiles = valid.shape[0] // tile_size
    return TilePattern(
        key_tiles=jnp.arange(tiles)[:, None], counts=jnp.ones(tiles, jnp.int32), q_valid=valid, k_valid=valid,
        tile_size=tile_size, tokens_per_scale=tokens_per_scale,
    )  # fmt: skip


def quantized(tokens_per_scale: int, valid: np.ndarray, dtype=jnp.bfloat16):
    q, k, v = (tokens(i, dtype) for i in range(3))
    ok = jnp.asarray(valid)
    poisoned = [jnp.where(ok[None, :, None, None], x, jnp.asarray(jnp.nan, x.dtype)) for x in (q, k, v)]
    return quantize_sm90.by_xla(*poisoned, pattern=tiles_of(ok, tokens_per_scale)), (q, k, v)


def by_head(x):
    """[B, S, N, H] -> [B * N, S, H], float32."""
    return np.asarray(x, np.float32).transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


@pytest.mark.parametrize("tokens_per_scale", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_valid_tokens_become_what_the_specification_says(tokens_per_scale, dtype):
    valid = validity()
    got, (q, k, v) = quantized(tokens_per_scale, valid, dtype)
    ok = jnp.asarray(valid)
    for values, scales, x in ((got.q, got.q_scale, q), (got.k, got.k_scale, k)):
        want, want_scales = reference.quantize_tokens(x, ok, tokens_per_scale)
        np.testing.assert_array_equal(np.asarray(values, np.float32)[:, valid], by_head(want)[:, valid])
        every_token = np.repeat(np.asarray(want_scales).transpose(0, 2, 1).reshape(6, -1), tokens_per_scale, axis=1)
        got_every = np.repeat(np.asarray(scales), SEQ // scales.shape[1], axis=1)
        np.testing.assert_array_equal(got_every[:, valid], every_token[:, valid])
    want, want_scales = reference.quantize_values(v, ok)
    np.testing.assert_array_equal(np.asarray(got.v, np.float32), by_head(want)[:, kv_order(SEQ)].transpose(0, 2, 1))
    np.testing.assert_array_equal(got.v_scale, np.asarray(want_scales).reshape(6, 64))


@pytest.mark.parametrize("tokens_per_scale", [64, 128, 256])
def test_padded_keys_repeat_a_valid_key_of_their_tile(tokens_per_scale):
    """Exactly, with its scale: so no score of theirs exceeds those of the keys that count."""
    valid = validity()
    got, _ = quantized(tokens_per_scale, valid)
    scale = np.repeat(np.asarray(got.k_scale), SEQ // got.k_scale.shape[1], axis=1)
    k = (np.asarray(got.k, np.float32) * scale[..., None])[0]
    for slot in np.flatnonzero(~valid):
        tile = np.arange(slot // TILE * TILE, (slot // TILE + 1) * TILE)
        assert (k[tile[valid[tile]]] == k[slot]).all(1).any()


def test_padding_counts_nowhere():
    valid = validity()
    got, _ = quantized(256, valid)
    assert not np.asarray(got.v, np.float32)[:, :, ~valid[kv_order(SEQ)]].any()
    np.testing.assert_array_equal(
        np.asarray(got.key_valid, np.float32), np.broadcast_to(valid[kv_order(SEQ)], (8, SEQ)).astype(np.float32)
    )
    np.testing.assert_array_equal(got.query_valid, valid.astype(np.float32))
    for x in got:
        assert np.isfinite(np.asarray(x, np.float32)).all()


def test_a_tile_without_a_valid_key_is_zero():
    valid = np.arange(SEQ) < TILE
    got, _ = quantized(128, valid)
    assert not np.asarray(got.k, np.float32)[:, TILE:].any()
    assert np.isfinite(np.asarray(got.k_scale)).all()


def test_without_quantization_values_stay_and_only_the_layout_changes():
    valid = validity()
    q, k, v = (tokens(i) for i in range(3))
    got = quantize_sm90.quantize(q, k, v, tiles_of(jnp.asarray(valid), None))
    np.testing.assert_array_equal(np.asarray(got.q, np.float32)[:, valid], by_head(q)[:, valid])
    np.testing.assert_array_equal(np.asarray(got.k, np.float32)[:, valid], by_head(k)[:, valid])
    np.testing.assert_array_equal(np.asarray(got.v, np.float32), (by_head(v) * valid[None, :, None]).transpose(0, 2, 1))
    assert got.q_scale is got.k_scale is got.v_scale is None
    assert got.q.dtype == got.key_valid.dtype == jnp.bfloat16


def fused_and_by_xla(
    tile_size: int, tokens_per_scale: int, dtype: str, head_dim: int, center_k: bool = False, broken: bool = False
):
    """Operands of both ways, as float32 NumPy; padding holds NaN. Runs in `interpreted.run`."""
    rng = np.random.default_rng(3)
    seq = 2 * tile_size
    valid = rng.random(seq) < 0.8
    # A group of padding, where a tile has two.
    valid[tokens_per_scale : 2 * tokens_per_scale] = tile_size == tokens_per_scale
    valid[5] = valid[tile_size + 7] = True
    q, k, v = (
        (rng.standard_normal((2, seq, 2, head_dim)) * np.exp(2 * rng.standard_normal((1, seq, 1, 1)))).astype(
            np.float32
        )
        for _ in range(3)
    )
    v[0, 5, 1, 3] = np.inf if broken else 0  # not NaN: XLA on a CPU drops it in a maximum
    q[1, :tokens_per_scale, 0] = 0  # a group of zeros, and one of denormals
    k[1, :tokens_per_scale, 1] = 1e-40
    # And of the smallest that have a scale of their own: 1 / scale is finite, in steps of 2^-11 it isn't.
    q[0, :tokens_per_scale, 0] *= 1e-35
    v[0, :, 0, 4] *= 1e-34
    if broken:
        k[0, 5, 0, 1], q[0, 5, 1, 2] = np.inf, -np.inf
    for x in (q, k, v):
        x[:, ~valid] = np.nan
    args = [jnp.asarray(x, dtype) for x in (q, k, v)]
    pattern = tiles_of(jnp.asarray(valid), tokens_per_scale, tile_size)
    pattern = dataclasses.replace(pattern, center_k=center_k)
    with interpret():
        fused = [np.asarray(x, np.float32) for x in quantize_sm90.quantize(*args, pattern=pattern)]
    by_xla = jax.jit(quantize_sm90.by_xla)(*args, pattern)
    by_xla = [np.asarray(x, np.float32) for x in by_xla]
    return fused, by_xla


@pytest.mark.parametrize(
    ("tile_size", "tokens_per_scale", "dtype", "head_dim", "center_k"),
    [
        (256, 256, "bfloat16", 128, False),
        (256, 128, "bfloat16", 64, True),
        (256, 64, "bfloat16", 128, False),
        (128, 128, "float16", 128, False),
        (384, 192, "bfloat16", 128, False),
    ],
)
def test_the_fused_pass_gives_the_same_operands(tile_size, tokens_per_scale, dtype, head_dim, center_k):
    fused, by_xla = interpreted.run(fused_and_by_xla, tile_size, tokens_per_scale, dtype, head_dim, center_k)
    for name, got, want in zip(quantize_sm90.Operands._fields, fused, by_xla, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)
        assert np.isfinite(want).all(), name


def test_the_fused_pass_shows_what_is_not_finite():
    fused, by_xla = interpreted.run(fused_and_by_xla, 128, 64, "bfloat16", 64, False, True)
    for name, got, want in zip(quantize_sm90.Operands._fields, fused, by_xla, strict=True):
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=name)
    for scales in fused[5:]:
        assert np.isnan(scales).any()
        assert np.isfinite(scales).any()


@pytest.mark.parametrize(
    ("tokens_per_scale", "dtype", "center_k"),
    [(64, jnp.bfloat16, False), (256, jnp.float16, False), (384, jnp.bfloat16, False), (256, jnp.bfloat16, True)],
)
def test_the_fused_pass_lowers_at_real_size(tokens_per_scale, dtype, center_k):
    x = jax.ShapeDtypeStruct((1, 76800, 40, 128), dtype)
    pattern = tiles_of(jax.ShapeDtypeStruct((76800,), jnp.bool_), tokens_per_scale, max(256, tokens_per_scale))
    pattern = dataclasses.replace(pattern, center_k=center_k)
    traced = jax.jit(quantize_sm90.quantize).trace(x, x, x, pattern)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize(("tokens_per_scale", "dtype"), [(64, jnp.float32), (1024, jnp.bfloat16)])
def test_what_the_fused_pass_cannot_hold_goes_by_xla(tokens_per_scale, dtype):
    """32-bit inputs, and groups larger than shared memory."""
    x, ok = jnp.ones((1, 1024, 1, 128), dtype), jnp.ones(1024, bool)
    got = quantize_sm90.quantize(x, x, x, tiles_of(ok, tokens_per_scale, 1024))
    assert (np.asarray(got.q, np.float32) == 448).all()
