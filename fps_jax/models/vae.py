"""The causal 3D VAE: video to latents and back, a chunk of frames at a time; and whole clips, for training.

A chunk is one latent frame: one frame of video for the first, four for each later one. What the convolutions need of
earlier frames is in a cache of constant size, so device memory doesn't grow with the length of a video.
Source: Wan-Video/Wan2.1 wan/modules/vae.py.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fps_jax.config import VAEConfig
from fps_jax.models.params import Build, Params, abstract_params, bind
from fps_jax.models.vae_layers import (
    AttentionBlock,
    Cache,
    Conv,
    Downsample,
    History,
    ResidualBlock,
    RMSNorm,
    Upsample,
    WholeClip,
)
from fps_jax.models.vae_tiling import Tiles, one_tile, plan_tiles
from fps_jax.progress import Progress

_LIVE_ACTIVATIONS = 8  # see decode_bytes


def _middle(dim: int, rngs: nnx.Rngs) -> tuple[ResidualBlock, AttentionBlock, ResidualBlock]:
    return ResidualBlock(dim, dim, rngs), AttentionBlock(dim, rngs), ResidualBlock(dim, dim, rngs)


class Encoder(nnx.Module):
    """Video to the mean and log variance of its latents."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = Conv((3, 3, 3), 3, dims[0], rngs)
        blocks: list[nnx.Module] = []
        for stage, (d_in, d_out) in enumerate(itertools.pairwise(dims)):
            for j in range(config.num_res_blocks):
                blocks.append(ResidualBlock(d_out if j else d_in, d_out, rngs))
            if stage + 1 < len(config.dim_mult):
                blocks.append(Downsample(d_out, config.temporal_downsample[stage], rngs))
        for i, block in enumerate(blocks):
            setattr(self, f"down_{i}", block)
        self.mid_0, self.mid_1, self.mid_2 = _middle(dims[-1], rngs)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = Conv((3, 3, 3), dims[-1], 2 * config.z_dim, rngs)
        self.num_blocks = len(blocks)

    def __call__(self, x: Float[Array, "B F H W 3"], history: History) -> Float[Array, "B f h w 2Z"]:
        x = self.conv_in.causal(x, history)
        for i in range(self.num_blocks):
            x = getattr(self, f"down_{i}")(x, history)
        for block in (self.mid_0, self.mid_1, self.mid_2):
            x = block(x, history)
        return self.conv_out.causal(jax.nn.silu(self.norm_out(x)), history)


class Decoder(nnx.Module):
    """Latents, not normalised, to video."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        dims = [config.base_dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        temporal = config.temporal_downsample[::-1]
        self.conv_in = Conv((3, 3, 3), config.z_dim, dims[0], rngs)
        self.mid_0, self.mid_1, self.mid_2 = _middle(dims[0], rngs)
        blocks: list[nnx.Module] = []
        for stage, (d_in, d_out) in enumerate(itertools.pairwise(dims)):
            d_in = d_in // 2 if stage else d_in  # the upsampling before it halved the channels
            for j in range(config.num_res_blocks + 1):
                blocks.append(ResidualBlock(d_out if j else d_in, d_out, rngs))
            if stage + 1 < len(config.dim_mult):
                blocks.append(Upsample(d_out, temporal[stage], rngs))
        for i, block in enumerate(blocks):
            setattr(self, f"up_{i}", block)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = Conv((3, 3, 3), dims[-1], 3, rngs)
        self.num_blocks = len(blocks)

    def __call__(self, z: Float[Array, "B f h w Z"], history: History) -> Float[Array, "B F H W 3"]:
        x = self.conv_in.causal(z, history)
        for block in (self.mid_0, self.mid_1, self.mid_2):
            x = block(x, history)
        for i in range(self.num_blocks):
            x = getattr(self, f"up_{i}")(x, history)
        return self.conv_out.causal(jax.nn.silu(self.norm_out(x)), history)


class VAE(nnx.Module):
    """Encoder, decoder, and the two 1x1x1 convolutions between them and the latents."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs)
        self.quant_conv = Conv((1, 1, 1), 2 * config.z_dim, 2 * config.z_dim, rngs)
        self.post_quant_conv = Conv((1, 1, 1), config.z_dim, config.z_dim, rngs)
        self.decoder = Decoder(config, rngs)


