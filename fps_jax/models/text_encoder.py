"""The UMT5 encoder: token ids in, text states out.

Source: Wan-Video/Wan2.1 wan/modules/t5.py (T5Encoder with shared_pos=False);
transformers' UMT5EncoderModel gives the same numbers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from fps_jax.config import TextEncoderConfig
from fps_jax.models.params import Build, Params, bind, stacked, unstack
from fps_jax.models.taps import Taps, tap


def position_buckets(relative: np.ndarray, *, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each relative position (key minus query): exact up to num_buckets/4, then logarithmic to max_distance.

    Keys after the query take the upper half of the buckets. int32, in [0, num_buckets).
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    # float32 as upstream: where the logarithm is a whole number, float64 may fall on the other side of it
    log = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    log = log / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + log.astype(np.int32), half - 1)
    return (np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale with the statistics in float32. Rounds to `dtype` before the scale, as upstream does."""

    def __init__(self, dim: int, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * self.scale.astype(self.dtype)[None, None, :]


class Attention(nnx.Module):
    """Self-attention with a position bias. T5 doesn't scale the scores by 1/sqrt(head_dim)."""

    def __init__(self, config: TextEncoderConfig, dtype: Any, rngs: nnx.Rngs):
        inner = config.num_heads * config.head_dim
        self.q = nnx.Linear(config.dim, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.k = nnx.Linear(config.dim, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.v = nnx.Linear(config.dim, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.o = nnx.Linear(inner, config.dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.heads, self.dtype = config.num_heads, dtype

    def __call__(self, x: Float[Array, "B T D"], bias: Float[Array, "B N T T"]) -> Float[Array, "B T D"]:
        # [B, N, T, H], and the division after the second product: half the time of einsum and softmax on a CPU
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1).swapaxes(1, 2) for a in (self.q(x), self.k(x), self.v(x)))
        scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32) + bias
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = jnp.matmul(weights.astype(self.dtype), v, preferred_element_type=jnp.float32)
        out = (out / weights.sum(-1, keepdims=True)).swapaxes(1, 2).astype(self.dtype)
        return self.o(out.reshape(*out.shape[:2], -1))


class MLP(nnx.Module):
    """Gated MLP: down(up(x) * gelu(gate(x))), tanh GELU."""

    def __init__(self, config: TextEncoderConfig, dtype: Any, rngs: nnx.Rngs):
        self.gate = nnx.Linear(config.dim, config.mlp_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(config.dim, config.mlp_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.mlp_dim, config.dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(self.up(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    """A layer, with a position bias of its own (T5 shares the first layer's, UMT5 doesn't)."""

    def __init__(self, config: TextEncoderConfig, dtype: Any, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (RMSNorm(config.dim, config.eps, dtype) for _ in range(2))
        self.attn = Attention(config, dtype, rngs)
        self.mlp = MLP(config, dtype, rngs)
        self.rel_bias = nnx.Embed(config.num_buckets, config.num_heads, rngs=rngs)
        self.config = config

    def position_bias(self, length: int) -> Float[Array, "N T T"]:
        relative = np.arange(length)[None, :] - np.arange(length)[:, None]
        buckets = position_buckets(relative, num_buckets=self.config.num_buckets, max_distance=self.config.max_distance)
        return self.rel_bias.embedding.astype(jnp.float32).T[:, buckets]

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"], taps: Taps | None = None
    ) -> Float[Array, "B T D"]:
        bias = tap(taps, "position_bias", self.position_bias(x.shape[1]))[None]
        hidden = jnp.finfo(jnp.float32).min  # finite: a row without any key stays finite, too
        bias = jnp.where(mask[:, None, None, :], bias, hidden)
        # float32 residual: at 24 layers of growing activations bf16 sums lose what the later layers add
        x = x + self.attn(self.norm1(x), bias).astype(jnp.float32)
        return tap(taps, "out", x + self.mlp(self.norm2(x)).astype(jnp.float32))


class TextEncoder(nnx.Module):
    """UMT5's encoder stack."""

    def __init__(self, config: TextEncoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(config.vocab_size, config.dim, rngs=rngs)
        self.blocks = stacked(lambda rngs: Block(config, dtype, rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.dim, config.eps, dtype)

    def __call__(
        self, ids: Int[Array, "B T"], mask: Bool[Array, "B T"], taps: Taps | None = None
    ) -> Float[Array, "B T D"]:
        """See `encode_text`. `taps`: a dict that is filled with intermediates, `blocks.*` with a leading layer axis."""
        x = self.token_embedding.embedding[ids].astype(jnp.float32)  # rows first: the table is 2 GB in bf16
        block_of, layers = unstack(self.blocks)

        def layer(x, params):
            block_taps = None if taps is None else {}
            return block_of(params)(x, mask, block_taps), block_taps

        x, layer_taps = jax.lax.scan(layer, x, layers)
        for name, value in (layer_taps or {}).items():
            tap(taps, f"blocks.{name}", value)
        return self.norm(x)


@functools.cache  # the same object for the same model: `bind` and jit cache by it
def build_text_encoder(config: TextEncoderConfig, *, dtype: Any = jnp.float32) -> Build:
    """The encoder as a `Build` for fps_jax.models.params; parameters are created in float32 whatever `dtype`."""
    return lambda rngs: TextEncoder(config, dtype=dtype, rngs=rngs)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _encode(config: TextEncoderConfig, params: Params, ids: Array, mask: Array, *, dtype: Any) -> Array:
    with jax.default_matmul_precision("highest"):
        return bind(build_text_encoder(config, dtype=dtype), params)(ids, mask.astype(bool))


def encode_text(
    config: TextEncoderConfig,
    params: Params,
    ids: Int[Array, "B T"] | np.ndarray,
    mask: Bool[Array, "B T"] | Int[Array, "B T"] | np.ndarray,
    *,
    dtype: Any = jnp.float32,
) -> Float[Array, "B T D"]:
    """Text states of a batch of token ids, compiled once per shape.

    Args:
      config: the architecture.
      params: the `text_encoder` tree, in any float dtype.
      ids: token ids in [0, config.vocab_size), padded to one length T.
      mask: nonzero for a real token. Padding isn't attended to; its own outputs are returned, and mean nothing.
      dtype: float32 (true float32 matmuls) or bfloat16 (float32 residual stream, norm statistics and softmax).
    Returns: the states after the last norm, in `dtype`. The caller zeroes or drops those of padding.
    Raises: ValueError for ids outside the vocabulary (JAX would clamp them silently) or shapes that don't go together.
    Source: wan/modules/t5.py.
    """
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(f"ids of shape {ids.shape} and mask of shape {mask.shape}: both must be [batch, tokens]")
    if not isinstance(ids, Tracer):
        low, high = int(np.min(ids)), int(np.max(ids))
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"ids hold token {low if low < 0 else high}, but the text encoder's vocabulary is 0 to "
                f"{config.vocab_size - 1}; use the tokenizer that belongs to this checkpoint"
            )
    return _encode(config, params, jnp.asarray(ids, jnp.int32), jnp.asarray(mask), dtype=jnp.dtype(dtype))
