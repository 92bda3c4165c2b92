"""The layers of the DiT: norms, time embedding, attention blocks. Residual stream, norms and modulation are float32."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fps_jax.config import DiTConfig
from fps_jax.models.linear import Linear
from fps_jax.models.rope import apply_rope
from fps_jax.models.taps import Taps, tap

Attend = Callable[[Array, Array, Array], Array]  # q, k, v `[B, S, N, H]` -> output; what a block calls


def layer_norm(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """LayerNorm without scale and bias, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


@functools.cache
def _sinusoid_table(dim: int) -> np.ndarray:
    angles = np.arange(1001)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)  # [1001, 2, dim/2]


def time_sinusoid(t: Float[Array, "B"], dim: int) -> Float[Array, "B dim"]:
    """Sinusoidal embedding [cos, sin] of timesteps in [0, 1000], right to float32's last bits.

    t * frequency in float32 would be off by 6e-5 rad at t = 1000 (3e-6 of the model's output). So whole timesteps come
    from a float64 table and the fraction is added by the angle sum.
    """
    t = jnp.clip(t.astype(jnp.float32), 0, 1000)
    whole = jnp.floor(t)
    cos_w, sin_w = jnp.moveaxis(jnp.asarray(_sinusoid_table(dim))[whole.astype(jnp.int32)], 1, 0)
    frequency = (10000.0 ** (-np.arange(dim // 2) / (dim // 2))).astype(np.float32)
    angle = (t - whole)[:, None] * frequency[None, :]
    cos_f, sin_f = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos_w * cos_f - sin_w * sin_f, sin_w * cos_f + cos_w * sin_f], axis=-1)


class TextKV(NamedTuple):
    """Keys and values that cross-attention makes of a text, in the compute dtype; of all layers with a leading axis."""

    k: Float[Array, "*L B T N H"]
    v: Float[Array, "*L B T N H"]


class RMSNorm(nnx.Module):
    """RMS norm over the whole model dim, in float32, output float32."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * self.scale.astype(jnp.float32)[None, None]


def by_token(modulation: Float[Array, "B G D"], frames: Int[Array, "S"] | None) -> Float[Array, "B S|1 D"]:
    """A modulation spread over the tokens: of each one's frame where there is a time a frame, else one for all (G = 1)."""
    return modulation if frames is None else jnp.take(modulation, frames, axis=1)


class MLP(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, d_in: int, d_mid: int, d_out: int, activation, *, dtype: Any, rngs: nnx.Rngs):
        self.up = Linear(d_in, d_mid, dtype=dtype, rngs=rngs)
        self.down = Linear(d_mid, d_out, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.down(self.activation(self.up(x)))


class SelfAttention(nnx.Module):
    """Self-attention with RMS-normed, rotated q and k. The norm is over all heads together, before the split."""

    def __init__(self, config: DiTConfig, *, dtype: Any, rngs: nnx.Rngs):
        d = config.dim
        self.q, self.k, self.v, self.o = (Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)
        self.heads, self.dtype = config.num_heads, dtype

    def __call__(self, x: Array, rope: Array, attend: Attend, taps: Taps | None) -> Array:
        q = tap(taps, "self_attn.norm_q", self.norm_q(self.q(x)))
        k = tap(taps, "self_attn.norm_k", self.norm_k(self.k(x)))
        v = tap(taps, "self_attn.v", self.v(x))
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, k, v))
        q = tap(taps, "self_attn.rope_q", apply_rope(q, rope))
        k = tap(taps, "self_attn.rope_k", apply_rope(k, rope))
        out = attend(q.astype(self.dtype), k.astype(self.dtype), v)
        return self.o(out.reshape(x.shape))


