"""The image tower of CLIP ViT-H/14, up to the hidden state that Wan uses.

Source: Wan-Video/Wan2.1 wan/modules/clip.py (VisionTransformer with use_31_block=True); the `hidden_states[-2]` of
transformers' CLIPVisionModel, which diffusers takes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fps_jax.attention.attend import dense_attention
from fps_jax.config import ImageEncoderConfig
from fps_jax.models.params import Build, Params, bind, stacked, unstack


def _layer_norm(config: ImageEncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # two-pass variance: the fast one cancels where the mean is large, as it is in CLIP's outlier channels
    return nnx.LayerNorm(config.dim, epsilon=config.eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ImageEncoderConfig, rngs: nnx.Rngs):
        self.q = nnx.Linear(config.dim, config.dim, dtype=jnp.float32, rngs=rngs)
        self.k = nnx.Linear(config.dim, config.dim, dtype=jnp.float32, rngs=rngs)
        self.v = nnx.Linear(config.dim, config.dim, dtype=jnp.float32, rngs=rngs)
        self.o = nnx.Linear(config.dim, config.dim, dtype=jnp.float32, rngs=rngs)
        self.heads = config.num_heads

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (self.q(x), self.k(x), self.v(x)))
        return self.o(dense_attention(q, k, v).reshape(x.shape))


class MLP(nnx.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: ImageEncoderConfig, rngs: nnx.Rngs):
        self.up = nnx.Linear(config.dim, config.mlp_dim, dtype=jnp.float32, rngs=rngs)
        self.down = nnx.Linear(config.mlp_dim, config.dim, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ImageEncoderConfig, rngs: nnx.Rngs):
        self.norm1, self.norm2 = _layer_norm(config, rngs), _layer_norm(config, rngs)
        self.attn, self.mlp = Attention(config, rngs), MLP(config, rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ImageEncoder(nnx.Module):
    """The tower. Wan uses neither last block nor last norm nor projection: they are here for round trips."""

    def __init__(self, config: ImageEncoderConfig, *, rngs: nnx.Rngs):
        d, patch = config.dim, (config.patch_size, config.patch_size)
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (d,)) / d**0.5)
        self.patch_embedding = nnx.Conv(
            3, d, patch, strides=patch, padding="VALID", use_bias=False, dtype=jnp.float32, rngs=rngs
        )
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (config.num_tokens, d)) / d**0.5)
        self.norm_pre = _layer_norm(config, rngs)
        self.blocks = stacked(lambda rngs: Block(config, rngs), config.num_layers, rngs)
        self.norm_post = _layer_norm(config, rngs)
        if config.projection_dim is not None:
            self.projection = nnx.Param(jax.random.normal(rngs.params(), (d, config.projection_dim)) / d**0.5)
        self.config = config

    def __call__(self, pixels: Float[Array, "B P P 3"]) -> Float[Array, "B S D"]:
        d = self.config.dim
        patches = self.patch_embedding(pixels.astype(jnp.float32)).reshape(pixels.shape[0], -1, d)
        first = jnp.broadcast_to(self.class_embedding.astype(jnp.float32), (pixels.shape[0], 1, d))
        x = jnp.concatenate([first, patches], axis=1) + self.positions.astype(jnp.float32)[None]
        block_of, layers = unstack(self.blocks)

        def layer(i, x):  # by index: slicing off the last layer would copy all the others
            return block_of(jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), layers))(x)

        return jax.lax.fori_loop(0, self.config.num_layers - 1, layer, self.norm_pre(x))


@functools.cache  # the same object for the same model: `bind` and jit cache by it
def build_image_encoder(config: ImageEncoderConfig) -> Build:
    """The tower as a `Build` for fps_jax.models.params."""
    return lambda rngs: ImageEncoder(config, rngs=rngs)


@functools.partial(jax.jit, static_argnames="config")
def _encode(config: ImageEncoderConfig, params: Params, pixels: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return bind(build_image_encoder(config), params)(pixels)


def encode_image(config: ImageEncoderConfig, params: Params, pixels: Float[Array, "B P P 3"]) -> Float[Array, "B S D"]:
    """Image tokens: the output of the last block but one, without a final norm. Compiled once per batch size.

    Args:
      config: the architecture.
      params: the `image_encoder` tree, in any float dtype; the computation is float32.
      pixels: from `fps_jax.media.images.clip_pixels`; P is config.image_size.
    Returns: float32, S = config.num_tokens: the class token, then patches in raster order.
    Raises: ValueError for pixels of another shape.
    Source: wan/modules/clip.py.
    """
    size = config.image_size
    if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
        raise ValueError(
            f"pixels of shape {pixels.shape} must be [B, {size}, {size}, 3]; use fps_jax.media.images.clip_pixels"
        )
    return _encode(config, params, jnp.asarray(pixels))
