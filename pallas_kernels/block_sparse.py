"""Block-sparse attention: the public op. Checks its arguments, picks an implementation, differentiates by the training rule.

Source: FPSAttention (arXiv 2506.04648) section 3. The gradient is straight-through (`pallas_kernels.reference.attention`).
"""

import functools
import logging
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import portable, reference
from pallas_kernels.platform import target_platform

Implementation = Literal["auto", "reference", "portable", "sm90"]

log = logging.getLogger("pallas_kernels")


def block_sparse_attention(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    *,
    key_tiles: Int[Array, "*N Tq K"] | Int[np.ndarray, "*N Tq K"],
    counts: Int[Array, "*N Tq"] | Int[np.ndarray, "*N Tq"],
    valid: Bool[Array, "Sk"] | Bool[np.ndarray, "Sk"],
    q_valid: Bool[Array, "Sq"] | Bool[np.ndarray, "Sq"] | None = None,
    tokens_per_scale: int | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B Sq N H"]:
    """Attention of query tiles over the key tiles that a table lists, in FP8 or not; softmax scale H**-0.5.

    Differentiable in q, k and v; memory is linear in tokens forward and backward ('reference' apart).

    Args:
      q, k, v: float32, bf16 or f16, one dtype; tokens in tile order, tiles of the same stored size.
      key_tiles: int32, the key tiles of each query tile, for all heads or per head; each at most once in a row. Slots from
        `counts` on are unused and hold any tile.
      counts: int32, used slots of each row, 1 or more.
      valid: False at padded key slots, which may hold anything, NaN too. Every tile must have a valid key.
      q_valid: the same for queries, whose output is 0 there; None where queries and keys are the same tokens.
      tokens_per_scale: stored tokens that share an FP8 scale of Q or K, a divisor of the tile; None for no quantization.
      implementation: 'reference' (specification, all pairs of tokens in memory), 'portable' (plain XLA), 'sm90' (Hopper
        kernel), or 'auto': the fastest that runs here.
    Returns: q's dtype.
    Raises: ValueError for shapes, dtypes or a table that don't fit; NotImplementedError for an implementation that can't run here.
    Source: FPSAttention (arXiv 2506.04648) section 3.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_operands(q, k, v)
    same = q_valid is None
    if same and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} tokens and k {k.shape[1]}; pass q_valid where they are not the same tokens"
        )
    q_valid = valid if q_valid is None else q_valid
    tile_size = _check_table(q, k, key_tiles, counts, valid, q_valid)
    if tokens_per_scale is not None and (tokens_per_scale < 1 or tile_size % tokens_per_scale):
        raise ValueError(
            f"tokens_per_scale={tokens_per_scale} doesn't divide the {tile_size} stored tokens of a tile; use a divisor"
        )
    chosen = choose(
        implementation, head_dim=q.shape[3], dtype=q.dtype, tile_size=tile_size, tokens_per_scale=tokens_per_scale
    )
    return _attention(
        q,
        k,
        v,
        jnp.asarray(key_tiles, jnp.int32),
        jnp.asarray(counts, jnp.int32),
        jnp.asarray(q_valid),
        jnp.asarray(valid),
        tile_size=tile_size,
        tokens_per_scale=tokens_per_scale,
        implementation=chosen,
    )


def choose(
    implementation: str, *, head_dim: int, dtype: Any, tile_size: int, tokens_per_scale: int | None
) -> Literal["reference", "portable", "sm90"]:
    """The implementation that runs such a call.

    Raises: ValueError for an unknown one, NotImplementedError, with the reason, for one that can't run here.
    """
    if implementation not in get_args(Implementation):
        names = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation={implementation!r} is not one of {names}")
    if implementation in ("reference", "portable"):
        return implementation  # pyright: ignore[reportReturnType]
    if implementation == "auto" and target_platform() != "gpu":
        return _logged("portable", f"no GPU, but {target_platform()}")
    from pallas_kernels import fwd_sm90  # late: importing Mosaic GPU takes a second, and only GPUs need it

    shape = {"tile_size": tile_size, "tokens_per_scale": tokens_per_scale}
    reason = fwd_sm90.missing_device() or fwd_sm90.unsupported(head_dim, dtype, **shape)
    if reason is None:
        return _logged("sm90", "the Hopper kernel") if implementation == "auto" else "sm90"
    if implementation == "auto":
        return _logged("portable", reason)
    raise NotImplementedError(f"implementation='sm90': {reason}")


@functools.cache  # said once for each reason
def _logged(name: Any, why: str) -> Any:
    log.info("block-sparse attention runs as %r: %s", name, why)
    return name


def check_operands(q: Any, k: Any, v: Any) -> None:
    """Raises ValueError for q, k and v whose shapes, dtypes or head dim don't fit."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"{shapes}: each must be [batch, tokens, heads, head dim]")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"{shapes}: k and v must have one shape, and q theirs apart from the number of tokens")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; pass one of float32, bfloat16, float16 for all three"
        )
    if q.shape[3] % 16 or q.shape[3] == 0:
        raise ValueError(f"head dim {q.shape[3]} is not a multiple of 16; pad q, k and v with zeros, or use 64 or 128")


