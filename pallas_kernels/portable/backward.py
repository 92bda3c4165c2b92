"""Gradients of q, k and v from the forward's output and log-sum-exp, whichever implementation computed them."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.pattern import TilePattern
from pallas_kernels.portable.head import (
    Head,
    Table,
    chunked_table,
    head_major,
    key_weights,
    keys_of,
    listed,
    matmul,
    multiplied,
    of_tokens,
    over_heads,
    prescaled,
    scores_of,
    slots,
    stored_codes,
    stored_heads,
    taken_whole,
    varying_as,
)
from pallas_kernels.reference import KeyValueCodes, centered_keys

# Un-rounded P by the sum of rounded P: at most 1, but for the largest one's own rounding, a half step of e4m3. Scores that are
# computed again may differ in their last bits, which is a lot where they are large, and must not make more of it.
_LARGEST_LOG_P = math.log(17 / 16)

Rows = tuple[Array, Array, Array]  # of each query tile dO, log-sum-exp, and delta = rowsum(dO * O)


def backward(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    out: Float[Array, "B Sq N H"],
    lse: Float[Array, "B N Sq"],
    d_out: Float[Array, "B Sq N H"],
    pattern: TilePattern,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B Sk N H"], Float[Array, "B Sk N H"]]:
    """Gradients of q, k and v in q's dtype: straight-through, P un-rounded, zero at padding."""
    return _backward(stored_heads(q, k, v, pattern), out, lse, d_out, pattern)


