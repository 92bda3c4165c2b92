"""Block-sparse attention: the public op. Checks its arguments, picks an implementation, differentiates by the training rule.

Source: FPSAttention (arXiv 2506.04648) section 3. The gradient is straight-through (`pallas_kernels.reference.attention`).
"""

import functools
import logging
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

from pallas_kernels import reference
from pallas_kernels.pattern import TilePattern
from pallas_kernels.platform import target_platform
from pallas_kernels.portable import backward as portable_backward
from pallas_kernels.portable import forward as portable_forward
from pallas_kernels.reference import FP8, KeyValueCodes, centered_keys, key_value_codes
from pallas_kernels.sm90.call_shape import CallShape
from pallas_kernels.sm90.config import BLOCK_Q

Implementation = Literal["auto", "reference", "portable", "sm90"]

# What policies of `jax.checkpoint` know output and log-sum-exp as: with them kept, a gradient needs no second forward.
SAVED = "attention"

log = logging.getLogger("pallas_kernels")


def block_sparse_attention(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk N H"],
    v: Float[Array, "B Sk N H"],
    pattern: TilePattern,
    *,
    implementation: Implementation = "auto",
    over: str | None = None,
) -> Float[Array, "B Sq N H"]:
    """Attention of query tiles over the key tiles that a pattern lists, in FP8 or not; softmax scale H**-0.5.

    Differentiable in q, k and v; memory is linear in tokens forward and backward ('reference' apart).

    Args:
      q, k, v: float32, bf16 or f16, one dtype; tokens in tile order, tiles of the same stored size.
      pattern: from `TilePattern.build`: table, padding and granularity. The output is 0 at padded queries.
      implementation: 'reference' (specification, all pairs of tokens in memory), 'portable' (plain XLA), 'sm90' (Hopper
        kernel), or 'auto': the fastest that runs here.
      over: a mesh axis, inside `jax.shard_map`, that a sample's tokens are shared out over: k and v are this device's part, q its
        queries, the pattern's rows theirs, and its key tokens those of all devices. In FP8 codes and scales are gathered, not k and
        v; gradients of k and v are summed over the axis in their dtype. The same scales and codes as on one device, as far as
        the mean that `center_k` takes off is the same, which is summed in another order.
    Returns: q's dtype.
    Raises: ValueError for operands or a pattern that don't fit; NotImplementedError for an implementation that can't run here.
    Source: FPSAttention (arXiv 2506.04648) section 3.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_operands(q, k, v)
    chosen = choose(implementation, CallShape.of(pattern, head_dim=q.shape[3], dtype=q.dtype))
    if over is not None and (pattern.tokens_per_scale is None or chosen == "reference"):  # that rounds what it is given
        k, v, over = gathered(k, over), gathered(v, over), None
    pattern.check_operands(q, k if over is None else _of_all(k, over))
    return _attention(q, k, v, pattern, implementation=chosen, over=over)


def gathered(x: Shaped[Array, "B S *rest"], over: str) -> Shaped[Array, "B S_all *rest"]:
    """The tokens of all devices along a mesh axis, in their order."""
    return lax.all_gather(x, over, axis=1, tiled=True)


def _of_all(k: Array, over: str) -> jax.ShapeDtypeStruct:
    batch, tokens, *rest = k.shape
    return jax.ShapeDtypeStruct((batch, tokens * lax.axis_size(over), *rest), k.dtype)


def attention_to_codes(
    q: Float[Array, "B Sq N H"],
    codes: KeyValueCodes,
    pattern: TilePattern,
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "B Sq N H"]:
    """`block_sparse_attention` to keys and values that were rounded before (`pallas_kernels.reference.key_value_codes`), such as a
    cache's: the same bits as if they were given unrounded, at none of the rounding's cost.

    Args:
      q: float32, bf16 or f16.
      codes: of the pattern's key tokens, with scales for groups of its sizes.
      pattern: with `tokens_per_scale`; without `center_k`, for which keys are centred before they are rounded.
      implementation: as of `block_sparse_attention`.
    Returns: q's dtype.
    Raises: as `block_sparse_attention`; NotImplementedError where it is differentiated.
    """
    q = jnp.asarray(q)
    check_operands(q, *(jax.ShapeDtypeStruct(x.shape, q.dtype) for x in (codes.k, codes.v)))
    pattern.check_operands(q, codes.k)
    _check_codes(codes, pattern)
    chosen = choose(implementation, CallShape.of(pattern, head_dim=q.shape[3], dtype=q.dtype))
    return _attention_to_codes(q, codes, pattern, implementation=chosen)


def _check_codes(codes: KeyValueCodes, pattern: TilePattern) -> None:
    per_scale, (batch, keys, heads, dim) = pattern.tokens_per_scale, codes.k.shape
    if per_scale is None or pattern.center_k:
        raise ValueError(
            f"tokens_per_scale={per_scale} and center_k={pattern.center_k}: codes are attended in FP8 as they are; give the group "
            "that they were rounded by, and center_k=False"
        )
    groups = 1 if pattern.tokens_per_value_scale is None else keys // pattern.tokens_per_value_scale
    want = ((batch, keys // per_scale, heads), (batch, groups, heads, dim))
    if codes.k.dtype != FP8 or codes.v.dtype != FP8 or (codes.k_scale.shape, codes.v_scale.shape) != want:
        raise ValueError(
            f"codes are {codes.k.dtype} and {codes.v.dtype} with scales {codes.k_scale.shape} and {codes.v_scale.shape}; this "
            f"pattern needs float8_e4m3fn with {want[0]} and {want[1]}"
        )


def choose(implementation: str, call: CallShape) -> Literal["reference", "portable", "sm90"]:
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
    from pallas_kernels.sm90 import forward  # late: importing Mosaic GPU takes a second, and only GPUs need it

    reason = forward.missing_device() or call.unsupported()
    if reason is None:
        return _logged("sm90", "the Hopper kernel") if implementation == "auto" else "sm90"
    if implementation == "auto":
        return _logged("portable", reason)
    raise NotImplementedError(f"implementation='sm90': {reason}")


def tile_alignment() -> int:
    """What the slots of a part of a tile should be a multiple of, for 'auto' on the device that programs are built for.

    64 on a GPU: rows of the Hopper kernel's matrix instruction. 8 elsewhere, where 'portable' runs and padding costs time: as many
    float32 numbers as a CPU adds at once.
    """
    return BLOCK_Q if target_platform() == "gpu" else 8


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
    if not q.size or not k.size:
        raise ValueError(f"{shapes}: there is nothing to attend; batch, tokens, heads and head dim must be 1 or more")


@functools.partial(jax.jit, static_argnames=("implementation", "over"))
def _attention(q, k, v, pattern, *, implementation, over):
    if implementation == "reference":  # autodiff of the specification is the specification of the gradient
        return reference.attention(q, k, v, pattern)[0]
    return _differentiable(implementation, over, q, k, v, pattern)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(implementation, over, q, k, v, pattern):
    return _forward(implementation, over, q, k, v, pattern)[0]


def _forward(implementation, over, q, k, v, pattern):
    kernels = _kernels(implementation)
    if over is None:
        found = kernels.forward(q, k, v, pattern)
    else:
        found = kernels.forward_to_codes(q, _gathered_codes(k, v, pattern, over), pattern)
    out, lse = (checkpoint_name(x, SAVED) for x in found)
    return out, (q, k, v, out, lse, pattern)


def _backward(implementation, over, saved, d_out):
    q, k, v, out, lse, pattern = saved
    # portable, whatever computed the forward: the same gradient from its output and lse
    if over is None:
        return (*portable_backward.backward(q, k, v, out, lse, d_out, pattern), None)
    # Gathered again: kept from the forward, every layer's would stay in memory.
    codes = _gathered_codes(k, v, pattern, over)
    dq, dk, dv = portable_backward.backward_to_codes(q, codes, out, lse, d_out, pattern)
    dk, dv = (lax.psum_scatter(x, over, scatter_dimension=1, tiled=True) for x in (dk, dv))
    return dq, dk, dv, None


def _kernels(implementation: str) -> Any:
    if implementation == "sm90":
        from pallas_kernels.sm90 import forward

        return forward
    return portable_forward


def _gathered_codes(k: Array, v: Array, pattern: TilePattern, over: str) -> KeyValueCodes:
    """Codes of all devices' keys and values, each rounded where it is: a byte on the wire where bf16 has two."""
    assert pattern.tokens_per_scale is not None
    valid = lax.dynamic_slice_in_dim(pattern.k_valid, lax.axis_index(over) * k.shape[1], k.shape[1])
    if pattern.centers_keys:
        k = centered_keys(k, valid, over)
    codes = key_value_codes(
        k,
        v,
        valid,
        tokens_per_scale=pattern.tokens_per_scale,
        tokens_per_value_scale=pattern.tokens_per_value_scale,
        over=over,
    )

    def bytes_gathered(x):  # XLA moves bytes as they are; e4m3 it widens where a device has no such arithmetic
        return lax.bitcast_convert_type(gathered(lax.bitcast_convert_type(x, jnp.uint8), over), FP8)

    v_scale = codes.v_scale if pattern.tokens_per_value_scale is None else gathered(codes.v_scale, over)
    return KeyValueCodes(bytes_gathered(codes.k), bytes_gathered(codes.v), gathered(codes.k_scale, over), v_scale)


_differentiable.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames="implementation")
def _attention_to_codes(q, codes, pattern, *, implementation):
    return _to_codes(implementation, q, codes, pattern)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_codes(implementation, q, codes, pattern):
    if implementation == "reference":
        return reference.attention_to_codes(q, codes, pattern)[0]
    return _kernels(implementation).forward_to_codes(q, codes, pattern)[0]


def _no_gradient(implementation, *_):
    raise NotImplementedError("attention to codes has no gradient; use block_sparse_attention, which rounds by itself")


_to_codes.defvjp(_no_gradient, _no_gradient)