@functools.cache
def build_vae(config: VAEConfig) -> Build:
    """What `fps_jax.models.params` makes parameters from."""
    return functools.partial(VAE, config)


def time_factor(config: VAEConfig) -> int:
    """Video frames to a latent frame (after the first): 4 for Wan."""
    return 2 ** sum(config.temporal_downsample)


def space_factor(config: VAEConfig) -> int:
    """Pixels to a latent position along H and W: 8 for Wan."""
    return 2 ** (len(config.dim_mult) - 1)


def _statistics(config: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    mean, std = np.array(config.latents_mean, np.float32), np.array(config.latents_std, np.float32)
    return mean.reshape(1, 1, 1, 1, -1), np.float32(1) / std.reshape(1, 1, 1, 1, -1)


def _float32(params: Params) -> Params:
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def decode_chunk(
    config: VAEConfig, params: Params, z: Float[Array, "B 1 h w Z"], cache: Cache | None
) -> tuple[Float[Array, "B F H W 3"], Cache]:
    """One latent frame to its frames of video, and the cache for the next. Pure: for `jax.jit` and ahead-of-time compiles.

    Args:
      z: normalised, channel-last.
      cache: None for the first frame of a video, then what the call before returned.
    Returns: float32 in [-1, 1], 1 frame for the first latent frame and 4 for each later one; cache float32.
    """
    history = History(cache)
    return jnp.clip(_decoded(config, params, z, history), -1, 1), history.cache


def _decoded(config: VAEConfig, params: Params, z: Float[Array, "B f h w Z"], history: History) -> Array:
    mean, inverse_std = _statistics(config)
    model = bind(build_vae(config), _float32(params))
    z = z.astype(jnp.float32) / inverse_std + mean
    return model.decoder(model.post_quant_conv.pointwise(z), history)


def encode_chunk(
    config: VAEConfig, params: Params, video: Float[Array, "B F H W 3"], cache: Cache | None
) -> tuple[Float[Array, "B 1 h w Z"], Cache]:
    """Frames of video to their latent frame, and the cache for the next. Pure, as `decode_chunk`.

    Args:
      video: in [-1, 1]; the first frame of a video alone (cache=None), then 4 at a time.
    Returns: the distribution's mean, normalised, float32, channel-last; cache float32.
    """
    history = History(cache)
    return _moments(config, params, video, history)[0], history.cache


def _moments(
    config: VAEConfig, params: Params, video: Float[Array, "B F H W 3"], history: History
) -> tuple[Float[Array, "B f h w Z"], Float[Array, "B f h w Z"]]:
    """(mean, log variance) of normalised latents."""
    mean, inverse_std = _statistics(config)
    model = bind(build_vae(config), _float32(params))
    moments = model.quant_conv.pointwise(model.encoder(video.astype(jnp.float32), history))
    mu, log_variance = jnp.split(moments, 2, axis=-1)
    return (mu - mean) * inverse_std, log_variance + np.log(np.square(inverse_std))


def encode_moments(
    config: VAEConfig, params: Params, video: Float[Array, "B F H W 3"]
) -> tuple[Float[Array, "B Z f h w"], Float[Array, "B Z f h w"]]:
    """Whole clips to the Gaussians of their latents: pure and differentiable, for training. `encode` does it in little memory.

    Args:
      video: in [-1, 1], F = 4 k + 1 frames, H and W multiples of 8. Memory grows with B and F.
    Returns: (mean, log of the variance), float32, both of *normalised* latents, as latents are everywhere: a sample is
      mean + exp(log_variance / 2) * noise. The mean is `encode`'s.
    Raises: ValueError if a size of video breaks a rule.
    """
    check_video(config, video.shape)
    mean, log_variance = _moments(config, params, video, WholeClip())
    return jnp.moveaxis(mean, -1, 1), jnp.moveaxis(log_variance, -1, 1)


def decode_video(
    config: VAEConfig, params: Params, latents: Float[Array, "B Z f h w"], *, clip: bool = False
) -> Float[Array, "B F H W 3"]:
    """Whole latents to clips: pure and differentiable, for training. `decode` does it in little memory.

    Args:
      latents: normalised. Memory grows with B and f.
      clip: to [-1, 1], as `decode` does. A clipped value has no gradient, so training doesn't.
    Returns: float32, F = 4 (f - 1) + 1, H = 8 h, W = 8 w.
    Raises: ValueError if the shape of latents isn't [B, Z, f, h, w].
    """
    check_latents(config, latents.shape)
    video = _decoded(config, params, jnp.moveaxis(latents, 1, -1), WholeClip())
    return jnp.clip(video, -1, 1) if clip else video


def check_latents(config: VAEConfig, shape: tuple[int, ...]) -> None:
    """Raises ValueError if this isn't the shape of latents of this VAE."""
    if len(shape) != 5 or shape[1] != config.z_dim or 0 in shape:
        raise ValueError(f"latents has shape {tuple(shape)}; pass [batch, {config.z_dim}, frames, height, width]")


def check_video(config: VAEConfig, shape: tuple[int, ...]) -> None:
    """Raises ValueError if the VAE can't encode a video of this shape."""
    space, time = space_factor(config), time_factor(config)
    if len(shape) != 5 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"video has shape {tuple(shape)}; pass [batch, frames, height, width, 3]")
    _, length, height, width, _ = shape
    if length % time != 1:
        raise ValueError(
            f"video has num_frames={length}, not {time}k+1 (Wan's VAE groups frames by {time}); "
            f"use {(length - 1) // time * time + 1}"
        )
    for name, size in (("height", height), ("width", width)):
        if size % space:
            raise ValueError(f"video has {name}={size}, not a multiple of {space}; use {max(size // space, 1) * space}")


