"""The noise of block diffusion: a function of seed, latent frame and step alone."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def block_noise(seed: int, start: int, steps: int, shape: tuple[int, ...]) -> Float[Array, "n+1 1 16 m H W"]:
    """What a block starts from, and what is added after each of its steps; after the last, zeros.

    A function of seed, latent frame and step alone: whatever the block's size, and wherever a session was taken up again.

    Args:
      start: latent frame, counted from the beginning of the stream.
      shape: of the block's latents, `(1, 16, m, H/8, W/8)`.
    """
    with jax.threefry_partitionable(True):
        return _block_noise(jax.random.key(seed, impl="threefry2x32"), jnp.int32(start), steps, shape)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _block_noise(key, start, steps, shape):
    def draw(step, frame):
        own = jax.random.fold_in(jax.random.fold_in(key, start + frame), step)
        return jax.random.normal(own, (shape[1], *shape[3:]), jnp.float32)

    frames = jnp.arange(shape[2], dtype=jnp.int32)
    drawn = jax.vmap(lambda step: jax.vmap(lambda frame: draw(step, frame), out_axes=1)(frames))(
        jnp.arange(steps, dtype=jnp.int32)
    )
    return jnp.concatenate([drawn, jnp.zeros_like(drawn[:1])])[:, None]
