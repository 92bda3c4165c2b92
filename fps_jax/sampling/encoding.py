"""What the DiT is told about a video: text states, image-tower tokens, and the condition beside x.

Sampling makes it of a request, training of a clip; both have it from here, so that a model is trained on what it is given later.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fps_jax.config import Task, WanConfig
from fps_jax.media.images import clip_pixels
from fps_jax.models.image_encoder import encode_image
from fps_jax.models.params import Params
from fps_jax.models.text_encoder import encode_text

# The video frames that a task is given, by their place.
GIVEN_FRAMES: dict[Task, tuple[int, ...]] = {"t2v": (), "i2v": (0,), "flf2v": (0, -1)}


def text_states(
    config: WanConfig,
    params: Params,
    ids: Int[np.ndarray, "B T"],
    mask: Int[np.ndarray, "B T"],
    *,
    dtype: Any,
) -> Float[Array, "B T E"]:
    """Text states of prompts, zero beyond each one's own tokens.

    Args:
      params: of the text encoder, on the device.
      ids, mask: from the tokenizer, with `max_length=config.dit.text_len`.
      dtype: that the encoder computes in, and of the states.
    """
    states = encode_text(config.text_encoder, params, ids, mask, dtype=dtype)
    return jnp.where(jnp.asarray(mask, bool)[..., None], states, 0)


def image_tokens(
    config: WanConfig, params: Params, frames: Sequence[Float[np.ndarray, "_ H W 3"]], batch: int
) -> Float[Array, "B I E"]:
    """Image-tower tokens of the given frames, one after the other.

    Args:
      params: of the image tower, on the device.
      frames: float32 in [0, 1], first (and last), for one sample or each of the batch.
      batch: B.
    """
    assert config.image_encoder is not None
    size = config.image_encoder.image_size
    tokens = [encode_image(config.image_encoder, params, jnp.asarray(clip_pixels(f, size))) for f in frames]
    return jnp.concatenate([jnp.broadcast_to(t, (batch, *t.shape[1:])) for t in tokens], axis=1)


def condition_video(frames: Sequence[Float[np.ndarray, "_ H W 3"]], num_frames: int) -> Float[np.ndarray, "B F H W 3"]:
    """The video whose latents are the condition: the given frames in their places, the others grey. In [-1, 1].

    frames: float32 in [0, 1], first (and last).
    """
    rows = max(f.shape[0] for f in frames)
    video = np.zeros((rows, num_frames, *frames[0].shape[1:]), np.float32)
    video[:, 0] = 2 * frames[0] - 1
    if len(frames) == 2:
        video[:, -1] = 2 * frames[1] - 1
    return video


def condition_mask(given: int, latent_grid: Sequence[int]) -> Float[np.ndarray, "4 F H W"]:
    """1 where a video frame is given, 0 elsewhere; a latent frame stands for four of them.

    Args:
      given: how many frames: 1, the first; 2, the first and the last.
      latent_grid: latents (F, H, W).
    """
    mask = np.zeros((4, *latent_grid), np.float32)
    mask[:, 0] = 1  # the first latent frame holds one video frame, counted four times
    if given == 2:
        mask[3, -1] = 1
    return mask
