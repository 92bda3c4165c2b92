"""Block-sparse attention in plain XLA, for any device: work and memory are those of the listed tiles.

For each query tile, its key tiles are gathered and reduced a chunk at a time with a running maximum (FlashAttention's
recurrence, arXiv 2205.14135), so no scores are ever held but those of one query tile and one chunk of keys, a head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platform import target_platform
from pallas_kernels.reference import FP8_MAX, quantize_channels, quantize_tokens, round_to_fp8

# Keys reduced at a time: enough for a large matmul, few enough that their scores stay in a CPU's cache.
_CHUNK_KEYS = 2048
# Scores held at a time off the CPU, where heads are taken together; on a CPU one head after the other is fastest.
_SCORE_BYTES = 256 * 2**20


class Head(NamedTuple):
    """Operands of one head, in the dtype of the matmuls, 0 at padding. The scales are None without quantization."""

    q: Float[Array, "Tq tile H"]
    k: Float[Array, "Tk tile H"]
    v: Float[Array, "Tk tile H"]
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
    *,
    key_tiles: Int[Array, "*N Tq K"],
    counts: Int[Array, "*N Tq"],
    q_valid: Bool[Array, "Sq"],
    k_valid: Bool[Array, "Sk"],
    tile_size: int,
    tokens_per_scale: int | None,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B N Sq"]]:
    """As `pallas_kernels.reference.attention`. P is rounded against the running maximum of its chunk, not the row's."""
    batch, seq, num_heads, head_dim = q.shape
    table, chunk = _chunked_table(key_tiles, counts, tile_size)
    heads = _heads(q, k, v, q_valid, k_valid, tile_size, tokens_per_scale)
    valid = k_valid.reshape(-1, tile_size)
    one_head = functools.partial(_forward_head, valid=valid, chunk=chunk, scale=head_dim**-0.5)
    out, lse = _over_heads(one_head, heads, table, tile_size * chunk * tile_size)
    out = out.reshape(batch, num_heads, seq, head_dim).transpose(0, 2, 1, 3)
    out = jnp.where(q_valid[None, :, None, None], out, 0).astype(q.dtype)
    return out, jnp.where(q_valid[None, None], lse.reshape(batch, num_heads, seq), 0)


