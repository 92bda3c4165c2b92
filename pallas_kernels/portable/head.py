"""What one head attends: operands as they are stored, one head's as they are multiplied, its table of tiles, its scores.

Of all heads only what is stored is whole in memory: codes in FP8, a byte a number. What is made of it, and the gradients in
float32, is there for the heads that are worked on.

Padding is masked as data, at no pass over the scores: a padded key repeats a valid key of its tile, so that it can't move a
maximum, its V is 0, and a weight of 0 keeps it out of the row sums. (Exact for scores below about 1e8: beyond, float32 sums
of the copy and of its source, taken in another order, may differ by more than exp can bear, and the row is NaN.)
"""

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
from pallas_kernels.reference import FP8, KeyValueCodes, centered_keys, key_value_codes, over_tokens, quantize_tokens

# Keys reduced at a time: enough for a large matmul, few enough that their scores stay in a CPU's cache.
_CHUNK_KEYS = 2048
# Pairs of tokens of a head up to which it is taken whole: 512 x 512, 1 MiB of scores, which a CPU's cache holds too.
_WHOLE_HEAD_PAIRS = 2**18
# What heads that are taken together may hold, scores and operands; on a CPU one head after the other is fastest.
_SCORE_BYTES = 256 * 2**20
_OPERAND_BYTES = 5 * 2**29  # all of Wan2.1's at 480p, half of those of 14B at 720p


class Head(NamedTuple):
    """Operands of one head. q is 0 at padding, k a valid key of its tile, v is 0.

    As stored: codes as bytes, or numbers in the operands' dtype. As multiplied (`multiplied`): in the dtype of the matmuls, v with
    a tile of zeros more, for the unused slots of a row, and with V's scales multiplied in where they are those of groups, which
    are powers of two. Without quantization there are no scales.
    """

    q: Float[Array, "Tq tile H"]
    k: Float[Array, "Tk tile H"]
    v: Float[Array, "Tk tile H"]
    q_scale: Float[Array, "Tq groups"] | None = None
    k_scale: Float[Array, "Tk groups"] | None = None
    v_scale: Float[Array, "H"] | None = None
    v_group_scale: Float[Array, "v_groups H"] | None = None


class Table(NamedTuple):
    """Key tiles of one head, rows padded to whole chunks."""

    tiles: Int[Array, "Tq K"]
    counts: Int[Array, "Tq"]


def stored_heads(q: Array, k: Array, v: Array, pattern: TilePattern) -> Head:
    """The operands of all heads, each with a leading axis of B * N."""
    k_valid = pattern.k_valid
    if pattern.centers_keys:
        k = centered_keys(k, k_valid)
    if pattern.tokens_per_scale is not None:
        per_scale, per_value_scale = pattern.tokens_per_scale, pattern.tokens_per_value_scale
        codes = key_value_codes(k, v, k_valid, tokens_per_scale=per_scale, tokens_per_value_scale=per_value_scale)
        return stored_codes(q, codes, pattern)
    # Padding may hold anything, NaN too: it is replaced, not multiplied away.
    q, v = (jnp.where(ok[None, :, None, None], x, 0) for x, ok in ((q, pattern.q_valid), (v, k_valid)))
    return _head(q, k, v, pattern)


