"""What the Hopper forward kernel reads: q, k, v rounded to FP8, laid out for its matrix instructions, padding made harmless.

Padding is masked as data, at no cost in the kernel and exactly for any pattern of it: V is 0 there, the validity row that makes the
row sums is 0 there, and K repeats a valid key of its tile, so that no row's maximum can move.

Two ways to the same operands: `by_xla`, and fused kernels that read each of q, k and v once and write it once (V's channel maxima
are a pass of their own before). Source of the rounding: `pallas_kernels.reference`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.padding import group_sources, key_sources
from pallas_kernels.pattern import TilePattern
from pallas_kernels.reference import (
    FP8,
    FP8_MAX,
    QUOTIENT_STEP,
    SMALLEST_NORMAL,
    KeyValueCodes,
    centered_keys,
    key_mean,
    key_value_codes,
    quantize_tokens,
    value_scales,
)
from pallas_kernels.sm90.config import BLOCK_KV, BLOCK_Q, VALID_ROWS, scales_per_block
from pallas_kernels.sm90.registers import kv_order, to_fp8_operand
from pallas_kernels.sm90.shared_memory import swizzled

f32 = jnp.float32
_ROWS = 64  # tokens in registers at a time
# Four neighbouring values a thread: conversions take pairs, and stores of e4m3 are then whole words.
_QUADS = plgpu.Layout.WGMMA_8BIT


class Operands(NamedTuple):
    """Inputs of `forward.attention`; G is B * N. The scales are None without quantization.

    q, k: e4m3, or bf16 or f16 without quantization; padded keys hold a copy of a valid key of their tile.
    v: the same dtype, keys last, 0 at padding; in FP8 in `registers.kv_order`.
    key_valid: ones and zeros in v's dtype and order, 8 equal rows.
    query_valid: 1 or 0.
    q_scale, k_scale: float32, one for 64 queries and for 64 or 128 keys (`config.scales_per_block`), however many tokens share
      a scale: the kernel then knows two cases only.
    v_scale: by channel; where V's scales are those of groups of tokens, for each of these the scale and its reciprocal, beside 1
      for the columns that are row sums.
    """

    q: Float[Array, "G Sq H"]
    k: Float[Array, "G Sk H"]
    v: Float[Array, "G H Sk"]
    key_valid: Float[Array, "8 Sk"]
    query_valid: Float[Array, "Sq"]
    q_scale: Float[Array, "G Sq/64"] | None
    k_scale: Float[Array, "G Sk/keys"] | None
    v_scale: Float[Array, "G H"] | Float[Array, "G groups 2 H+8"] | None


def quantize(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    pattern: TilePattern,
    *,
    fused: bool = True,
) -> Operands:
    """Q and K in FP8 with a scale for each group of tokens, V with one for each channel, as `reference` defines them.

    Args:
      q, k, v: any float dtype, tokens in tile order; padding may hold anything.
      pattern: tiles of a multiple of 128 tokens, scales for a multiple of 64; without scales, `unquantized`.
      fused: by the kernels below where they can (16-bit inputs, groups that fit shared memory), else by XLA.
    """
    tokens_per_scale = pattern.tokens_per_scale
    if not fused or tokens_per_scale is None or not _fits(q, tokens_per_scale, pattern.center_k):
        return by_xla(q, k, v, pattern)
    mean = key_mean(k, pattern.k_valid)[:, 0] if pattern.center_k else None
    v_scale = value_scales(v, pattern.k_valid, pattern.tokens_per_value_scale)
    q8, q_scale = quantize_groups(q, pattern.q_valid, None, tokens_per_scale)
    k8, k_scale = quantize_groups(k, pattern.k_valid, group_sources(pattern), tokens_per_scale, mean)
    v8 = quantize_transposed(v, pattern.k_valid, _by_head(v_scale))
    return _operands(q8, k8, v8, q_scale, k_scale, v_scale, pattern)


def to_codes(
    q: Float[Array, "B Sq N H"], codes: KeyValueCodes, pattern: TilePattern, *, fused: bool = True
) -> Operands:
    """`quantize` where keys and values are rounded already: they are only laid out, by XLA."""
    tokens_per_scale = pattern.tokens_per_scale
    assert tokens_per_scale is not None
    if fused and _fits(q, tokens_per_scale, center_k=False):
        q8, q_scale = quantize_groups(q, pattern.q_valid, None, tokens_per_scale)
    else:
        q8, q_scale = quantize_tokens(q, pattern.q_valid, tokens_per_scale)
        q8, q_scale = _head_major(q8), _by_head(q_scale)
    # Copied after rounding, and a group of padding takes the scale of its source: the copy's scores are then exactly the source's.
    source = key_sources(pattern)
    k8 = _head_major(jnp.take(codes.k, source, axis=1))
    k_scale = _by_head(jnp.take(codes.k_scale, source[::tokens_per_scale] // tokens_per_scale, axis=1))
    v8 = _keys_last(jnp.take(codes.v, kv_order(codes.v.shape[1]), axis=1))
    return _operands(q8, k8, v8, q_scale, k_scale, codes.v_scale, pattern)


def by_xla(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    pattern: TilePattern,
) -> Operands:
    """`quantize` in plain jax.numpy."""
    tokens_per_scale = pattern.tokens_per_scale
    if tokens_per_scale is None:
        return unquantized(q, k, v, pattern)
    k = centered_keys(k, pattern.k_valid) if pattern.center_k else k
    per_value_scale = pattern.tokens_per_value_scale
    codes = key_value_codes(
        k, v, pattern.k_valid, tokens_per_scale=tokens_per_scale, tokens_per_value_scale=per_value_scale
    )
    return to_codes(q, codes, pattern, fused=False)


def unquantized(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    pattern: TilePattern,
) -> Operands:
    """The same layout without rounding, for the kernel's bf16 mode. q, k, v: bf16 or f16."""
    source, k_valid = key_sources(pattern), pattern.k_valid
    k, v = (jnp.where(k_valid[None, :, None, None], x, jnp.zeros((), x.dtype)) for x in (k, v))
    return Operands(
        q=_head_major(q),
        k=_head_major(jnp.take(k, source, axis=1)),
        v=_keys_last(v),
        key_valid=_validity_rows(k_valid, v.dtype),
        query_valid=pattern.q_valid.astype(f32),
        q_scale=None,
        k_scale=None,
        v_scale=None,
    )