def _forward_head(head: Head, table: Table, *, valid: Array, chunk: int, scale: float) -> tuple[Array, Array]:
    tile_size, head_dim = head.q.shape[1:]
    quantized = head.q_scale is not None

    def row(inputs):
        q, q_scale, tiles, count = inputs

        def step(i, carry):
            top, total, acc = carry
            index, used = _slots(tiles, count, i, chunk)
            scores = _scores(q, q_scale, head, index, scale)
            scores = jnp.where((valid[index] & used[:, None]).reshape(1, -1), scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(1))
            p = jnp.exp(scores - new_top[:, None])
            if quantized:
                p = round_to_fp8(p * FP8_MAX)
            shrink = jnp.exp(top - new_top)
            pv = jnp.matmul(
                p.astype(head.v.dtype), head.v[index].reshape(-1, head_dim), preferred_element_type=jnp.float32
            )
            return new_top, total * shrink + p.astype(jnp.float32).sum(1), acc * shrink[:, None] + pv

        start = (jnp.full(tile_size, -jnp.inf), jnp.zeros(tile_size), jnp.zeros((tile_size, head_dim)))
        top, total, acc = lax.fori_loop(0, (count + chunk - 1) // chunk, step, start)
        out = acc / total[:, None]
        if head.v_scale is not None:
            out, total = out * head.v_scale[None], total / FP8_MAX
        return out, top + jnp.log(total)

    return lax.map(row, (head.q, head.q_scale, *table))


def backward(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    out: Float[Array, "B Sq N H"],
    lse: Float[Array, "B N Sq"],
    d_out: Float[Array, "B Sq N H"],
    *,
    key_tiles: Int[Array, "*N Tq K"],
    counts: Int[Array, "*N Tq"],
    q_valid: Bool[Array, "Sq"],
    k_valid: Bool[Array, "Sk"],
    tile_size: int,
    tokens_per_scale: int | None,
) -> tuple[Float[Array, "B Sq N H"], Float[Array, "B Sk N H"], Float[Array, "B Sk N H"]]:
    """Gradients of q, k and v from the forward's output and log-sum-exp: straight-through, P un-rounded, zero at padding."""
    num_heads, head_dim = q.shape[2:]
    table, chunk = _chunked_table(key_tiles, counts, tile_size)
    heads = _dequantized(_heads(q, k, v, q_valid, k_valid, tile_size, tokens_per_scale))
    q_valid4 = q_valid[None, :, None, None]
    d_out32 = jnp.where(q_valid4, d_out, 0).astype(jnp.float32)
    delta = jnp.where(q_valid4, d_out32 * out.astype(jnp.float32), 0).sum(-1).transpose(0, 2, 1)
    rows = (
        _head_major(d_out32.astype(heads.v.dtype), tile_size),
        lse.reshape(-1, heads.q.shape[1], tile_size),
        delta.reshape(-1, heads.q.shape[1], tile_size),
    )
    valid = k_valid.reshape(-1, tile_size)
    one_head = functools.partial(_backward_head, valid=valid, chunk=chunk, scale=head_dim**-0.5)
    grads = _over_heads(one_head, (heads, rows), table, 2 * tile_size * chunk * tile_size)

    def back(grad, like, ok):
        grad = grad.reshape(like.shape[0], num_heads, like.shape[1], head_dim).transpose(0, 2, 1, 3)
        return jnp.where(ok[None, :, None, None], grad, 0).astype(like.dtype)

    return back(grads[0], q, q_valid), back(grads[1], k, k_valid), back(grads[2], v, k_valid)


def _backward_head(
    operands: tuple[Head, tuple[Array, Array, Array]], table: Table, *, valid: Array, chunk: int, scale: float
) -> tuple[Array, Array, Array]:
    head, rows = operands  # rows: dO, log-sum-exp and delta of each query tile
    num_tiles, tile_size, head_dim = head.k.shape

    def matmul(a, b, contract):
        return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)

    def row(grads, inputs):
        q, tiles, count, d_out, lse, delta = inputs

        def step(i, carry):
            dq, dk, dv = carry
            index, used = _slots(tiles, count, i, chunk)
            keys, values = head.k[index].reshape(-1, head_dim), head.v[index].reshape(-1, head_dim)
            mask = (valid[index] & used[:, None]).reshape(1, -1)
            scores = _scores(q, None, head, index, scale)
            p = jnp.where(mask, jnp.exp(jnp.where(mask, scores - lse[:, None], 0)), 0)
            dp = matmul(d_out, values, ((1,), (1,)))
            ds = (p * (dp - delta[:, None]) * scale).astype(q.dtype)
            p = p.astype(q.dtype)
            # Tiles of a row are distinct, and unused slots point past the end and are dropped: sums in a fixed order.
            where = jnp.where(used, index, num_tiles)
            dk = dk.at[where].add(
                matmul(ds, q, ((0,), (0,))).reshape(chunk, tile_size, head_dim), mode="drop", unique_indices=True
            )
            dv = dv.at[where].add(
                matmul(p, d_out, ((0,), (0,))).reshape(chunk, tile_size, head_dim), mode="drop", unique_indices=True
            )
            return dq + matmul(ds, keys, ((1,), (0,))), dk, dv

        start = (jnp.zeros((tile_size, head_dim)), *grads)
        dq, dk, dv = lax.fori_loop(0, (count + chunk - 1) // chunk, step, start)
        return (dk, dv), dq

    zeros = jnp.zeros((num_tiles, tile_size, head_dim))
    (dk, dv), dq = lax.scan(row, (zeros, zeros), (head.q, *table, *rows))
    return dq, dk, dv


def _slots(tiles: Array, count: Array, step: Array, chunk: int) -> tuple[Array, Array]:
    """Key tiles of a chunk, and which of them are used."""
    slot = step * chunk
    return lax.dynamic_slice(tiles, (slot,), (chunk,)), slot + jnp.arange(chunk) < count


def _scores(q: Array, q_scale: Array | None, head: Head, index: Array, scale: float) -> Array:
    """float32 `[tile, chunk * tile]` of a query tile and the key tiles at `index`."""
    keys = head.k[index].reshape(-1, q.shape[-1])
    scores = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if q_scale is None or head.k_scale is None:
        return scores * scale
    rows = jnp.repeat(q_scale * scale, q.shape[0] // q_scale.shape[0])
    columns = jnp.repeat(head.k_scale[index].reshape(-1), q.shape[0] // head.k_scale.shape[-1])
    return scores * (rows[:, None] * columns[None])


def _chunked_table(key_tiles: Array, counts: Array, tile_size: int) -> tuple[Table, int]:
    """The table, with a leading axis of heads where it had one, and the key tiles a chunk."""
    width = key_tiles.shape[-1]
    most = max(1, _CHUNK_KEYS // tile_size)
    sizes = range(max(1, most // 2), most + most // 2 + 1)
    chunk = min(sizes, key=lambda size: (-(-width // size) * size, -size))  # least padding, then fewest steps
    pad = -width % chunk
    return Table(jnp.pad(key_tiles, ((0, 0),) * (key_tiles.ndim - 1) + ((0, pad),)), counts), chunk


def _heads(
    q: Array,
    k: Array,
    v: Array,
    q_valid: Array,
    k_valid: Array,
    tile_size: int,
    tokens_per_scale: int | None,
) -> Head:
    """The operands of all heads, each with a leading axis of B * N."""
    batch, _, num_heads, _ = q.shape
    # Padding may hold anything, NaN too: it is replaced, not multiplied away.
    q, k, v = (jnp.where(ok[None, :, None, None], x, 0) for x, ok in ((q, q_valid), (k, k_valid), (v, k_valid)))
    q_scale = k_scale = v_scale = None
    if tokens_per_scale is not None:
        (q, q_scale), (k, k_scale) = (
            quantize_tokens(x, ok, tokens_per_scale) for x, ok in ((q, q_valid), (k, k_valid))
        )
        v, v_scale = quantize_channels(v, k_valid)
        groups = tile_size // tokens_per_scale
        q_scale, k_scale = (s.transpose(0, 2, 1).reshape(batch * num_heads, -1, groups) for s in (q_scale, k_scale))
        v_scale = v_scale.reshape(batch * num_heads, -1)
    dtype = _matmul_dtype(q.dtype)
    q, k, v = (_head_major(x.astype(dtype), tile_size) for x in (q, k, v))
    return Head(q, k, v, q_scale, k_scale, v_scale)


def _matmul_dtype(dtype: Any) -> Any:
    """float32 on a CPU, where it is fastest; elsewhere the operands' own, and bf16 for e4m3 values, which it holds exactly."""
    if target_platform() == "cpu":
        return jnp.float32
    return jnp.bfloat16 if dtype.itemsize == 1 else dtype


def _dequantized(heads: Head) -> Head:
    """Operands as they are after quantization, in place of values and scales."""
    if heads.q_scale is None or heads.k_scale is None or heads.v_scale is None:
        return heads

    def tokens(x, scale):
        rows = jnp.repeat(scale, x.shape[2] // scale.shape[2], axis=2)
        return (x.astype(jnp.float32) * rows[..., None]).astype(x.dtype)

    q, k = tokens(heads.q, heads.q_scale), tokens(heads.k, heads.k_scale)
    v = (heads.v.astype(jnp.float32) * heads.v_scale[:, None, None]).astype(heads.v.dtype)
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