def backward_to_codes(
    q: Float[Array, "B Sq N H"],
    codes: KeyValueCodes,
    out: Float[Array, "B Sq N H"],
    lse: Float[Array, "B N Sq"],
    d_out: Float[Array, "B Sq N H"],
    pattern: TilePattern,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B Sk N H"], Float[Array, "B Sk N H"]]:
    """`backward` from keys and values that are rounded already: the gradients of what they were rounded from."""
    return _backward(stored_codes(q, codes, pattern), out, lse, d_out, pattern)


def _backward(heads: Head, out: Array, lse: Array, d_out: Array, pattern: TilePattern) -> tuple[Array, Array, Array]:
    batch, _, num_heads, head_dim = d_out.shape
    q_valid, k_valid, tile_size = pattern.q_valid, pattern.k_valid, pattern.tile_size
    table, chunk = chunked_table(pattern)
    weights = key_weights(pattern)
    # Padding may hold anything, NaN too.
    out, d_out = (jnp.where(q_valid[None, :, None, None], x, 0) for x in (out, d_out))
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    lse, delta = (x.reshape(-1, *heads.q.shape[1:3]) for x in (lse, delta))

    def one_head(stored, table):
        stored_head, d_out, lse, delta = stored
        head = multiplied(stored_head)
        work = _whole_head if taken_whole(head) else functools.partial(_rows, chunk=chunk)
        rows = d_out.astype(head.v.dtype), lse, delta
        dq, dk, dv = work(head, rows, table, weights=weights, scale=head_dim**-0.5)
        return masked(dq, q_valid), masked(dk, k_valid, centered=pattern.centers_keys), masked(dv, k_valid)

    def masked(grad, ok, centered=False):
        grad = jnp.where(ok[:, None], grad.reshape(-1, head_dim), 0)
        if centered:  # taking the mean off is its own transpose, so a gradient goes back through it as keys came
            grad = centered_keys(grad[None, :, None], ok)[0, :, 0]
        return grad.astype(d_out.dtype)

    stored = heads, head_major(d_out, tile_size), lse, delta
    sizes = {
        "scores": 2 * chunk * tile_size**2,
        "numbers": 3 * heads.k[0].size,
    }  # sums of dK and dV; k and v in 16 bits
    grads = over_heads(one_head, stored, table, **sizes)
    dq, dk, dv = (x.reshape(batch, num_heads, -1, head_dim).transpose(0, 2, 1, 3) for x in grads)
    return dq, dk, dv


def _rows(
    head: Head, rows: Rows, table: Table, *, weights: Array, chunk: int, scale: float
) -> tuple[Array, Array, Array]:
    """A query tile after the other."""
    num_tiles, tile_size, head_dim = head.k.shape

    def row(grads, inputs):
        q, q_scale, tiles, count, d_out, lse, delta = inputs
        scaled_q, scale_left = prescaled(q, q_scale, scale)
        queries = _Queries(_dequantized(q, q_scale), d_out, _for_values(d_out, head), delta)

        def step(i, carry):
            dq, dk, dv = carry
            key_index, value_index = slots(tiles, count, i, chunk, num_tiles)
            keys, columns = keys_of(head, key_index)
            p = _probabilities(scores_of(scaled_q, scale_left, keys, columns), lse, weights[value_index])
            added = _products(p, queries, keys, columns, head.v[value_index].reshape(-1, head_dim))
            # Tiles of a row are distinct, and unused slots point past the end and are dropped: sums in a fixed order.
            dk, dv = (
                sums.at[value_index].add(more.reshape(chunk, tile_size, head_dim), mode="drop", unique_indices=True)
                for sums, more in ((dk, added[1]), (dv, added[2]))
            )
            return dq + added[0], dk, dv

        start = (varying_as((head, rows), jnp.zeros((tile_size, head_dim))), *grads)
        dq, dk, dv = lax.fori_loop(0, (count + chunk - 1) // chunk, step, start)
        return (dk, dv), dq * scale

    zeros = varying_as((head, rows), jnp.zeros((num_tiles, tile_size, head_dim)))
    (dk, dv), dq = lax.scan(row, (zeros, zeros), (head.q, head.q_scale, *table, *rows))
    return dq, dk * scale, dv


def _whole_head(head: Head, rows: Rows, table: Table, *, weights: Array, scale: float) -> tuple[Array, Array, Array]:
    num_keys, tile_size, head_dim = head.k.shape
    d_out, lse, delta = (x.reshape(-1, *x.shape[2:]) for x in rows)
    q = head.q.reshape(-1, head_dim)
    scaled_q, scale_left = prescaled(q, head.q_scale, scale)
    keys, columns = keys_of(head)
    p = _probabilities(scores_of(scaled_q, scale_left, keys, columns), lse, weights[:num_keys])
    p = jnp.where(listed(table, num_keys, tile_size), p, 0)
    queries = _Queries(_dequantized(q, head.q_scale), d_out, _for_values(d_out, head), delta)
    dq, dk, dv = _products(p, queries, keys, columns, head.v[:num_keys].reshape(-1, head_dim))
    return dq * scale, dk * scale, dv


class _Queries(NamedTuple):
    """What gradients of keys take of queries. q and dO are in the matmuls' dtype, delta is float32."""

    q: Float[Array, "Sq H"]
    d_out: Float[Array, "Sq H"]
    d_out_scaled: Float[Array, "Sq H"]
    delta: Float[Array, "Sq"]


def _dequantized(q: Array, q_scale: Array | None) -> Array:
    return q if q_scale is None else (q.astype(jnp.float32) * of_tokens(q_scale, q.shape[0])[:, None]).astype(q.dtype)


def _for_values(d_out: Array, head: Head) -> Array:
    """dO by V's scales, whose product with V's codes is that of dO and V. A whole dequantized V needn't be held so."""
    return d_out if head.v_scale is None else (d_out.astype(jnp.float32) * head.v_scale[None]).astype(d_out.dtype)


def _probabilities(scores: Array, lse: Array, weights: Array) -> Array:
    return jnp.exp(jnp.minimum(scores - lse[:, None], _LARGEST_LOG_P)) * weights.reshape(1, -1)


def _products(
    p: Array, queries: _Queries, keys: Array, columns: Array | None, values: Array
) -> tuple[Array, Array, Array]:
    """dQ, dK and dV of these queries and keys, the former two without the softmax scale. columns: scales of the keys."""
    dtype = keys.dtype
    ds = p * (matmul(queries.d_out_scaled, values, ((1,), (1,))) - queries.delta[:, None])
    for_keys = ds if columns is None else ds * columns[None]
    return (
        matmul(for_keys.astype(dtype), keys, ((1,), (0,))),
        matmul(ds.astype(dtype), queries.q, ((0,), (0,))),
        matmul(p.astype(dtype), queries.d_out, ((0,), (0,))),
    )
