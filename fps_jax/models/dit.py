"""The Wan2.1 diffusion transformer: T2V, I2V and FLF2V, 1.3B and 14B, from one class.

Source: Wan-Video/Wan2.1 wan/modules/model.py (WanModel); numerics checked against it activation by activation.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fps_jax.attention.attend import SAVED, DenseAttention, TokenAttention, dense_attention, keeps_attention
from fps_jax.choices import Remat, check_choice
from fps_jax.config import DiTConfig
from fps_jax.models.dit_layers import MLP, Block, ImageEmbedding, TextKV, by_token, layer_norm, time_sinusoid
from fps_jax.models.linear import Linear
from fps_jax.models.params import Build, Params, bind, flatten, stacked, unflatten, unstack
from fps_jax.models.rope import rope_table
from fps_jax.models.taps import Taps, tap
from fps_jax.sizes import token_grid

# Kept in float32 when the rest is bf16: what upstream computes outside autocast, vectors too small to matter, adapters' masters.
_FLOAT32_PARAMS = re.compile(
    r"^(time_embedding|time_projection|head)/|modulation$|norm[^/]*/(scale|bias)$|positions$|lora_[ab]$"
)


DENSE = DenseAttention()


class DiTOutput(NamedTuple):
    """velocity: `[B, 16, F, H, W]` float32. first_bad: int32, the first stage with a NaN or inf (`stage_name`), -1 for none."""

    velocity: Array
    first_bad: Array


def stage_name(config: DiTConfig, stage: int) -> str:
    """Name of a stage as counted in `DiTOutput.first_bad`."""
    if stage == 0:
        return "the embeddings"
    return f"block {stage - 1}" if stage <= config.num_layers else "the head"


def param_dtype(path: str, dtype: Any) -> Any:
    """dtype of the parameter at `path` in a model with compute dtype `dtype`."""
    return jnp.dtype(jnp.float32 if _FLOAT32_PARAMS.search(path) else dtype)


def cast_params(params: Params, dtype: Any) -> Params:
    """Parameters as a model with compute dtype `dtype` holds them: matrices in `dtype`, float32 islands in float32.

    Takes jax or NumPy arrays and casts leaf by leaf on the device where each leaf is.
    """
    return unflatten({path: leaf.astype(param_dtype(path, dtype)) for path, leaf in flatten(params)})


class DiT(nnx.Module):
    """Velocity of the flow from noisy latents, time, text and image tokens."""

    def __init__(self, config: DiTConfig, *, dtype: Any = jnp.float32, remat: Remat = "none", rngs: nnx.Rngs):
        d = config.dim
        patch_dim = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        gelu = functools.partial(jax.nn.gelu, approximate=True)
        self.patch_embedding = Linear(config.in_channels * patch_dim, d, dtype=dtype, rngs=rngs)
        self.text_embedding = MLP(config.text_dim, d, d, gelu, dtype=dtype, rngs=rngs)
        self.time_embedding = MLP(config.freq_dim, d, d, jax.nn.silu, dtype=jnp.float32, rngs=rngs)
        self.time_projection = Linear(d, 6 * d, dtype=jnp.float32, rngs=rngs)
        if config.image_dim is not None:
            self.image_embedding = ImageEmbedding(config, dtype=dtype, rngs=rngs)
        self.blocks = stacked(functools.partial(_block, config, dtype), config.num_layers, rngs)
        self.head = Head(config, patch_dim, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.remat: Remat = remat

    def __call__(
        self,
        latents: Float[Array, "B C F H W"],
        t: Float[Array, "B"] | Float[Array, "B F"],
        text_states: Float[Array, "B T E"] | TextKV,
        image_states: Float[Array, "B I G"] | None = None,
        *,
        rope: Float[Array, "2 S H/2"] | None = None,
        attention: TokenAttention = DENSE,
        attention_taps: Taps | None = None,
        taps: Taps | None = None,
    ) -> DiTOutput:
        """One evaluation on whole latents.

        Args:
          latents: noisy latents, then (i2v, flf2v) 4 mask and 16 condition channels: `config.in_channels` in all.
          t: timesteps in [0, 1000], whole or not; of a sample, or of each of its latent frames.
          text_states: text encoder outputs without padding tokens, T <= config.text_len; zeros are appended to it. Or what
            `text_kv` made of them.
          image_states: image-tower tokens, 257 (i2v) or 514 (flf2v); None for t2v.
          rope: the tokens' table in raster order; None for a video's first frames.
          attention: the self-attention; with a tile layout the whole model runs in tile order, permuted once in and once out.
          attention_taps: a dict that is filled with what `attention` records, with a leading layer axis.
          taps: a dict that is filled with named intermediates, `blocks.*` with a leading layer axis.
        """
        pf, py, px = self.config.patch_size
        grid = token_grid(latents.shape[2:], self.config.patch_size)
        patches = rearrange(latents, "b c (f pf) (y py) (x px) -> b (f y x) (c pf py px)", pf=pf, py=py, px=px)
        rope = rope_table(grid, self.config.head_dim) if rope is None else rope
        frames = None
        if t.ndim == 2:
            if t.shape[1] != grid[0]:
                raise ValueError(
                    f"t has shape {t.shape}; give one for each of {grid[0]} latent frames, or one a sample"
                )
            frames = jnp.repeat(jnp.arange(grid[0], dtype=jnp.int32), grid[1] * grid[2])
        layout = attention.layout
        if layout is not None:
            if layout.grid != grid:
                raise ValueError(f"attention is planned for {layout.grid} tokens; these latents have {grid}")
            patches, rope = layout.to_tiles(patches), layout.to_tiles(rope)
            frames = None if frames is None else layout.to_tiles(frames[None])[0]
        rope = jnp.concatenate([attention.place(angles[None]) for angles in rope])  # on a mesh, cut as the tokens are
        tokens, first_bad = self.tokens(
            patches,
            t,
            text_states,
            rope,
            frames=frames,
            image_states=image_states,
            attention=attention,
            attention_taps=attention_taps,
            taps=taps,
        )
        if layout is not None:
            tokens = layout.from_tiles(tokens)
        f, y, x = grid
        velocity = rearrange(
            tokens, "b (f y x) (pf py px c) -> b c (f pf) (y py) (x px)", f=f, y=y, x=x, pf=pf, py=py, px=px
        )
        return DiTOutput(velocity, first_bad)

    def tokens(
        self,
        patches: Float[Array, "B S P"],
        t: Float[Array, "B"] | Float[Array, "B G"],
        text_states: Float[Array, "B T E"] | TextKV,
        rope: Float[Array, "2 *B S H/2"],
        *,
        frames: Int[Array, "S"] | None = None,
        image_states: Float[Array, "B I G"] | None = None,
        token_mask: Bool[Array, "B S"] | None = None,
        attention: TokenAttention = DENSE,
        attention_taps: Taps | None = None,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "B S Q"], Int[Array, ""]]:
        """The same on patches in any token order, `rope` in that order, wherever in a video its frames are.

        `frames`: which column of t is each token's, where t is `[B, G]`. `text_states` may be what `text_kv` made of them.
        `token_mask` (true: a real token) is for batches of different grids: masked tokens enter as zeros and are hidden as keys
        from `DenseAttention`; another `attention` has to hide them itself.
        """
        config = self.config

        # Tokens in: the residual stream, float32 from here to the head.
        x = attention.place(self.patch_embedding(patches).astype(jnp.float32))
        if token_mask is not None:
            x = jnp.where(token_mask[..., None], x, 0)
        tap(taps, "blocks_input", x)

        # Time: one modulation for all blocks, to which each adds its own; the head takes the embedding itself. On a mesh every
        # device has all samples' numbers, which are few, so that the weights, which are many, stay where they are.
        if (frames is None) != (t.ndim == 1):
            raise ValueError(
                f"t has shape {t.shape} {'without' if frames is None else 'with'} frames; [B, G] goes with them"
            )
        everywhere = functools.partial(attention.place, tokens=False, samples=False)
        time = everywhere(self.time_embedding(everywhere(time_sinusoid(t.reshape(-1), config.freq_dim))))
        time = tap(taps, "time_embedding", time)
        modulation = everywhere(self.time_projection(jax.nn.silu(time)))
        modulation = tap(taps, "time_projection", modulation)
        time = time.reshape(t.shape[0], -1, config.dim)
        modulation = modulation.reshape(t.shape[0], -1, 6, config.dim)

        # Text: embedded here, or keys and values that were made before, a pair a layer.
        text_kv = text_states if isinstance(text_states, TextKV) else None
        text = None if isinstance(text_states, TextKV) else self._embed_text(text_states, attention, taps)

        # Image: what the task needs, and nothing else.
        if (image_states is None) != (config.image_dim is None):
            needs = "takes no" if config.image_dim is None else "needs"
            raise ValueError(
                f"image_states={'None' if image_states is None else '...'}: a {config.task} model {needs} image_states"
            )
        image = None
        if image_states is not None:
            image = tap(taps, "image_embedding", self.image_embedding(image_states)).astype(self.dtype)

        # Blocks: one scan over the stacked layers. Each has dicts of its own for taps, which the scan stacks.
        block_of, layers = unstack(self.blocks)

        def layer(x, inputs):
            params, index, own_text = inputs
            block_taps, own_taps = (None if wanted is None else {} for wanted in (taps, attention_taps))
            if token_mask is not None and isinstance(attention, DenseAttention):
                attend = functools.partial(dense_attention, key_mask=token_mask, name=SAVED)
            else:
                attend = functools.partial(attention, layer=index, taps=own_taps)
            told = text if own_text is None else own_text
            cross = attention.cross
            x = block_of(params)(attention.place(x), modulation, frames, rope, told, image, attend, cross, block_taps)
            return x, (jnp.isfinite(x).all(), block_taps, own_taps)

        indices = jnp.arange(config.num_layers, dtype=jnp.int32)
        embedded = [a for a in (x, modulation, text, image) if a is not None]
        finite = [jnp.stack([jnp.isfinite(a).all() for a in embedded]).all()[None]]
        x, (finite_layers, layer_taps, own_taps) = jax.lax.scan(
            _rematerialised(layer, self.remat), x, (layers, indices, text_kv)
        )
        for name, value in (layer_taps or {}).items():
            tap(taps, f"blocks.{name}", value)
        for name, value in (own_taps or {}).items():
            tap(attention_taps, name, value)

        # Tokens out, and the first stage that isn't finite (`stage_name`): embeddings, blocks, head.
        out = tap(taps, "head", self.head(x, time, frames))
        finite += [finite_layers, jnp.isfinite(out).all()[None]]
        bad = ~jnp.concatenate(finite)
        return out, jnp.where(bad.any(), jnp.argmax(bad).astype(jnp.int32), jnp.int32(-1))

    def text_kv(self, text_states: Float[Array, "B T E"]) -> TextKV:
        """Cross-attention's keys and values of a text in every layer, for many calls of `tokens`: `[L, B, text_len, N, H]`."""
        text = self._embed_text(text_states, DENSE, None)
        block_of, layers = unstack(self.blocks)
        return jax.lax.scan(lambda _, params: (None, block_of(params).cross_attn.text_kv(text)), None, layers)[1]

    def _embed_text(self, text_states: Array, attention: TokenAttention, taps: Taps | None) -> Float[Array, "B T D"]:
        # Padding comes before the embedding: upstream's padded tokens are the MLP's image of zero, and are attended.
        missing = self.config.text_len - text_states.shape[1]
        text = jnp.pad(text_states.astype(self.dtype), ((0, 0), (0, missing), (0, 0)))
        # Embedded whole: of a device's part there are fewer numbers than of the weights beside it, which XLA would then move. The
        # blocks' keys and values are made of the parts.
        whole = attention.place(tap(taps, "text_embedding", self.text_embedding(text)), tokens=False)
        return attention.place_text(whole)


