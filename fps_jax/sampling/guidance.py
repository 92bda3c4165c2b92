"""The velocity that a sampler follows: the model on a prompt, moved away from the model on a negative one."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fps_jax.attention.attend import TokenAttention
from fps_jax.choices import Remat
from fps_jax.config import DiTConfig
from fps_jax.models.dit import DENSE, DiTOutput, dit
from fps_jax.models.dit_layers import TextKV
from fps_jax.models.params import Params
from fps_jax.models.taps import Taps


class Inputs(NamedTuple):
    """All arrays of a sample that aren't parameters: where it starts, and what the model reads at every step. A pytree.

    Attributes:
      noise: `[B, 16, F, H, W]` float32, the initial noise.
      text: `[B, T, E]` text states of the prompt; or, without a negative one, the keys and values that `text_kv` made.
      negative: `[B, T, E]` text states of the negative prompt; None for no guidance.
      condition: `[B, 20, F, H, W]` mask and latents that i2v and flf2v read beside x.
      image: `[B, I, G]` image-tower tokens, for i2v and flf2v.
      step_noise: `[n, B, 16, F, H, W]` float32, what a solver that adds noise is given after each of its n steps.
    """

    noise: Float[Array, "B 16 F H W"]
    text: Float[Array, "B T E"] | TextKV
    negative: Float[Array, "B T E"] | None = None
    condition: Float[Array, "B 20 F H W"] | None = None
    image: Float[Array, "B I G"] | None = None
    step_noise: Float[Array, "n B 16 F H W"] | None = None


def guided_velocity(
    config: DiTConfig,
    params: Params,
    inputs: Inputs,
    x: Float[Array, "B 16 F H W"],
    t: Float[Array, ""] | Float[Array, "B"],
    attention: TokenAttention = DENSE,
    *,
    rope: Float[Array, "2 S H/2"] | None = None,
    guidance_scale: float | Array = 1.0,
    batch_guidance: bool = False,
    attention_taps: Taps | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
) -> DiTOutput:
    """v_negative + guidance_scale (v_text - v_negative) at x; where `inputs.negative` is None, v_text.

    Args:
      x: noisy latents, float32; `inputs.noise` and `inputs.step_noise` aren't read.
      t: timesteps in [0, 1000], one for all samples or one each.
      batch_guidance: evaluate both prompts as one batch of two instead of two passes (more memory, fewer launches).
      attention_taps: a dict that is filled with what `attention` records in the pass with the prompt (in the one pass of both).
      rope, dtype, remat: as for `dit`.
    Returns: float32 velocity, and the first stage with a NaN or inf of the pass with the prompt or, where that has none, the other.
    Raises: ValueError for a negative prompt beside keys and values.
    Source: classifier-free guidance (arXiv 2207.12598), as in Wan-Video/Wan2.1 wan/text2video.py.
    """

    def model(x, t, text, condition, image, taps=None):
        if condition is not None:
            x = jnp.concatenate([x, condition.astype(x.dtype)], axis=1)  # training data are bf16
        of_x = functools.partial(dit, config, params, x, t, text, image, rope=rope, dtype=dtype, remat=remat)
        return of_x(attention=attention, attention_taps=taps)

    def twice(a):
        return None if a is None else jnp.concatenate([a, a])

    _, text, negative, condition, image, _ = inputs
    t = jnp.broadcast_to(t, x.shape[:1])
    if negative is None:
        return model(x, t, text, condition, image, attention_taps)
    if isinstance(text, TextKV):
        raise ValueError(
            "text is keys and values, and negative is text states; give text states of both, or no negative"
        )
    if batch_guidance:
        both_texts = jnp.concatenate([text, negative])
        both = model(twice(x), twice(t), both_texts, twice(condition), twice(image), attention_taps)
        positive_v, negative_v = jnp.split(both.velocity, 2)
        bad = both.first_bad
    else:
        positive_v, bad = model(x, t, text, condition, image, attention_taps)
        negative_v, bad_negative = model(x, t, negative, condition, image)
        bad = jnp.where(bad >= 0, bad, bad_negative)
    return DiTOutput(negative_v + guidance_scale * (positive_v - negative_v), bad)
