"""The flow-matching loss: how far a model's velocity is from the one that leads from data to noise.

x_t = (1 - sigma) x0 + sigma noise, and the velocity to learn is dx/dsigma = noise - x0.
Source: flow matching (arXiv 2210.02747) and rectified flow (arXiv 2209.03003), as Wan2.1 is trained (arXiv 2503.20314).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Int

from fps_jax.models.dit import DiTOutput
from fps_train.config import Weighting

Velocity = Callable[[Float[Array, "B Z F H W"], Float[Array, "B"]], DiTOutput]  # (x_t, t in [0, 1000])


class Loss(NamedTuple):
    """loss: `[]` float32, the mean over samples. samples: `[B]`, unweighted. first_bad: as `DiTOutput.first_bad`."""

    loss: Array
    samples: Array
    first_bad: Array


def draw(
    seed: Int[Array, ""], samples: Int[Array, "B"], shape: tuple[int, ...]
) -> tuple[Float[Array, "B"], Float[Array, "B *shape"]]:
    """A uniform number in [0, 1) and standard normal noise for each sample, functions of (seed, sample number) alone.

    So they don't depend on how samples are put together into batches, or on how many hosts share them.
    """

    keys = jax.vmap(lambda sample: jax.random.fold_in(jax.random.key(seed), sample))(samples)
    # One normal number more than the noise takes: its quantile is the uniform one.
    normal = jax.vmap(lambda key: jax.random.normal(key, (1 + math.prod(shape),), jnp.float32))(keys)
    return ndtr(normal[:, 0]), normal[:, 1:].reshape(-1, *shape)


def flow_matching_loss(
    velocity: Velocity,
    latents: Float[Array, "B Z F H W"],
    noise: Float[Array, "B Z F H W"],
    sigma: Float[Array, "B"],
    *,
    weighting: Weighting = "none",
    teacher: Velocity | None = None,
    teacher_weight: float = 0.0,
) -> Loss:
    """Mean squared error of the velocity at noise levels sigma.

    Args:
      velocity: the model, given x_t and its timestep 1000 sigma (not truncated: samplers truncate theirs, by up to one).
      latents: x0, normalised.
      weighting: of samples by their sigma (`FlowOptions.weighting`).
      teacher: a velocity to be near to instead, in the share teacher_weight of the loss.
    """
    x0 = latents.astype(jnp.float32)
    at = sigma[:, None, None, None, None]
    x_t, t = (1 - at) * x0 + at * noise, 1000 * sigma

    def error(target):
        return jnp.square(out.velocity - target).mean((1, 2, 3, 4))

    out = velocity(x_t, t)
    samples = error(noise - x0)
    total = samples
    if teacher is not None:
        total = (1 - teacher_weight) * samples + teacher_weight * error(jax.lax.stop_gradient(teacher(x_t, t).velocity))
    return Loss((total * weight(sigma, weighting)).mean(), samples, out.first_bad)


def weight(sigma: Float[Array, "B"], weighting: Weighting) -> Float[Array, "B"]:
    """Weight of the loss at a noise level (arXiv 2403.03206 section 3.1 for cosmap)."""
    if weighting == "none":
        return jnp.ones_like(sigma)
    return 2 / (math.pi * (1 - 2 * sigma + 2 * jnp.square(sigma)))
