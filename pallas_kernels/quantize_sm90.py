"""What the Hopper forward kernel reads: q, k, v rounded to FP8, laid out for its matrix instructions, padding made harmless.

Padding is masked as data, at no cost in the kernel and exactly for any pattern of it: V is 0 there, the validity row that makes the
row sums is 0 there, and K repeats a valid key of its tile, so that no row's maximum can move.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.mosaic import kv_order
from pallas_kernels.reference import FP8, quantize_channels, quantize_tokens
from pallas_kernels.tuning import BLOCK_KV, BLOCK_Q, VALID_ROWS, scales_per_block


class Operands(NamedTuple):
    """Inputs of `fwd_sm90.attention`; G is B * N. The scales are None without quantization.

    q, k: e4m3, or bf16 or f16 without quantization; padded keys hold a copy of a valid key of their tile.
    v: the same dtype, keys last, 0 at padding; in FP8 in `mosaic.kv_order`.
    key_valid: ones and zeros in v's dtype and order, 8 equal rows.
    query_valid: 1 or 0.
    q_scale, k_scale: float32, one for 64 queries and for 64 or 128 keys (`tuning.scales_per_block`), however many tokens share
      a scale: the kernel then knows two cases only.
    """

    q: Float[Array, "G Sq H"]
    k: Float[Array, "G Sk H"]
    v: Float[Array, "G H Sk"]
    key_valid: Float[Array, "8 Sk"]
    query_valid: Float[Array, "Sq"]
    q_scale: Float[Array, "G Sq/64"] | None
    k_scale: Float[Array, "G Sk/keys"] | None
    v_scale: Float[Array, "G H"] | None


def quantize(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    *,
    q_valid: Bool[Array, "Sq"],
    k_valid: Bool[Array, "Sk"],
    tile_size: int,
    tokens_per_scale: int,
) -> Operands:
    """Q and K in FP8 with a scale for each group of tokens, V with one for each channel, as `reference` defines them.

    Args:
      q, k, v: any float dtype, tokens in tile order; padding may hold anything.
      tile_size: stored tokens of a tile, a multiple of 128.
      tokens_per_scale: a multiple of 64 that divides the tile.
    """
    source = valid_sources(k_valid, tile_size=tile_size, tokens_per_scale=tokens_per_scale)
    q8, q_scale = quantize_tokens(q, q_valid, tokens_per_scale)
    k8, k_scale = quantize_tokens(k, k_valid, tokens_per_scale)
    # Copied after rounding, and a group of padding takes the scale of its source: the copy's scores are then exactly the source's.
    k8, k_scale = (
        jnp.take(k8, source, axis=1),
        jnp.take(k_scale, source[::tokens_per_scale] // tokens_per_scale, axis=1),
    )
    v8, v_scale = quantize_channels(v, k_valid)
    order = kv_order(v.shape[1])
    return Operands(
        q=_head_major(q8),
        k=_head_major(k8),
        v=_keys_last(jnp.take(v8, order, axis=1)),
        key_valid=_validity_rows(k_valid[order], FP8),
        query_valid=q_valid.astype(jnp.float32),
        q_scale=_spread(q_scale, tokens_per_scale // BLOCK_Q),
        k_scale=_spread(k_scale, tokens_per_scale * scales_per_block(tokens_per_scale) // BLOCK_KV),
        v_scale=v_scale.reshape(-1, v.shape[3]),
    )


def unquantized(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    *,
    q_valid: Bool[Array, "Sq"],
    k_valid: Bool[Array, "Sk"],
    tile_size: int,
) -> Operands:
    """The same layout without rounding, for the kernel's bf16 mode. q, k, v: bf16 or f16."""
    source = valid_sources(k_valid, tile_size=tile_size, tokens_per_scale=tile_size)
    k = jnp.take(jnp.where(k_valid[None, :, None, None], k, jnp.zeros((), k.dtype)), source, axis=1)
    v = jnp.where(k_valid[None, :, None, None], v, jnp.zeros((), v.dtype))
    return Operands(
        q=_head_major(q),
        k=_head_major(k),
        v=_keys_last(v),
        key_valid=_validity_rows(k_valid, v.dtype),
        query_valid=q_valid.astype(jnp.float32),
        q_scale=None,
        k_scale=None,
        v_scale=None,
    )


def valid_sources(k_valid: Bool[Array, "Sk"], *, tile_size: int, tokens_per_scale: int) -> Int[Array, "Sk"]:
    """For each key slot the slot whose key it holds, int32: itself where valid, else the first valid key of its group.

    Where a whole group is padding, the first of the tile; where a whole tile is, a padded slot.
    """

    def first(
        size: int,
    ) -> tuple[Array, Array]:  # of each run of `size` slots: its first valid slot, and whether it has one
        runs = k_valid.reshape(-1, size)
        slot = jnp.argmax(runs, axis=1) + jnp.arange(runs.shape[0]) * size
        return jnp.repeat(slot, size), jnp.repeat(runs.any(1), size)

    of_group, in_group = first(tokens_per_scale)
    of_tile, _ = first(tile_size)
    source = jnp.where(k_valid, jnp.arange(k_valid.shape[0]), jnp.where(in_group, of_group, of_tile))
    return source.astype(jnp.int32)


def _head_major(x: Float[Array, "B S N H"]) -> Float[Array, "G S H"]:
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _keys_last(x: Float[Array, "B S N H"]) -> Float[Array, "G H S"]:
    return x.transpose(0, 2, 3, 1).reshape(-1, x.shape[3], x.shape[1])


def _validity_rows(valid: Bool[Array, "S"], dtype: Any) -> Float[Array, "8 S"]:
    return jnp.broadcast_to(valid.astype(dtype)[None], (VALID_ROWS, valid.shape[0]))


def _spread(scale: Float[Array, "B groups N"], times: int) -> Float[Array, "G blocks"]:
    """Each scale `times` times, heads first."""
    return jnp.repeat(scale.transpose(0, 2, 1).reshape(-1, scale.shape[1]), times, axis=1)