@functools.partial(jax.jit, static_argnames="tokens_per_scale")
def quantize_groups(
    x: Float[Array, "B S N H"],
    valid: Bool[Array, "S"],
    copied: Int[Array, "S/group"] | None,
    tokens_per_scale: int,
    mean: Float[Array, "B N H"] | None = None,
) -> tuple[Float[Array, "G S H"], Float[Array, "G S/group"]]:
    """(e4m3 values by head, float32 scales) of Q or K, in one pass over x. A thread block takes one group of one head.

    Args:
      x: bf16 or f16.
      copied: `group_sources`, the slot that padded slots repeat; None leaves them 0.
      mean: float32, taken off every token in float32 before it is rounded; None for none.
    """
    batch, seq, heads, dim = x.shape
    groups, parts = seq // tokens_per_scale, tokens_per_scale // _ROWS
    own = jnp.arange(groups, dtype=jnp.int32)
    copied = jnp.full(groups, -1, jnp.int32) if copied is None else copied
    # A group of padding reads the group of the key that it becomes copies of, for its scale.
    read_from = jnp.where(copied < 0, own, copied // tokens_per_scale)

    def body(x_ref, valid_ref, read_from_ref, copied_ref, *refs):
        *mean_refs, out_ref, scale_ref, x_smem, out_smem, barrier = refs
        group, head, entry = lax.axis_index("group"), lax.axis_index("head"), lax.axis_index("entry")
        out_head = entry * heads + head
        source, slot = read_from_ref[group] * tokens_per_scale, copied_ref[group]
        for part in range(parts):
            rows = pl.ds(source + part * _ROWS, _ROWS)
            plgpu.copy_gmem_to_smem(x_ref.at[entry, rows, head], x_smem.at[part], barrier)

        def ones_from(start):
            return plgpu.load(valid_ref.at[pl.ds(start, _ROWS)], layout=_QUADS.reduce(1), optimized=False)

        def where(ones, x, other):
            return jnp.where(lax.broadcast_in_dim(ones > 0, x.shape, [0]), x, other)

        def less_mean(x):
            for mean_ref in mean_refs:
                row = plgpu.load(mean_ref.at[out_head], layout=_QUADS.reduce(0), optimized=False)
                x = x - (lax.broadcast_in_dim(row, x.shape, [1]) if x.ndim == 2 else row)
            return x

        def load(part):
            return less_mean(plgpu.load(x_smem.at[part], layout=_QUADS, optimized=False).astype(f32))

        counted = [ones_from(source + part * _ROWS) for part in range(parts)]  # before the copies are waited for
        kept = [ones_from(group * tokens_per_scale + part * _ROWS) for part in range(parts)]
        key = x_ref.at[entry, jnp.maximum(slot, 0), head]
        key = less_mean(plgpu.load(key, layout=_QUADS.reduce(0), optimized=False).astype(f32))
        plgpu.barrier_wait(barrier)
        largest = plgpu.layout_cast(jnp.zeros((_ROWS, dim), f32), _QUADS)
        for part in range(parts):
            largest = jnp.maximum(largest, where(counted[part], jnp.abs(load(part)), 0.0))
        amax = largest.max(axis=1).max(axis=0)
        scale = amax * (1 / FP8_MAX)  # as reference.scale_of has it; inf and NaN fail the comparison below
        scale = jnp.where(scale < SMALLEST_NORMAL, f32(1), scale)
        scale = jnp.where(amax < jnp.inf, scale, f32(jnp.nan))
        scale_ref[out_head, group] = scale
        reciprocal = 1 / scale
        padding = _quotient(key, reciprocal)
        padding = jnp.where(lax.broadcast_in_dim(slot >= 0, (dim,), []), padding, 0.0)
        padding = lax.broadcast_in_dim(padding, (_ROWS, dim), [1])
        for part in range(parts):
            out_smem[part] = where(kept[part], _quotient(load(part), reciprocal), padding).astype(FP8)
        plgpu.commit_smem()
        for part in range(parts):
            rows = pl.ds(group * tokens_per_scale + part * _ROWS, _ROWS)
            plgpu.copy_smem_to_gmem(out_smem.at[part], out_ref.at[out_head, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((batch * heads, seq, dim), FP8),
            jax.ShapeDtypeStruct((batch * heads, groups), f32),
        ],
        scratch_types=[
            swizzled((parts, _ROWS, dim), x.dtype),
            swizzled((parts, _ROWS, dim), FP8),
            plgpu.Barrier(num_arrivals=parts),
        ],
        grid=(batch, groups, heads),
        grid_names=("entry", "group", "head"),
    )
    means = () if mean is None else (mean.reshape(batch * heads, dim),)
    values, scales = kernel(x, valid.astype(f32), read_from, copied, *means)
    return values, scales


@jax.jit
def quantize_transposed(
    v: Float[Array, "B S N H"], valid: Bool[Array, "S"], scale: Float[Array, "G groups H"]
) -> Float[Array, "G H S"]:
    """e4m3 values of V, keys last in `registers.kv_order` and 0 at padding. A thread block takes 128 keys of one head.

    scale: of equal groups of tokens, whole blocks of 128.

    The transposition is the load's (ldmatrix), and the order that `to_fp8_operand` leaves columns in is the one that is wanted.
    """
    batch, seq, heads, dim = v.shape
    blocks_per_scale = seq // BLOCK_KV // scale.shape[1]
    layout = plgpu.Layout.WGMMA
    shape = (64, BLOCK_KV)  # channels and keys in registers at a time

    def body(v_ref, valid_ref, scale_ref, out_ref, v_smem, out_smem, barrier):
        block, head, entry = lax.axis_index("block"), lax.axis_index("head"), lax.axis_index("entry")
        out_head, keys = entry * heads + head, pl.ds(block * BLOCK_KV, BLOCK_KV)
        plgpu.copy_gmem_to_smem(v_ref.at[entry, keys, head], v_smem, barrier)
        kept = plgpu.load(valid_ref.at[keys], layout=layout.reduce(0), optimized=False) > 0
        kept = lax.broadcast_in_dim(kept, shape, [1])
        channels = [pl.ds(first, 64) for first in range(0, dim, 64)]
        group = lax.div(block, jnp.int32(blocks_per_scale))
        scales = [
            plgpu.load(scale_ref.at[out_head, group, c], layout=layout.reduce(1), optimized=False) for c in channels
        ]
        plgpu.barrier_wait(barrier)
        for c, scale in zip(channels, scales, strict=True):
            x = plgpu.load(v_smem.at[:, c].transpose((1, 0)), layout=layout).astype(f32)
            reciprocal = lax.broadcast_in_dim(1 / scale, shape, [0])
            out_smem[c] = to_fp8_operand(jnp.where(kept, _quotient(x, reciprocal), 0.0))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[out_head, :, keys])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * heads, dim, seq), FP8),
        scratch_types=[swizzled((BLOCK_KV, dim), v.dtype), swizzled((dim, BLOCK_KV), FP8), plgpu.Barrier()],
        grid=(batch, seq // BLOCK_KV, heads),
        grid_names=("entry", "block", "head"),
    )
    return kernel(v, valid.astype(f32), scale)


