"""What a stream is given to begin with: frames of a clip that it continues, a picture, or latents of another stream."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fps_jax.causal import CausalConfig
from fps_jax.config import WanConfig
from fps_jax.media.images import image_count, load_image
from fps_jax.models.vae import encode, time_factor
from fps_jax.progress import progress_bar
from fps_jax.sampling.pipeline import WanPipeline


def _are_latents(given: Any, channels: int) -> bool:
    """`[Z, f, h, w]` of floats, which frames `[T, H, W, 3]` could only be with three columns of pixels."""
    if getattr(given, "ndim", 0) != 4 or given.shape[-1] == 3:
        return False
    return given.shape[0] == channels and jnp.issubdtype(given.dtype, jnp.floating)


def given_latent_frames(given: Any, config: WanConfig, causal: CausalConfig) -> int:
    """How many latent frames it is, 0 for None; no file is read.

    Raises: ValueError where they are no whole blocks, that says which numbers of frames are.
    """
    if given is None:
        return 0
    if _are_latents(given, config.vae.z_dim):
        causal.check_frames(given.shape[1], "given latent frames")
        return given.shape[1]
    return latent_frames(image_count(given, "given"), time_factor(config.vae), causal)


def latent_frames(frames: int, each: int, causal: CausalConfig) -> int:
    """Latent frames of so many of video: one of the first, and one of `each` later ones. Raises as `given_latent_frames`."""
    n, alone = causal.frames_per_block, int(causal.first_frame_alone)
    count, rest = divmod(frames - 1, each)
    blocks, within = divmod(count + 1 - alone, n)
    if not rest and not within:
        return count + 1

    def ends(block: int) -> int:
        return each * (alone + n * block - 1) + 1

    if frames == 1:
        raise ValueError(
            f"given is one frame, which is one latent frame, and this model's first block has {n}; give first_frame_alone=True "
            f"(--first-frame-alone), or {ends(1)} frames"
        )
    first = 0 if alone else 1
    fits = ", ".join(str(ends(block)) for block in range(first, first + 3))
    nearest = max(ends(max(blocks, first)), ends(first))
    use = f"give the last {nearest} of them (--video-frames {nearest})" if nearest < frames else f"give {nearest}"
    raise ValueError(f"given has {frames} frames, and this model's blocks end at {fits}, ... of them; {use}")


def given_latents(given: Any, wan: WanPipeline, shape: tuple[int, ...]) -> Float[np.ndarray, "1 Z f h w"]:
    """The latents, in host memory.

    Args:
      given: frames, as `fps_jax.media.images.load_image` takes them: `[T, H, W, 3]` uint8 or floats in [0, 1], or a picture's path;
        resized to cover the video's size and cropped, where they have another. Or latents `[Z, f, h, w]`, as `Block.latents`.
      shape: of one latent frame, `[1, Z, 1, h, w]`.
    Raises: as `load_image`; ValueError for latents of another shape, or with NaN or inf.
    """
    z, h, w = shape[1], *shape[3:]
    if _are_latents(given, z):
        latents = np.asarray(given, np.float32)[None]
        if (latents.shape[1], *latents.shape[3:]) != (z, h, w):
            raise ValueError(f"given latents have shape {latents.shape[1:]}; this video needs [{z}, frames, {h}, {w}]")
        if not np.isfinite(latents).all():
            raise ValueError("given latents hold NaN or inf; give latents of a stream that had none")
        return latents
    height, width = 8 * h, 8 * w
    frames = load_image(given, height, width, "given", tell_crop=True)
    tiling = wan.needs_tiling(height, width)
    frames *= 2  # to [-1, 1], in place: a minute at 480p is 5 GB
    frames -= 1
    with progress_bar("encode frames", wan.show_progress) as bar:
        return encode(wan.config.vae, wan.params["vae"], frames[None], tiling=tiling, progress=bar)
