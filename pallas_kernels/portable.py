"""Block-sparse attention in plain XLA, for any device: work and memory are those of the listed tiles, but for short heads.

For each query tile, its key tiles are gathered and reduced a chunk at a time with a running maximum (FlashAttention's
recurrence, arXiv 2205.14135), so no scores are ever held but those of one query tile and one chunk of keys, a head.

A head of few tokens is taken whole instead, all its pairs in one product and the tiles that aren't listed masked: the steps of
the loop would cost more than the pairs that it leaves out. An ordered pattern never is: sums over a whole head are in k's order.

Padding is masked as data, at no pass over the scores: a padded key repeats a valid key of its tile, so that it can't move a
maximum, its V is 0, and a weight of 0 keeps it out of the row sums. (Exact for scores below about 1e8: beyond, float32 sums
of the copy and of its source, taken in another order, may differ by more than exp can bear, and the row is NaN.)
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.padding import key_sources
from pallas_kernels.pattern import TilePattern
from pallas_kernels.platform import target_platform
from pallas_kernels.reference import (
    FP8_MAX,
    KeyValueCodes,
    centered_keys,
    key_value_codes,
    nearest_fp8,
    over_tokens,
    quantize_tokens,
    row_top,
)

# Keys reduced at a time: enough for a large matmul, few enough that their scores stay in a CPU's cache.
_CHUNK_KEYS = 2048
# Pairs of tokens of a head up to which it is taken whole: 512 x 512, 1 MiB of scores, which a CPU's cache holds too.
_WHOLE_HEAD_PAIRS = 2**18
# Un-rounded P by the sum of rounded P: at most 1, but for the largest one's own rounding, a half step of e4m3. Scores that are
# computed again may differ in their last bits, which is a lot where they are large, and must not make more of it.
_LARGEST_LOG_P = math.log(17 / 16)
# Scores held at a time off the CPU, where heads are taken together; on a CPU one head after the other is fastest.
_SCORE_BYTES = 256 * 2**20


class Head(NamedTuple):
    """Operands of one head in the dtype of the matmuls. q is 0 at padding, k a valid key of its tile, v is 0.

    v ends in a tile of zeros, for the unused slots of a row. The scales are None without quantization, V's also where its scales
    are those of groups: these are powers of two, and v has them multiplied in exactly.
    """

    q: Float[Array, "Tq tile H"]
    k: Float[Array, "Tk tile H"]
    v: Float[Array, "Tk+1 tile H"]
    q_scale: Float[Array, "Tq groups"] | None
    k_scale: Float[Array, "Tk groups"] | None
    v_scale: Float[Array, "H"] | None


class Table(NamedTuple):
    """Key tiles of one head, rows padded to whole chunks."""

    tiles: Int[Array, "Tq K"]
    counts: Int[Array, "Tq"]


def forward(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    pattern: TilePattern,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B N Sq"]]:
    """As `pallas_kernels.reference.attention`, but for P below 2**-15 of the maximum so far, where e4m3 has a fixed step.

    Such a P is rounded against the running maximum of its chunk, not the row's.
    """
    return _forward(q, _heads(q, k, v, pattern), pattern)


def forward_to_codes(
    q: Float[Array, "B Sq N H"], codes: KeyValueCodes, pattern: TilePattern
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B N Sq"]]:
    """`forward` to keys and values that are rounded already."""
    return _forward(q, _quantized_heads(q, codes, pattern), pattern)


def _forward(q: Array, heads: Head, pattern: TilePattern) -> tuple[Array, Array]:
    batch, seq, num_heads, head_dim = q.shape
    table, chunk = _chunked_table(pattern)
    one_head = functools.partial(
        _forward_head, weights=_weights(pattern), chunk=chunk, scale=head_dim**-0.5, ordered=pattern.ordered
    )
    out, lse = _over_heads(one_head, heads, table, chunk * pattern.tile_size**2)
    out = out.reshape(batch, num_heads, seq, head_dim).transpose(0, 2, 1, 3)
    out = jnp.where(pattern.q_valid[None, :, None, None], out, 0).astype(q.dtype)
    return out, jnp.where(pattern.q_valid[None, None], lse.reshape(batch, num_heads, seq), 0)


def _forward_head(
    head: Head, table: Table, *, weights: Array, chunk: int, scale: float, ordered: bool
) -> tuple[Array, Array]:
    tile_size, head_dim = head.q.shape[1:]
    quantized = head.q_scale is not None
    if not ordered and _taken_whole(head):
        return _forward_whole_head(head, table, weights=weights, scale=scale)

    def row(inputs):
        q, q_scale, tiles, count = inputs
        q, scale_left = _prescaled(q, q_scale, scale)

        def step(i, carry):
            top, total, acc = carry
            key_index, value_index = _slots(tiles, count, i, chunk, weights.shape[0] - 1)
            scores = _scores(head, q, q_scale, key_index, scale_left)
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
        start = _varying_as((q, head.k, head.v), start)
        top, total, acc = lax.fori_loop(0, (count + chunk - 1) // chunk, step, start)
        return _divided(head, acc, total, top)

    return lax.map(row, (head.q, head.q_scale, *table))


def _taken_whole(head: Head) -> bool:
    return math.prod(head.q.shape[:2]) * math.prod(head.k.shape[:2]) <= _WHOLE_HEAD_PAIRS


def _forward_whole_head(head: Head, table: Table, *, weights: Array, scale: float) -> tuple[Array, Array]:
    (num_tiles, tile_size, head_dim), num_keys = head.q.shape, head.k.shape[0]
    q, scale_left = _prescaled(head.q.reshape(-1, head_dim), head.q_scale, scale)
    scores = _scores(head, q, head.q_scale, None, scale_left)
    scores = jnp.where(_listed(table, num_keys, tile_size), scores, -jnp.inf)
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


def backward(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    out: Float[Array, "B Sq N H"],
    lse: Float[Array, "B N Sq"],
    d_out: Float[Array, "B Sq N H"],
    pattern: TilePattern,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B Sk N H"], Float[Array, "B Sk N H"]]:
    """Gradients of q, k and v from the forward's output and log-sum-exp: straight-through, P un-rounded, zero at padding."""
    return _backward(q, _heads(q, k, v, pattern), out, lse, d_out, pattern)