# Two programs each: without and with a cache. The cache is donated: at 720p two of them are 16 GB.
_decode_chunk = jax.jit(decode_chunk, static_argnums=0, donate_argnames="cache")
_encode_chunk = jax.jit(encode_chunk, static_argnums=0, donate_argnames="cache")


def decode(
    config: VAEConfig,
    params: Params,
    latents: Float[Array, "B Z f h w"],
    *,
    tiling: bool = False,
    progress: Progress | None = None,
) -> Float[np.ndarray, "B F H W 3"]:
    """Latents to video.

    Args:
      params: the tree of `VAE`; computed in float32 whatever their dtype.
      latents: normalised ((z - mean) / std by channel), f frames.
      tiling: in overlapping tiles of at most 512 x 512 pixels that are blended. Less memory; not the same numbers, as
        tiles don't see each other.
      progress: called with (chunks done, chunks in all).
    Returns: float32 in host memory, in [-1, 1], F = 4 (f - 1) + 1, H = 8 h, W = 8 w.
    Raises: ValueError if the shape of latents isn't [B, Z, f, h, w].
    """
    check_latents(config, latents.shape)
    z = np.moveaxis(np.asarray(latents, np.float32), 1, -1)
    space, time = space_factor(config), time_factor(config)
    batch, length, height, width, _ = z.shape
    out = np.zeros((batch, time * (length - 1) + 1, height * space, width * space, 3), np.float32)
    tiles = plan_tiles(height, width) if tiling else one_tile(height, width)
    params, run = _float32(params), functools.partial(_decode_chunk, config)
    _run_tiles(run, params, z, [1] * length, out, tiles, (1, space), progress)
    return out