def stored_codes(q: Array, codes: KeyValueCodes, pattern: TilePattern) -> Head:
    """The same with keys and values that are rounded already."""
    batch, _, num_heads, _ = q.shape
    per_scale = pattern.tokens_per_scale
    assert per_scale is not None
    q, q_scale = quantize_tokens(q, pattern.q_valid, per_scale)
    # A group of padding alone takes its source's scale with its values: the copy's scores are then exactly the source's.
    k_scale = jnp.take(codes.k_scale, key_sources(pattern)[::per_scale] // per_scale, axis=1)
    groups = pattern.tile_size // per_scale
    q_scale, k_scale = (s.transpose(0, 2, 1).reshape(batch * num_heads, -1, groups) for s in (q_scale, k_scale))
    v_scale = codes.v_scale.transpose(0, 2, 1, 3).reshape(batch * num_heads, *codes.v_scale.shape[1::2])
    # XLA for CPUs has no e4m3 of its own and would widen all of it to take a slice: bytes it leaves.
    q, k, v = (lax.bitcast_convert_type(x, jnp.uint8) for x in (q, codes.k, codes.v))
    stored = _head(q, k, v, pattern)._replace(q_scale=q_scale, k_scale=k_scale)
    if pattern.tokens_per_value_scale is None:
        return stored._replace(v_scale=v_scale[:, 0])
    return stored._replace(v_group_scale=v_scale)


def _head(q: Array, k: Array, v: Array, pattern: TilePattern) -> Head:
    k = jnp.take(k, key_sources(pattern), axis=1)
    return Head(*(head_major(x, pattern.tile_size) for x in (q, k, v)))


def head_major(x: Float[Array, "B S N H"], tile_size: int) -> Float[Array, "BN T tile H"]:
    batch, seq, num_heads, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch * num_heads, seq // tile_size, tile_size, head_dim)


def multiplied(stored: Head) -> Head:
    """One head's operands for the matmuls."""
    quantized = stored.q_scale is not None
    q, k, v = (lax.bitcast_convert_type(x, FP8) if quantized else x for x in stored[:3])
    dtype = _matmul_dtype(q.dtype)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    if stored.v_group_scale is not None:
        v = v * over_tokens(stored.v_group_scale[None], v.shape[0])[0][:, None].astype(dtype)
    v = jnp.pad(v, ((0, 1), (0, 0), (0, 0)))
    return Head(q, k, v, stored.q_scale, stored.k_scale, stored.v_scale)


def _matmul_dtype(dtype: Any) -> Any:
    """float32 on a CPU, where it is fastest; elsewhere the operands' own, and bf16 for e4m3 values, which it holds exactly."""
    if target_platform() == "cpu":
        return jnp.float32
    return jnp.bfloat16 if dtype.itemsize == 1 else dtype


def taken_whole(head: Head) -> bool:
    """Whether all pairs of a head's tokens are computed at once, and those that aren't listed masked."""
    return math.prod(head.q.shape[:2]) * math.prod(head.k.shape[:2]) <= _WHOLE_HEAD_PAIRS


def chunked_table(pattern: TilePattern) -> tuple[Table, int]:
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


def over_heads(one_head: Callable[[Any, Table], Any], operands: Any, table: Table, *, scores: int, numbers: int) -> Any:
    """`one_head` for every head: one after the other on a CPU, else as many together as memory is given for.

    scores, numbers: float32 numbers that a head holds of scores, and of the rest.
    """
    heads = jax.tree.leaves(operands)[0].shape[0]
    together = None
    if target_platform() != "cpu":
        most = max(1, min(_SCORE_BYTES // (4 * scores), _OPERAND_BYTES // (4 * numbers), heads))
        together = -(-heads // -(-heads // most))  # as few rounds, of equally many
    if table.tiles.ndim == 2:  # shared: kept unbatched, so that loops end where its rows do
        return lax.map(lambda mapped: one_head(mapped, table), operands, batch_size=together)
    batch = heads // table.tiles.shape[0]
    table = jax.tree.map(lambda x: jnp.tile(x, (batch,) + (1,) * (x.ndim - 1)), table)
    return lax.map(lambda mapped: one_head(*mapped), (operands, table), batch_size=together)


def key_weights(pattern: TilePattern) -> Float[Array, "Tk+1 tile"]:
    """1 for a valid key, 0 for padding and in the tile of zeros."""
    return jnp.pad(pattern.k_valid.reshape(-1, pattern.tile_size).astype(jnp.float32), ((0, 1), (0, 0)))


def slots(tiles: Array, count: Array, step: Array, chunk: int, num_tiles: int) -> tuple[Array, Array]:
    """Key tiles of a chunk, and the same for V. An unused slot repeats a used key tile, and has V's tile of zeros at the end."""
    slot = step * chunk
    index, used = lax.dynamic_slice(tiles, (slot,), (chunk,)), slot + jnp.arange(chunk) < count
    return jnp.where(used, index, index[0]), jnp.where(used, index, num_tiles)


def listed(table: Table, num_keys: int, tile_size: int) -> Bool[Array, "Sq Sk"]:
    """Which query of a head attends which key, a tile at a time: padding in a listed tile is listed."""
    used = jnp.arange(table.tiles.shape[1])[None] < table.counts[:, None]
    tiles = ((table.tiles[:, :, None] == jnp.arange(num_keys)[None, None]) & used[:, :, None]).any(1)
    return jnp.repeat(jnp.repeat(tiles, tile_size, axis=0), tile_size, axis=1)


def keys_of(head: Head, index: Array | None = None) -> tuple[Float[Array, "Sk H"], Float[Array, "Sk"] | None]:
    """Keys of the tiles at `index`, or of all, and the scale of each."""
    keys, scale = head.k, head.k_scale
    if index is not None:
        keys, scale = keys[index], None if scale is None else scale[index]
    return keys.reshape(-1, keys.shape[-1]), None if scale is None else of_tokens(scale, math.prod(keys.shape[:-1]))


def of_tokens(scale: Float[Array, "*groups"], tokens: int) -> Float[Array, "S"]:
    """Scales of equal groups, in order, at each of their tokens."""
    return jnp.repeat(scale.reshape(-1), tokens // scale.size)


def prescaled(q: Array, q_scale: Array | None, scale: float) -> tuple[Array, Float[Array, "Sq"] | float]:
    """q `[Sq, H]` with the softmax scale multiplied in where that is exact enough, in float32: cheaper than scaling scores. And
    what is left to multiply the scores of its rows by."""
    if q_scale is not None:
        return q, of_tokens(q_scale, q.shape[0]) * scale
    return (q * scale, 1.0) if q.dtype == jnp.float32 else (q, scale)


def scores_of(q: Array, rows: Array | float, keys: Array, columns: Array | None) -> Float[Array, "Sq Sk"]:
    """float32 scores of `prescaled` queries and of `keys_of` a head."""
    scores = matmul(q, keys, ((1,), (1,)))
    if columns is None:
        return scores if isinstance(rows, float) and rows == 1 else scores * rows
    rows = jnp.reshape(rows, (-1, 1))
    return (scores * rows) * columns[None]  # in turn: the product of two large scales alone could overflow


def matmul(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def varying_as(operands: Any, start: Any) -> Any:
    """Initial float32 values of a loop, varying over the axes of an enclosing `shard_map` as what the loop makes of them does."""
    parts = [x.reshape(-1)[0].astype(jnp.float32) for x in jax.tree.leaves(operands)]
    nothing = jnp.where(False, sum(parts), 0.0)  # a zero that depends on the operands in type only, NaN or not
    return jax.tree.map(lambda x: x + nothing, start)