def backward_to_codes(
    q: Float[Array, "B Sq N H"],
    codes: KeyValueCodes,
    out: Float[Array, "B Sq N H"],
    lse: Float[Array, "B N Sq"],
    d_out: Float[Array, "B Sq N H"],
    pattern: TilePattern,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B Sk N H"], Float[Array, "B Sk N H"]]:
    """`backward` from keys and values that are rounded already: the gradients of what they were rounded from."""
    return _backward(q, _quantized_heads(q, codes, pattern), out, lse, d_out, pattern)


def _backward(
    q: Array, codes: Head, out: Array, lse: Array, d_out: Array, pattern: TilePattern
) -> tuple[Array, Array, Array]:
    batch, _, num_heads, head_dim = q.shape
    tile_size = pattern.tile_size
    table, chunk = _chunked_table(pattern)
    heads = _dequantized(codes)
    q_valid4 = pattern.q_valid[None, :, None, None]
    d_out32 = jnp.where(q_valid4, d_out, 0).astype(jnp.float32)
    delta = jnp.where(q_valid4, d_out32 * out.astype(jnp.float32), 0).sum(-1).transpose(0, 2, 1)
    rows = (
        _head_major(d_out32.astype(heads.v.dtype), tile_size),
        lse.reshape(-1, heads.q.shape[1], tile_size),
        delta.reshape(-1, heads.q.shape[1], tile_size),
    )
    one_head = functools.partial(_backward_head, weights=_weights(pattern), chunk=chunk, scale=head_dim**-0.5)
    grads = _over_heads(one_head, (heads, codes, rows), table, 2 * chunk * tile_size**2)

    def back(grad, ok, centered=False):
        grad = grad.reshape(batch, num_heads, ok.shape[0], head_dim).transpose(0, 2, 1, 3)
        grad = jnp.where(ok[None, :, None, None], grad, 0)
        # Taking the mean off is its own transpose, so a gradient goes back through it as keys came.
        return (centered_keys(grad, ok) if centered else grad).astype(q.dtype)

    dq, dk, dv = grads
    dk = back(dk, pattern.k_valid, centered=pattern.centers_keys)
    return back(dq, pattern.q_valid), dk, back(dv, pattern.k_valid)


def _backward_head(
    operands: tuple[Head, Head, tuple[Array, Array, Array]], table: Table, *, weights: Array, chunk: int, scale: float
) -> tuple[Array, Array, Array]:
    # Scores come from the codes, as in the forward: of dequantized operands in bf16 they would be off by 1e-2, and exp of them. The
    # products that are linear in those take them. rows: dO, log-sum-exp and delta of each query tile.
    head, codes, rows = operands
    num_tiles, tile_size, head_dim = head.k.shape
    if _taken_whole(head):
        return _backward_whole_head(operands, table, weights=weights, scale=scale)

    def row(grads, inputs):
        q, q_codes, q_scale, tiles, count, d_out, lse, delta = inputs
        scaled_q, scale_left = _prescaled(q_codes, q_scale, scale)

        def step(i, carry):
            dq, dk, dv = carry
            key_index, value_index = _slots(tiles, count, i, chunk, num_tiles)
            keys, values = head.k[key_index].reshape(-1, head_dim), head.v[value_index].reshape(-1, head_dim)
            scores = _scores(codes, scaled_q, q_scale, key_index, scale_left)
            p = jnp.exp(jnp.minimum(scores - lse[:, None], _LARGEST_LOG_P)) * weights[value_index].reshape(1, -1)
            dp = _matmul(d_out, values, ((1,), (1,)))
            ds = (p * (dp - delta[:, None])).astype(q.dtype)
            p = p.astype(q.dtype)
            # Tiles of a row are distinct, and unused slots point past the end and are dropped: sums in a fixed order.
            dk = dk.at[value_index].add(
                _matmul(ds, q, ((0,), (0,))).reshape(chunk, tile_size, head_dim), mode="drop", unique_indices=True
            )
            dv = dv.at[value_index].add(
                _matmul(p, d_out, ((0,), (0,))).reshape(chunk, tile_size, head_dim), mode="drop", unique_indices=True
            )
            return dq + _matmul(ds, keys, ((1,), (0,))), dk, dv

        start = (_varying_as((head, rows), jnp.zeros((tile_size, head_dim))), *grads)
        dq, dk, dv = lax.fori_loop(0, (count + chunk - 1) // chunk, step, start)
        return (dk, dv), dq * scale

    zeros = _varying_as((head, rows), jnp.zeros((num_tiles, tile_size, head_dim)))
    (dk, dv), dq = lax.scan(row, (zeros, zeros), (head.q, codes.q, codes.q_scale, *table, *rows))
    return dq, dk * scale, dv


def _backward_whole_head(
    operands: tuple[Head, Head, tuple[Array, Array, Array]], table: Table, *, weights: Array, scale: float
) -> tuple[Array, Array, Array]:
    head, codes, rows = operands
    num_keys, tile_size, head_dim = head.k.shape
    d_out, lse, delta = (x.reshape(-1, *x.shape[2:]) for x in rows)
    q, k, v = (x.reshape(-1, head_dim) for x in (head.q, head.k, head.v[:num_keys]))
    scaled_q, scale_left = _prescaled(codes.q.reshape(-1, head_dim), codes.q_scale, scale)
    scores = _scores(codes, scaled_q, codes.q_scale, None, scale_left)
    p = jnp.exp(jnp.minimum(scores - lse[:, None], _LARGEST_LOG_P)) * weights[:num_keys].reshape(1, -1)
    p = jnp.where(_listed(table, num_keys, tile_size), p, 0)
    ds = (p * (_matmul(d_out, v, ((1,), (1,))) - delta[:, None])).astype(q.dtype)
    dv = _matmul(p.astype(q.dtype), d_out, ((0,), (0,)))
    grads = _matmul(ds, k, ((1,), (0,))) * scale, _matmul(ds, q, ((0,), (0,))) * scale, dv
    dq, dk, dv = (x.reshape(-1, tile_size, head_dim) for x in grads)
    return dq, dk, dv


def _matmul(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _varying_as(operands: Any, start: Any) -> Any:
    """Initial float32 values of a loop, varying over the axes of an enclosing `shard_map` as what the loop makes of them does."""
    parts = [x.reshape(-1)[0].astype(jnp.float32) for x in jax.tree.leaves(operands)]
    nothing = jnp.where(False, sum(parts), 0.0)  # a zero that depends on the operands in type only, NaN or not
    return jax.tree.map(lambda x: x + nothing, start)


def _slots(tiles: Array, count: Array, step: Array, chunk: int, num_tiles: int) -> tuple[Array, Array]:
    """Key tiles of a chunk, and the same for V. An unused slot repeats a used key tile, and has V's tile of zeros at the end."""
    slot = step * chunk
    index, used = lax.dynamic_slice(tiles, (slot,), (chunk,)), slot + jnp.arange(chunk) < count
    return jnp.where(used, index, index[0]), jnp.where(used, index, num_tiles)


def _weights(pattern: TilePattern) -> Float[Array, "Tk+1 tile"]:
    """1 for a valid key, 0 for padding and in the tile of zeros."""
    return jnp.pad(pattern.k_valid.reshape(-1, pattern.tile_size).astype(jnp.float32), ((0, 1), (0, 0)))


def _prescaled(q: Array, q_scale: Array | None, scale: float) -> tuple[Array, float]:
    """q with the softmax scale multiplied in, and what is left of it: cheaper than scaling scores, and exact enough in float32."""
    if q.dtype == jnp.float32 and q_scale is None:
        return q * scale, 1.0
    return q, scale


def _listed(table: Table, num_keys: int, tile_size: int) -> Bool[Array, "Sq Sk"]:
    """Which query of a head attends which key, a tile at a time: padding in a listed tile is listed."""
    used = jnp.arange(table.tiles.shape[1])[None] < table.counts[:, None]
    tiles = ((table.tiles[:, :, None] == jnp.arange(num_keys)[None, None]) & used[:, :, None]).any(1)
    return jnp.repeat(jnp.repeat(tiles, tile_size, axis=0), tile_size, axis=1)


def _scores(head: Head, q: Array, q_scale: Array | None, index: Array | None, scale: float) -> Float[Array, "Sq Sk"]:
    """float32 scores of queries and the key tiles at `index`, or all: q `[Sq, H]` prescaled, its scales of as many equal groups."""
    keys, k_scale = head.k, head.k_scale
    if index is not None:
        keys, k_scale = keys[index], None if k_scale is None else k_scale[index]
    keys = keys.reshape(-1, q.shape[-1])
    scores = _matmul(q, keys, ((1,), (1,)))
    if q_scale is None or k_scale is None:
        return scores if scale == 1 else scores * scale
    rows = jnp.repeat(q_scale.reshape(-1) * scale, q.shape[0] // q_scale.size)
    columns = jnp.repeat(k_scale.reshape(-1), keys.shape[0] // k_scale.size)
    return (scores * rows[:, None]) * columns[None]  # in turn: the product of two large scales alone could overflow


def _chunked_table(pattern: TilePattern) -> tuple[Table, int]:
    """The table, with a leading axis of heads where it had one, and the key tiles a chunk."""
    width = pattern.key_tiles.shape[-1]
    most = max(1, _CHUNK_KEYS // pattern.tile_size)
    if pattern.ordered:
        chunk = most  # whatever the width
    else:
        sizes = range(max(1, most // 2), most + most // 2 + 1)
        chunk = min(sizes, key=lambda size: (-(-width // size) * size, -size))  # least padding, then fewest steps
    pad = -width % chunk
    tiles = jnp.pad(pattern.key_tiles, ((0, 0),) * (pattern.key_tiles.ndim - 1) + ((0, pad),))
    return Table(tiles, pattern.counts), chunk


def _heads(q: Array, k: Array, v: Array, pattern: TilePattern) -> Head:
    """The operands of all heads, each with a leading axis of B * N."""
    k_valid = pattern.k_valid
    if pattern.centers_keys:
        k = centered_keys(k, k_valid)
    if pattern.tokens_per_scale is not None:
        per_scale, per_value_scale = pattern.tokens_per_scale, pattern.tokens_per_value_scale
        codes = key_value_codes(k, v, k_valid, tokens_per_scale=per_scale, tokens_per_value_scale=per_value_scale)
        return _quantized_heads(q, codes, pattern)
    # Padding may hold anything, NaN too: it is replaced, not multiplied away.
    q, v = (jnp.where(ok[None, :, None, None], x, 0) for x, ok in ((q, pattern.q_valid), (v, k_valid)))
    return _head(q, k, v, pattern)


def _quantized_heads(q: Array, codes: KeyValueCodes, pattern: TilePattern) -> Head:
    """The same with keys and values that are rounded already."""
    batch, _, num_heads, _ = q.shape
    per_scale = pattern.tokens_per_scale
    assert per_scale is not None
    q, q_scale = quantize_tokens(q, pattern.q_valid, per_scale)
    # A group of padding alone takes its source's scale with its values: the copy's scores are then exactly the source's.
    k_scale = jnp.take(codes.k_scale, key_sources(pattern)[::per_scale] // per_scale, axis=1)
    groups = pattern.tile_size // per_scale
    q_scale, k_scale = (s.transpose(0, 2, 1).reshape(batch * num_heads, -1, groups) for s in (q_scale, k_scale))
    v, v_scale = codes.v, None
    if pattern.tokens_per_value_scale is None:
        v_scale = codes.v_scale.reshape(batch * num_heads, -1)
    else:
        v = v.astype(_matmul_dtype(v.dtype))
        v = v * over_tokens(codes.v_scale, v.shape[1]).astype(v.dtype)
    return _head(q, codes.k, v, pattern)._replace(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)


def _head(q: Array, k: Array, v: Array, pattern: TilePattern) -> Head:
    dtype = _matmul_dtype(q.dtype)
    k = jnp.take(k, key_sources(pattern), axis=1)
    q, k, v = (_head_major(x.astype(dtype), pattern.tile_size) for x in (q, k, v))
    return Head(q, k, jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0))), None, None, None)


def _matmul_dtype(dtype: Any) -> Any:
    """float32 on a CPU, where it is fastest; elsewhere the operands' own, and bf16 for e4m3 values, which it holds exactly."""
    if target_platform() == "cpu":
        return jnp.float32
    return jnp.bfloat16 if dtype.itemsize == 1 else dtype


def _dequantized(heads: Head) -> Head:
    """Operands as they are after quantization, in place of values and scales."""
    if heads.q_scale is None or heads.k_scale is None:
        return heads

    def tokens(x, scale):
        rows = jnp.repeat(scale, x.shape[2] // scale.shape[2], axis=2)
        return (x.astype(jnp.float32) * rows[..., None]).astype(x.dtype)

    q, k = tokens(heads.q, heads.q_scale), tokens(heads.k, heads.k_scale)
    v = heads.v
    if heads.v_scale is not None:
        v = (v.astype(jnp.float32) * heads.v_scale[:, None, None]).astype(v.dtype)
    return heads._replace(q=q, k=k, v=v, q_scale=None, k_scale=None, v_scale=None)


def _head_major(x: Float[Array, "B S N H"], tile_size: int) -> Float[Array, "BN T tile H"]:
    batch, seq, num_heads, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch * num_heads, seq // tile_size, tile_size, head_dim)


def _over_heads(one_head: Callable[[Any, Table], Any], operands: Any, table: Table, scores: int) -> Any:
    """`one_head` for every head: one after the other on a CPU, else as many together as `_SCORE_BYTES` allows."""
    together = None if target_platform() == "cpu" else max(1, _SCORE_BYTES // (4 * scores))
    if table.tiles.ndim == 2:  # shared: kept unbatched, so that loops end where its rows do
        return lax.map(lambda mapped: one_head(mapped, table), operands, batch_size=together)
    batch = jax.tree.leaves(operands)[0].shape[0] // table.tiles.shape[0]
    table = jax.tree.map(lambda x: jnp.tile(x, (batch,) + (1,) * (x.ndim - 1)), table)
    return lax.map(lambda mapped: one_head(*mapped), (operands, table), batch_size=together)