def encode(
    config: VAEConfig,
    params: Params,
    video: Float[Array | np.ndarray, "B F H W 3"],
    *,
    tiling: bool = False,
    progress: Progress | None = None,
) -> Float[np.ndarray, "B Z f h w"]:
    """Video to the mean of its latents' distribution.

    Args:
      params, tiling, progress: as for `decode`.
      video: in [-1, 1], F = 4 k + 1 frames, H and W multiples of 8.
    Returns: float32 in host memory, normalised, f = k + 1, h = H / 8, w = W / 8.
    Raises: ValueError if a size of video breaks a rule.
    """
    check_video(config, video.shape)
    space, time = space_factor(config), time_factor(config)
    batch, length, height, width, _ = video.shape
    chunks = [1] + [time] * (length // time)
    height, width = height // space, width // space
    out = np.zeros((batch, len(chunks), height, width, config.z_dim), np.float32)
    tiles = plan_tiles(height, width) if tiling else one_tile(height, width)
    params, run = _float32(params), functools.partial(_encode_chunk, config)
    _run_tiles(run, params, np.asarray(video, np.float32), chunks, out, tiles, (space, 1), progress)
    return np.ascontiguousarray(np.moveaxis(out, -1, 1))


def _run_tiles(
    run: Callable,
    params: Params,
    x: np.ndarray,
    chunks: list[int],
    out: np.ndarray,
    tiles: Tiles,
    scales: tuple[int, int],
    progress: Progress | None,
) -> None:
    """Add each sample's and tile's chunks into `out`. Sample by sample: memory doesn't grow with the batch either."""
    done, total = 0, len(x) * len(tiles) * len(chunks)
    for sample, blended in zip(x, out, strict=True):
        windows = zip(tiles.windows(scales[0]), tiles.windows(scales[1]), strict=True)
        for (rows, columns, _), (out_rows, out_columns, weights) in windows:
            pieces = np.split(sample[:, rows, columns], np.cumsum(chunks)[:-1])
            cache, waiting, start = None, None, 0
            for piece in [*pieces, None]:
                ready = waiting
                if piece is not None:
                    waiting, cache = run(params, np.ascontiguousarray(piece)[None], cache)
                if ready is not None:  # fetched while the device works on the next chunk
                    ready = np.asarray(ready)[0]
                    blended[start : start + len(ready), out_rows, out_columns] += weights * ready
                    start, done = start + len(ready), done + 1
                    if progress is not None:
                        progress(done, total)


def decode_bytes(config: VAEConfig, height: int, width: int) -> int:
    """Estimate of the device memory that decoding frames of height x width pixels takes at its peak, in bytes.

    Parameters and caches exactly; of the rest, as many full-size activations (4 frames, float32) as a later chunk
    compiled for an H200 holds at once: 7.0 at 480 x 832, 7.5 at 720 x 1280.
    """
    space = space_factor(config)
    params = abstract_params(build_vae(config))
    z = jax.ShapeDtypeStruct((1, 1, -(-height // space), -(-width // space), config.z_dim), jnp.float32)
    video, cache = jax.eval_shape(functools.partial(decode_chunk, config, cache=None), params, z)
    activation = 4 * video.size // 3 * time_factor(config) * config.base_dim
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((params, cache)))
    return held + _LIVE_ACTIVATIONS * activation


class DecodeStream:
    """Latents of one video to its frames as they come: the bits of `decode`, however the latents are split.

    Attributes:
      cache: what the frames so far left for the next, of constant size; None before the first. It may be set, to go on elsewhere.
    """

    def __init__(self, config: VAEConfig, params: Params):
        self.config, self._params = config, _float32(params)
        self.cache: Cache | None = None
        self._pushed: dict[int, Array] = {}

    def begin(self, latents: Float[Array | np.ndarray, "1 Z f h w"], begun: dict[int, Array]) -> None:
        """Has the device decode the next latents, and doesn't wait for it.

        begun: takes what `frames` are made of, latent frame by latent frame. One that is broken off is gone on with where it is
          given again, with the same latents.
        Raises: ValueError for latents of another shape, or of several videos.
        """
        check_latents(self.config, latents.shape)
        if latents.shape[0] != 1:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; a stream decodes one video, [1, ...]")
        chunks = np.split(np.moveaxis(np.asarray(latents, np.float32), 1, -1), latents.shape[2], axis=1)
        for i in range(len(begun), len(chunks)):
            z = np.ascontiguousarray(chunks[i])
            begun[i], self.cache = _decode_chunk(
                self.config, self._params, z, self.cache
            )  # at once, whatever is broken off

    @staticmethod
    def frames(begun: dict[int, Array]) -> Float[np.ndarray, "F H W 3"]:
        """The frames, float32 in [-1, 1]: 1 of the first latent frame of a video, 4 of each later one."""
        return np.concatenate([np.asarray(f)[0] for f in begun.values()])

    def push(self, latents: Float[Array | np.ndarray, "1 Z f h w"]) -> Float[np.ndarray, "F H W 3"]:
        """The frames of the next latents: `begin` and `frames`, with their errors, and gone on with in the same way."""
        self.begin(latents, self._pushed)
        frames = self.frames(self._pushed)
        self._pushed = {}
        return frames

    def restart(self) -> None:
        """Begins another video."""
        self.cache, self._pushed = None, {}