class CrossAttention(nnx.Module):
    """Attention to the text and, apart from it and added, to the image tokens. Padded text tokens *are* attended (as trained)."""

    def __init__(self, config: DiTConfig, *, dtype: Any, rngs: nnx.Rngs):
        d = config.dim
        self.q, self.k, self.v, self.o = (Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)
        if config.image_dim is not None:
            self.k_img, self.v_img = (Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(2))
            self.norm_k_img = RMSNorm(d, config.eps)
        self.heads, self.dtype = config.num_heads, dtype

    def __call__(self, x: Array, text: Array | TextKV, image: Array | None, cross: Attend, taps: Taps | None) -> Array:
        q = self._split(tap(taps, "cross_attn.norm_q", self.norm_q(self.q(x))))
        out = cross(q, *(text if isinstance(text, TextKV) else self.text_kv(text)))
        if image is not None:
            out = out + cross(q, self._split(self.norm_k_img(self.k_img(image))), self._split(self.v_img(image)))
        return self.o(out.reshape(x.shape))

    def text_kv(self, text: Float[Array, "B T D"]) -> TextKV:
        """Keys and values of embedded text: the same at every step and for every token of the video."""
        return TextKV(self._split(self.norm_k(self.k(text))), self._split(self.v(text)))

    def _split(self, a: Array) -> Array:
        return a.reshape(*a.shape[:2], self.heads, -1).astype(self.dtype)


class Block(nnx.Module):
    """A transformer block. Modulation is [shift, scale, gate] for self-attention, then for the MLP; cross-attention has none."""

    def __init__(self, config: DiTConfig, *, dtype: Any, rngs: nnx.Rngs):
        d = config.dim
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, d)) / d**0.5)
        self.self_attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        if config.cross_attn_norm:
            self.norm_cross = nnx.LayerNorm(d, epsilon=config.eps, dtype=jnp.float32, rngs=rngs)
        self.cross_attn = CrossAttention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(d, config.mlp_dim, d, functools.partial(jax.nn.gelu, approximate=True), dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B S D"],
        time: Float[Array, "B G 6 D"],
        frames: Int[Array, "S"] | None,
        rope: Float[Array, "2 *B S H/2"],
        text: Float[Array, "B T D"] | TextKV,
        image: Float[Array, "B I D"] | None,
        attend: Attend,
        cross: Attend,
        taps: Taps | None,
    ) -> Float[Array, "B S D"]:
        eps, norm_cross = self.config.eps, self.config.cross_attn_norm
        modulation = self.modulation.astype(jnp.float32)[None, None] + time
        shift1, scale1, gate1, shift2, scale2, gate2 = (by_token(m, frames) for m in jnp.moveaxis(modulation, 2, 0))
        h = tap(taps, "norm1", layer_norm(x, eps)) * (1 + scale1) + shift1
        h = tap(taps, "self_attn", self.self_attn(h, rope, attend, taps))
        x = x + h.astype(jnp.float32) * gate1
        h = tap(taps, "norm_cross", self.norm_cross(x) if norm_cross else x)
        h = tap(taps, "cross_attn", self.cross_attn(h, text, image, cross, taps))
        x = x + h.astype(jnp.float32)
        h = tap(taps, "norm2", layer_norm(x, eps)) * (1 + scale2) + shift2
        h = tap(taps, "mlp", self.mlp(h))
        return tap(taps, "out", x + h.astype(jnp.float32) * gate2)


class ImageEmbedding(nnx.Module):
    """Image-tower tokens to model dim (official MLPProj): exact GELU, LayerNorm eps 1e-5; learned positions for flf2v."""

    def __init__(self, config: DiTConfig, *, dtype: Any, rngs: nnx.Rngs):
        d = config.image_dim or 0
        self.norm_in = nnx.LayerNorm(d, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.up = Linear(d, d, dtype=dtype, rngs=rngs)
        self.down = Linear(d, config.dim, dtype=dtype, rngs=rngs)
        self.norm_out = nnx.LayerNorm(config.dim, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.with_positions = config.image_positions is not None
        if config.image_positions is not None:
            self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.image_positions, d)))

    def __call__(self, x: Float[Array, "B I E"]) -> Float[Array, "B I D"]:
        x = x.astype(jnp.float32)
        if self.with_positions:
            x = x + self.positions.astype(jnp.float32)[None]
        x = self.down(jax.nn.gelu(self.up(self.norm_in(x)), approximate=False))
        return self.norm_out(x)
