"""What the Hopper kernel reads: values and scales as the specification has them, laid out, padding made harmless."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize_sm90, reference
from pallas_kernels.mosaic import kv_order

TILE, SEQ = 256, 768


def tokens(seed: int, dtype=jnp.bfloat16, seq: int = SEQ):
    x = np.random.default_rng(seed).standard_normal((2, seq, 3, 64), np.float32)
    return jnp.asarray(x * np.exp(np.random.default_rng(seed + 9).standard_normal((1, seq, 1, 1))), dtype)


def validity(seed: int = 0) -> np.ndarray:
    valid = np.random.default_rng(seed).random(SEQ) < 0.8
    valid[256 + 64 : 256 + 128] = False  # a whole group of the second tile
    valid[512:700] = False  # the last tile starts with padding
    return valid


def quantized(tokens_per_scale: int, valid: np.ndarray, dtype=jnp.bfloat16):
    q, k, v = (tokens(i, dtype) for i in range(3))
    ok = jnp.asarray(valid)
    poisoned = [jnp.where(ok[None, :, None, None], x, jnp.asarray(jnp.nan, x.dtype)) for x in (q, k, v)]
    got = quantize_sm90.quantize(*poisoned, q_valid=ok, k_valid=ok, tile_size=TILE, tokens_per_scale=tokens_per_scale)
    return got, (q, k, v)


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
    want, want_scales = reference.quantize_channels(v, ok)
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
    ok = jnp.asarray(valid)
    got = quantize_sm90.unquantized(q, k, v, q_valid=ok, k_valid=ok, tile_size=TILE)
    np.testing.assert_array_equal(np.asarray(got.q, np.float32)[:, valid], by_head(q)[:, valid])
    np.testing.assert_array_equal(np.asarray(got.k, np.float32)[:, valid], by_head(k)[:, valid])
    np.testing.assert_array_equal(np.asarray(got.v, np.float32), (by_head(v) * valid[None, :, None]).transpose(0, 2, 1))
    assert got.q_scale is got.k_scale is got.v_scale is None
    assert got.q.dtype == got.key_valid.dtype == jnp.bfloat16
