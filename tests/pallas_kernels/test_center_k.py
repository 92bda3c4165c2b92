"""K minus its mean before it is rounded: exact in the softmax, better rounded, and a gradient that knows of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.portable.forward import forward
from pallas_kernels.sm90 import quantize as quantize_sm90
from pallas_kernels.testing import Shape, make_call
from tests.reference import rel_l2
from tests.tile_by_tile import portable_takes

SHAPE = Shape(tile=64, tiles=4, head_dim=16, padding="scattered", table="per_head", dtype="float32")


def call(common: float = 0.0, **changes):
    """q, k, v and a pattern with `center_k`; keys with a common component, padding of NaN."""
    (q, k, v), pattern = make_call(dataclasses.replace(SHAPE, **changes))
    signs = np.random.default_rng(5).choice([-1.0, 1.0], (1, 1, *k.shape[2:]))
    k = (k.astype(jnp.float32) + jnp.asarray(common * signs, jnp.float32)).astype(k.dtype)
    return (q, k, v), dataclasses.replace(pattern, center_k=True)


attention = jax.jit(reference.attention)


def test_without_quantization_it_does_nothing():
    x, pattern = call(common=4.0, scales=None)
    for got, want in zip(
        attention(*x, pattern), attention(*x, dataclasses.replace(pattern, center_k=False)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_the_mean_is_of_valid_keys():
    (_, k, _), pattern = call(common=4.0)
    valid = np.asarray(pattern.k_valid)
    want = np.where(valid[None, :, None, None], k - np.asarray(k, np.float64)[:, valid].mean(1, keepdims=True), 0)
    np.testing.assert_allclose(reference.centered_keys(k, pattern.k_valid), want, atol=1e-5)


def test_a_vector_added_to_all_keys_changes_nothing():
    """Output, log-sum-exp and gradients: what rounds is what is left. Without centring a tenth of the output changes."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(q, k, v, pattern):
        return jnp.square(reference.attention(q, k, v, pattern)[0]).sum()

    got, want = [], []
    for common, out in ((0.0, want), (4.0, got)):
        x, pattern = call(common)
        out += attention(*x, pattern)
        out += gradients(*x, pattern)
        out.append(attention(*x, dataclasses.replace(pattern, center_k=False))[0])
    for name, a, b in zip(("output", "lse", "dq", "dk", "dv"), got, want, strict=False):
        # The mean's rounding moves a few quotients across a middle of e4m3: a step of 6% in one code of thousands.
        assert rel_l2(a, b) <= 2e-3, name
    assert rel_l2(got[-1], want[-1]) > 0.05


def test_it_rounds_keys_with_a_common_component_better():
    x, pattern = call(common=16.0)
    exact, _ = attention(*x, dataclasses.replace(pattern, tokens_per_scale=None))
    plain, centred = (
        rel_l2(attention(*x, dataclasses.replace(pattern, center_k=center))[0], exact) for center in (False, True)
    )
    assert centred < 0.5 * plain


@pytest.mark.parametrize("heads", ["whole", "tile by tile"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_portable_agrees_with_the_specification(dtype, heads):
    """Output, log-sum-exp and gradients, with padding and a table a head."""
    x, pattern = call(common=4.0, dtype=dtype)
    # One chunk of keys: float32's sums; the rounding of a bf16 output and gradient
    bar = 2e-6 if dtype == "float32" else 1e-2
    with portable_takes(heads):
        outs = jax.jit(lambda *x: forward(*x))(*x, pattern)
    for got, want in zip(outs, attention(*x, pattern), strict=True):
        assert rel_l2(got, want) <= bar
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(x[0].shape), dtype)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=(1, 2, 3))
    def gradients(implementation, q, k, v):
        out = block_sparse_attention(q, k, v, pattern, implementation=implementation)
        return (out * weights).astype(jnp.float32).sum()

    with portable_takes(heads):
        got, want = (gradients(name, *x) for name in ("portable", "reference"))
    for a, b in zip(got, want, strict=True):
        assert rel_l2(a, b) <= (5e-6 if dtype == "float32" else 1e-2)
    dk = np.asarray(got[1], np.float32)
    assert not dk[:, ~np.asarray(pattern.k_valid)].any()
    # A vector that all keys share has no gradient.
    assert np.abs(dk.sum(1)).max() <= 1e-2 * np.abs(dk).sum(1).max()


def test_the_hopper_kernel_reads_centred_keys():
    (q, k, v), pattern = call(common=4.0, tile=256, head_dim=64, dtype="bfloat16")
    got = quantize_sm90.by_xla(q, k, v, pattern)
    valid = np.asarray(pattern.k_valid)
    values, scales = reference.quantize_tokens(
        reference.centered_keys(k, pattern.k_valid), pattern.k_valid, pattern.tokens_per_scale
    )
    by_head = np.asarray(values, np.float32).transpose(0, 2, 1, 3).reshape(got.k.shape)
    np.testing.assert_array_equal(np.asarray(got.k, np.float32)[:, valid], by_head[:, valid])
    np.testing.assert_array_equal(
        got.k_scale[:, ::2], np.asarray(scales).transpose(0, 2, 1).reshape(got.k_scale.shape[0], -1)
    )
