"""The rule by which FP8 attention is differentiated, as a function that simply has this gradient: for finite differences.

Every rounding is replaced by the addition of what it added at one point: to q, k and v, to the sum of weighted values, and to the
sum of weights. At that point the function's value is that of FP8 attention; away from it nothing is rounded, so a rounding has the
derivative of the identity. Scales are in the additions, and the row's maximum is a constant too.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import reference
from pallas_kernels.pattern import TilePattern


class Frozen(NamedTuple):
    """What is held fixed. NumPy float64, or arrays of jax; with leading axes of layers, say."""

    q: Any  # [B, S, N, H], as k and v: what rounding adds
    k: Any
    v: Any
    top: Any  # [B, N, Q, 1]: what is subtracted from a row's scores
    total: Any  # [B, N, Q, 1]: what rounding P adds to the sum of weights
    out: Any  # [B, N, Q, H]: and to that of weighted values


def frozen(q, k, v, pattern: TilePattern) -> Frozen:
    """At q, k and v, float32 `[B, S, N, H]` without NaN. The rounding itself is that of the specification."""
    plain = _operands(np, q, k, v, pattern)
    group, valid = pattern.tokens_per_scale, pattern.k_valid
    assert group is not None
    own, keys, values = (jnp.asarray(x, jnp.float32) for x in plain)
    q8, q_scale = reference.quantize_tokens(own, pattern.q_valid, group)
    k8, v8, k_scale, v_scale = reference.key_value_codes(
        keys, values, valid, tokens_per_scale=group, tokens_per_value_scale=pattern.tokens_per_value_scale
    )
    scales = q_scale[..., None], k_scale[..., None], v_scale
    rounded = [
        np.asarray(codes, np.float64) * np.asarray(reference.over_tokens(scale, codes.shape[1]), np.float64)
        for codes, scale in zip((q8, k8, v8), scales, strict=True)
    ]
    scores = _scores(np, rounded[0], rounded[1], pattern)
    top = np.asarray(reference.row_top(jnp.asarray(scores.max(-1, keepdims=True), jnp.float32)), np.float64)
    p = np.exp(scores - top)
    added = (448 * p).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / 448 - p
    return Frozen(
        *(to - x for to, x in zip(rounded, plain, strict=True)),
        top,
        added.sum(-1, keepdims=True),
        np.einsum("bnqk,bknh->bnqh", added, rounded[2]),
    )


def attention(xp: Any, q, k, v, fixed: Frozen, pattern: TilePattern):
    """The function, `[B, S, N, H]`. xp: numpy for float64, jax.numpy for what the operands are."""
    q, k, v = (x + added for x, added in zip(_operands(xp, q, k, v, pattern), fixed[:3], strict=True))
    p = xp.exp(_scores(xp, q, k, pattern) - fixed.top)
    total = p.sum(-1, keepdims=True) + fixed.total
    out = (xp.einsum("bnqk,bknh->bnqh", p, v) + fixed.out) / total
    return _only(xp, pattern.q_valid, xp.moveaxis(out, 1, 2))


def _operands(xp, q, k, v, pattern):
    """0 at padding; keys less their mean where they are centred."""
    if xp is np:
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q, k, v = _only(xp, pattern.q_valid, q), _only(xp, pattern.k_valid, k), _only(xp, pattern.k_valid, v)
    if pattern.centers_keys:
        k = _only(xp, pattern.k_valid, k - k.sum(1, keepdims=True) / int(pattern.k_valid.sum()))
    return q, k, v


def _only(xp, valid, x):
    return xp.where(xp.asarray(valid)[None, :, None, None], x, 0)


def _scores(xp, q, k, pattern):
    """-inf where a key isn't attended."""
    scores = xp.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5
    return xp.where(xp.asarray(reference.token_mask(pattern))[None], scores, -xp.inf)