def _check_table(q: Any, k: Any, key_tiles: Any, counts: Any, valid: Any, q_valid: Any) -> int:
    """The stored size of a tile. What is NumPy is also checked for its values; inside jit only shapes can be."""
    key_shape, count_shape = np.shape(key_tiles), np.shape(counts)
    if len(key_shape) not in (2, 3) or count_shape != key_shape[:-1] or 0 in key_shape:
        raise ValueError(
            f"key_tiles {key_shape} and counts {count_shape} must be [Tq, K] and [Tq], or [N, Tq, K] and [N, Tq]"
        )
    if len(key_shape) == 3 and key_shape[0] != q.shape[2]:
        raise ValueError(f"key_tiles has tables for {key_shape[0]} heads, q has {q.shape[2]} heads")
    for name, table in (("key_tiles", key_tiles), ("counts", counts)):
        if not jnp.issubdtype(table.dtype, jnp.integer):
            raise ValueError(f"{name} is {table.dtype}; pass int32")
    if np.shape(valid) != k.shape[1:2] or np.shape(q_valid) != q.shape[1:2]:
        raise ValueError(
            f"valid {np.shape(valid)} and q_valid {np.shape(q_valid)} must be one bool for each of {k.shape[1]} keys and "
            f"{q.shape[1]} queries"
        )
    tiles = key_shape[-2]
    if q.shape[1] % tiles:
        raise ValueError(
            f"q has {q.shape[1]} tokens for {tiles} rows of key_tiles; every tile must have the same stored size"
        )
    tile_size = q.shape[1] // tiles
    if k.shape[1] % tile_size:
        raise ValueError(f"k has {k.shape[1]} tokens, no multiple of the {tile_size} stored tokens of a tile")
    if isinstance(valid, np.ndarray) and not valid.reshape(-1, tile_size).any(1).all():
        empty = int(np.argmin(valid.reshape(-1, tile_size).any(1)))
        raise ValueError(
            f"valid has no valid key in tile {empty}; leave the tile out, or list it nowhere and mark one key"
        )
    if isinstance(counts, np.ndarray) and isinstance(key_tiles, np.ndarray):
        if counts.min() < 1 or counts.max() > key_shape[-1]:
            raise ValueError(f"counts lie in [{counts.min()}, {counts.max()}]; each must be in [1, {key_shape[-1]}]")
        used = np.arange(key_shape[-1]) < counts[..., None]
        ordered = np.sort(np.where(used, key_tiles, -1 - np.arange(key_shape[-1])), axis=-1)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise ValueError(
                "key_tiles lists a tile twice in a row; list each once, and let counts leave the other slots out"
            )
        bad = used & ((key_tiles < 0) | (key_tiles >= k.shape[1] // tile_size))
        if bad.any():
            raise ValueError(
                f"key_tiles holds tile {key_tiles[bad][0]}; k has {k.shape[1] // tile_size} tiles, numbered from 0"
            )
    return tile_size


@functools.partial(jax.jit, static_argnames=("tile_size", "tokens_per_scale", "implementation"))
def _attention(q, k, v, key_tiles, counts, q_valid, k_valid, *, tile_size, tokens_per_scale, implementation):
    if implementation == "reference":  # autodiff of the specification is the specification of the gradient
        return reference.attention(
            q,
            k,
            v,
            key_tiles=key_tiles,
            counts=counts,
            q_valid=q_valid,
            k_valid=k_valid,
            tile_size=tile_size,
            tokens_per_scale=tokens_per_scale,
        )[0]
    return _differentiable(implementation, tile_size, tokens_per_scale, q, k, v, key_tiles, counts, q_valid, k_valid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(implementation, tile_size, tokens_per_scale, q, k, v, key_tiles, counts, q_valid, k_valid):
    arguments = (q, k, v, key_tiles, counts, q_valid, k_valid)
    return _forward(implementation, tile_size, tokens_per_scale, *arguments)[0]


def _forward(implementation, tile_size, tokens_per_scale, q, k, v, key_tiles, counts, q_valid, k_valid):
    if implementation == "sm90":
        from pallas_kernels import fwd_sm90 as kernels
    else:
        kernels = portable
    table = {"key_tiles": key_tiles, "counts": counts, "q_valid": q_valid, "k_valid": k_valid}
    out, lse = kernels.forward(q, k, v, **table, tile_size=tile_size, tokens_per_scale=tokens_per_scale)
    return out, (q, k, v, out, lse, table)


def _backward(implementation, tile_size, tokens_per_scale, saved, d_out):
    q, k, v, out, lse, table = (
        saved  # portable, whatever computed the forward: the same gradient from its output and lse
    )
    grads = portable.backward(q, k, v, out, lse, d_out, **table, tile_size=tile_size, tokens_per_scale=tokens_per_scale)
    return (*grads, None, None, None, None)


_differentiable.defvjp(_forward, _backward)
