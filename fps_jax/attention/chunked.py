"""Dense attention in plain XLA and its gradient, a block of queries at a time: memory is linear in tokens.

The backward computes P again from the log-sum-exp that the forward kept (FlashAttention, arXiv 2205.14135), with keys along the
rows: then one of its five matmuls has to read a matrix of scores across, and autodiff of the forward would make three.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from pallas_kernels.platform import target_platform

# Scores held at a time. On a CPU of one head, so that they stay in its cache; elsewhere of all heads.
_CPU_SCORE_BYTES, _SCORE_BYTES = 2 * 2**20, 64 * 2**20


def chunked_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B K N H"],
    v: Float[Array, "B K N H"],
    key_mask: Bool[Array, "B K"] | None = None,
    *,
    name: str | None = None,
) -> Float[Array, "B Q N H"]:
    """Softmax attention over all keys, scale H**-0.5, softmax and sums in float32, output in q's dtype.

    On a CPU 16-bit operands are multiplied as float32: that is faster there, and P isn't rounded.

    Args:
      key_mask: true where a key is attended.
      name: of output and log-sum-exp to policies of `jax.checkpoint`; None for no name.
    """
    bias = None
    if key_mask is not None:
        bias = jnp.repeat(jnp.where(key_mask, 0.0, -jnp.inf).astype(jnp.float32), q.shape[2], axis=0)
    return _attention(name, q, k, v, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(name, q, k, v, bias):
    return _forward(name, q, k, v, bias)[0]


def _forward(name, q, k, v, bias):
    def head(operands):
        q, k, v, bias = operands

        def block(q):  # [q, H]
            scores = _dot(q, k, 1, 1) * rest
            if bias is not None:
                scores = scores + bias[None]
            top = scores.max(1)
            p = jnp.exp(scores - top[:, None])
            total = p.sum(1)
            return _dot(p.astype(v.dtype), v, 1, 0) / total[:, None], top + jnp.log(total)

        return _over_blocks(block, q, rows)

    batch, _, num_heads, head_dim = q.shape
    scaled, rest = _prescaled(_head_major(q), head_dim)
    rows = _rows(k, batch * num_heads)
    out, lse = _over_heads(head, (scaled, _head_major(k), _head_major(v), bias))
    out = _token_major(out, batch).astype(q.dtype)
    if name is not None:
        out, lse = checkpoint_name(out, name), checkpoint_name(lse, name)
    return out, (q, k, v, bias, out, lse)


def _backward(name, saved, d_out):
    q, k, v, bias, out, lse = saved
    batch, _, num_heads, head_dim = q.shape

    def head(operands):
        q, k, v, bias, d_out, lse, delta = operands

        def block(grads, rows):
            q, d_out, lse, delta = rows
            scores = _dot(k, q, 1, 1) * rest  # [K, q]
            if bias is not None:
                scores = scores + bias[:, None]
            p = jnp.exp(scores - lse[None])
            ds = (p * (_dot(v, d_out, 1, 1) - delta[None])).astype(q.dtype)
            dk, dv = grads
            return (dk + _dot(ds, q, 1, 0), dv + _dot(p.astype(q.dtype), d_out, 1, 0)), _dot(ds, k, 0, 0)

        # A zero that varies over the axes of an enclosing `shard_map` as the sums do.
        start = jnp.where(False, sum(x.reshape(-1)[0].astype(jnp.float32) for x in (q, k, v, d_out)), 0.0)
        zeros = jnp.zeros(k.shape, jnp.float32) + start
        (dk, dv), dq = _scan_blocks(block, (zeros, zeros), (q, d_out, lse, delta), rows)
        return dq * head_dim**-0.5, dk * rest, dv

    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    scaled, rest = _prescaled(_head_major(q), head_dim)
    rows = _rows(k, batch * num_heads)
    operands = (scaled, _head_major(k), _head_major(v), bias, _head_major(d_out), lse, delta.reshape(lse.shape))
    grads = _over_heads(head, operands)
    dq, dk, dv = (_token_major(grad, batch).astype(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _dot(a: Array, b: Array, along_a: int, along_b: int) -> Array:
    return lax.dot_general(a, b, (((along_a,), (along_b,)), ((), ())), preferred_element_type=jnp.float32)


def _prescaled(q: Array, head_dim: int) -> tuple[Array, float]:
    """q with the softmax scale in it, and what is left for the scores: in 16 bits the product would be rounded."""
    scale = head_dim**-0.5
    return (q * scale, 1.0) if q.dtype == jnp.float32 else (q, scale)


def _head_major(x: Array) -> Float[Array, "BN S H"]:
    dtype = jnp.float32 if target_platform() == "cpu" else x.dtype
    return x.astype(dtype).transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _token_major(x: Float[Array, "BN S H"], batch: int) -> Float[Array, "B S N H"]:
    return x.reshape(batch, -1, *x.shape[1:]).transpose(0, 2, 1, 3)


def _rows(k: Array, num_heads: int) -> int:
    """Queries a block. `num_heads`: of all samples."""
    keys = k.shape[1]
    if target_platform() == "cpu":
        return max(128, _CPU_SCORE_BYTES // (4 * keys))
    return max(64, _SCORE_BYTES // (4 * keys * num_heads))


def _over_heads(head: Callable[[Any], Any], operands: Any) -> Any:
    """One head after the other on a CPU, else all together."""
    if target_platform() != "cpu":
        return jax.vmap(head)(operands)
    # With a head axis of length 1: a policy of `jax.checkpoint` that keeps matmuls with weights, which have no such axis, must not
    # keep the scores.
    return lax.map(head, operands, batch_size=1)


def _over_blocks(block: Callable[[Array], Any], q: Array, rows: int) -> Any:
    return _scan_blocks(lambda _, q: (None, block(*q)), None, (q,), rows)[1]


def _scan_blocks(block: Callable[[Any, Any], Any], start: Any, operands: tuple[Array, ...], rows: int) -> Any:
    """`lax.scan` over blocks of about `rows` queries, their last zero, and the outputs put together again."""
    queries = operands[0].shape[0]
    count = math.ceil(queries / rows)
    if count == 1:
        return block(start, operands)
    rows = math.ceil(queries / count)

    def cut(x):
        x = jnp.pad(x, ((0, count * rows - queries),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(count, rows, *x.shape[1:])

    end, out = lax.scan(block, start, tuple(map(cut, operands)))
    return end, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:queries], out)
