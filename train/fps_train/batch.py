"""What a training step reads: latents and what the model is told about them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int


class Batch(NamedTuple):
    """Samples of one bucket (equal shapes). A pytree; NumPy arrays in host memory until they are put on devices.

    Attributes:
      latents: `[B, Z, F, H, W]` bf16, normalised (`fps_jax.models.vae.encode`).
      text: `[B, T, E]` bf16 text states, zero beyond each caption's own tokens, T = `DiTConfig.text_len`; where text was dropped,
        those of the empty prompt.
      sample: `[B]` int64, which samples of the run these are, counted from 0; sample n is a function of (data, seed, n).
      condition: `[B, 4 + Z, F, H, W]` mask and latents that i2v and flf2v read beside x.
      image: `[B, I, G]` image-tower tokens, for i2v and flf2v.
    """

    latents: Float[Array | np.ndarray, "B Z F H W"]
    text: Float[Array | np.ndarray, "B T E"]
    sample: Int[Array | np.ndarray, "B"]
    condition: Float[Array | np.ndarray, "B C F H W"] | None = None
    image: Float[Array | np.ndarray, "B I G"] | None = None