class Head(nnx.Module):
    """Modulated norm and projection to patches, in float32. Its modulation takes the time embedding itself, without SiLU."""

    def __init__(self, config: DiTConfig, patch_dim: int, *, rngs: nnx.Rngs):
        d = config.dim
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, d)) / d**0.5)
        self.proj = Linear(d, config.out_channels * patch_dim, dtype=jnp.float32, rngs=rngs)
        self.eps = config.eps

    def __call__(
        self, x: Float[Array, "B S D"], time: Float[Array, "B G D"], frames: Int[Array, "S"] | None
    ) -> Float[Array, "B S Q"]:
        modulation = self.modulation.astype(jnp.float32)[None, None] + time[:, :, None]
        shift, scale = (by_token(m, frames) for m in jnp.moveaxis(modulation, 2, 0))
        return self.proj(layer_norm(x, self.eps) * (1 + scale) + shift)


def _block(config: DiTConfig, dtype: Any, rngs: nnx.Rngs) -> Block:
    return Block(config, dtype=dtype, rngs=rngs)


def _rematerialised(layer, remat: Remat):
    if remat == "none":
        return layer
    policies = {
        "attention": keeps_attention,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    # Forward and backward are two loops: XLA can't merge what one computes with what the other does, and needs no barrier.
    return jax.checkpoint(layer, policy=policies[remat], prevent_cse=False)


def build_dit(config: DiTConfig, *, dtype: Any = jnp.float32, remat: Remat = "none") -> Build:
    """The model as a `Build` for fps_jax.models.params: `bind(build_dit(config), params)(latents, t, text_states)`."""
    check_choice("remat", remat, Remat)
    return _build(config, jnp.dtype(dtype), remat)


@functools.cache  # the same object for the same model: `bind` and jit cache by it
def _build(config: DiTConfig, dtype: Any, remat: Remat) -> Build:
    return lambda rngs: DiT(config, dtype=dtype, remat=remat, rngs=rngs)


def dit(
    config: DiTConfig, params: Params, *args, dtype: Any = jnp.float32, remat: Remat = "none", **kwargs
) -> DiTOutput:
    """`DiT.__call__` as a pure function of params. float32 matmuls are true float32 (no TF32)."""
    with jax.default_matmul_precision("highest"):
        return bind(build_dit(config, dtype=dtype, remat=remat), params)(*args, **kwargs)