def _quotient(x: Array, reciprocal: Array) -> Array:
    """x / scale to the nearest multiple of `QUOTIENT_STEP`, as `reference.codes_of` has it."""
    # Adding and subtracting a large number would round as well, but XLA, and so interpret mode, simplifies that away. Not x times
    # (reciprocal / step): of the smallest scales that would be inf.
    quotient = x * reciprocal * (1 / QUOTIENT_STEP)
    return lax.round(quotient, lax.RoundingMethod.TO_NEAREST_EVEN) * QUOTIENT_STEP


def _fits(x: Array, tokens_per_scale: int, center_k: bool) -> bool:
    """Whether a group fits a warpgroup's registers (252 of 255 at 512 x 128), and so shared memory.

    A mean to take off needs some more; half the group leaves room for it (not compiled for a GPU yet).
    """
    return x.dtype.itemsize == 2 and tokens_per_scale * x.shape[3] <= 512 * 128 // (2 if center_k else 1)


def _operands(
    q8: Array,
    k8: Array,
    v8: Array,
    q_scale: Array,
    k_scale: Array,
    v_scale: Array,
    pattern: TilePattern,
) -> Operands:
    """Operands from values by head and a scale for each group, which is repeated for each block. v_scale: as `value_scales`."""
    group, k_valid = pattern.group_size, pattern.k_valid
    v_scale = _by_head(v_scale)
    if pattern.tokens_per_value_scale is None:
        v_scale = v_scale[:, 0]
    else:  # powers of two: reciprocals are exact, and so is what is multiplied by them
        v_scale = jnp.stack([v_scale, 1 / v_scale], axis=2)
        v_scale = jnp.pad(v_scale, ((0, 0), (0, 0), (0, 0), (0, VALID_ROWS)), constant_values=1)
    return Operands(
        q=q8,
        k=k8,
        v=v8,
        key_valid=_validity_rows(k_valid[kv_order(k_valid.shape[0])], FP8),
        query_valid=pattern.q_valid.astype(f32),
        q_scale=jnp.repeat(q_scale, group // BLOCK_Q, axis=1),
        k_scale=jnp.repeat(k_scale, group * scales_per_block(group) // BLOCK_KV, axis=1),
        v_scale=v_scale,
    )


def _head_major(x: Float[Array, "B S N H"]) -> Float[Array, "G S H"]:
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _by_head(x: Float[Array, "B groups N *rest"]) -> Float[Array, "G groups *rest"]:
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])


def _keys_last(x: Float[Array, "B S N H"]) -> Float[Array, "G H S"]:
    return x.transpose(0, 2, 3, 1).reshape(-1, x.shape[3], x.shape[1])


def _validity_rows(valid: Bool[Array, "S"], dtype: Any) -> Float[Array, "8 S"]:
    return jnp.broadcast_to(valid.astype(dtype)[None], (VALID_ROWS, valid.shape[0]))
