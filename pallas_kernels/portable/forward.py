"""Output and log-sum-exp of attention over the listed tiles.

For each query tile its key tiles are gathered and reduced a chunk at a time with a running maximum (FlashAttention's recurrence,
arXiv 2205.14135), so no scores are ever held but those of one query tile and one chunk of keys, a head.

A head of few tokens is taken whole instead, all its pairs in one product and the tiles that aren't listed masked: the steps of
the loop would cost more than the pairs that it leaves out. An ordered pattern never is: sums over a whole head are in k's order.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.pattern import TilePattern
from pallas_kernels.portable.head import (
    Head,
    Table,
    chunked_table,
    key_weights,
    keys_of,
    listed,
    multiplied,
    over_heads,
    prescaled,
    scores_of,
    slots,
    stored_codes,
    stored_heads,
    taken_whole,
    varying_as,
)
from pallas_kernels.reference import FP8_MAX, KeyValueCodes, nearest_fp8, row_top


def forward(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    pattern: TilePattern,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B N Sq"]]:
    """As `pallas_kernels.reference.attention`, but for P below 2**-15 of the maximum so far, where e4m3 has a fixed step.

    Such a P is rounded against the running maximum of its chunk, not the row's.
    """
    return _forward(q, stored_heads(q, k, v, pattern), pattern)


def forward_to_codes(
    q: Float[Array, "B Sq N H"], codes: KeyValueCodes, pattern: TilePattern
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B N Sq"]]:
    """`forward` to keys and values that are rounded already."""
    return _forward(q, stored_codes(q, codes, pattern), pattern)


def _forward(q: Array, heads: Head, pattern: TilePattern) -> tuple[Array, Array]:
    batch, seq, num_heads, head_dim = q.shape
    table, chunk = chunked_table(pattern)
    weights = key_weights(pattern)

    def one_head(stored, table):
        head = multiplied(stored)
        work = _whole_head if not pattern.ordered and taken_whole(head) else functools.partial(_rows, chunk=chunk)
        out, lse = work(head, table, weights=weights, scale=head_dim**-0.5)
        return out.astype(q.dtype), lse

    out, lse = over_heads(
        one_head, heads, table, scores=chunk * pattern.tile_size**2, numbers=heads.k[0].size
    )  # k and v in 16 bits
    out = out.reshape(batch, num_heads, seq, head_dim).transpose(0, 2, 1, 3)
    out = jnp.where(pattern.q_valid[None, :, None, None], out, 0)
    return out, jnp.where(pattern.q_valid[None, None], lse.reshape(batch, num_heads, seq), 0)


def _rows(head: Head, table: Table, *, weights: Array, chunk: int, scale: float) -> tuple[Array, Array]:
    """A query tile after the other."""
    tile_size, head_dim = head.q.shape[1:]
    quantized = head.q_scale is not None

    def row(inputs):
        q, q_scale, tiles, count = inputs
        q, scale_left = prescaled(q, q_scale, scale)

        def step(i, carry):
            top, total, acc = carry
            key_index, value_index = slots(tiles, count, i, chunk, weights.shape[0] - 1)
            scores = scores_of(q, scale_left, *keys_of(head, key_index))
            new_top = jnp.maximum(top, row_top(scores.max(1)))
            p = jnp.exp(scores - new_top[:, None])
            if quantized:
                p = nearest_fp8(p * FP8_MAX)
            shrink = jnp.exp(top - new_top)
            pv = jnp.matmul(
                p.astype(head.v.dtype), head.v[value_index].reshape(-1, head_dim), preferred_element_type=jnp.float32
            )
            p = p * weights[value_index].reshape(1, -1)
            return new_top, total * shrink + p.sum(1), acc * shrink[:, None] + pv

        start = (jnp.full(tile_size, -jnp.inf), jnp.zeros(tile_size), jnp.zeros((tile_size, head_dim)))
        start = varying_as((q, head.k, head.v), start)
        top, total, acc = lax.fori_loop(0, (count + chunk - 1) // chunk, step, start)
        return _divided(head, acc, total, top)

    return lax.map(row, (head.q, head.q_scale, *table))


def _whole_head(head: Head, table: Table, *, weights: Array, scale: float) -> tuple[Array, Array]:
    (num_tiles, tile_size, head_dim), num_keys = head.q.shape, head.k.shape[0]
    q, scale_left = prescaled(head.q.reshape(-1, head_dim), head.q_scale, scale)
    scores = scores_of(q, scale_left, *keys_of(head))
    scores = jnp.where(listed(table, num_keys, tile_size), scores, -jnp.inf)
    top = row_top(scores.max(1))
    p = jnp.exp(scores - top[:, None])
    if head.q_scale is not None:
        p = nearest_fp8(p * FP8_MAX)
    values = head.v[:num_keys].reshape(-1, head_dim)
    out = jnp.matmul(p.astype(values.dtype), values, preferred_element_type=jnp.float32)
    total = (p * weights[:num_keys].reshape(1, -1)).sum(1)
    out, lse = _divided(head, out, total, top)
    return out.reshape(num_tiles, tile_size, head_dim), lse.reshape(num_tiles, tile_size)


def _divided(head: Head, out: Array, total: Array, top: Array) -> tuple[Array, Array]:
    """Output and log-sum-exp of rows from sums of P V and of P, as it is stored."""
    out = out / total[:, None]
    if head.v_scale is not None:
        out = out * head.v_scale[None]
    return out, top + jnp.log(total if head.q_scale is None else total / FP8_MAX)
