"""A DiT small enough that a program of it compiles in a second, with batches to train it on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fps_jax.config import DiTConfig
from fps_jax.models.dit import build_dit
from fps_jax.models.params import Params, init_params
from fps_train.batch import Batch

CONFIG = DiTConfig(
    task="t2v", dim=32, mlp_dim=48, num_heads=2, num_layers=2, text_dim=12, text_len=5, in_channels=4, out_channels=4, freq_dim=32
)  # fmt: skip
LATENTS = (4, 2, 8, 8)  # grid (2, 4, 4)


@functools.cache
def params() -> Params:
    return jax.jit(functools.partial(init_params, build_dit(CONFIG)))(jax.random.key(0))


def batch(first: int = 0, rows: int = 2) -> Batch:
    """Samples `first`, `first + 1`, ..., each a function of its number."""

    def normal(number, shape):
        return np.random.default_rng(number).normal(size=shape).astype(jnp.bfloat16)

    numbers = range(first, first + rows)
    return Batch(
        latents=np.stack([normal(n, LATENTS) for n in numbers]),
        text=np.stack([normal(n + 1000, (CONFIG.text_len, CONFIG.text_dim)) for n in numbers]),
        sample=np.array(numbers, np.uint32),
    )
