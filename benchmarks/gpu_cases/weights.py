"""Random weights on the device, for models whose speed is measured."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fps_jax.models.params import Params, unflatten


def random_params(shapes: dict[str, Any], dtype: Any = None) -> Params:
    """Kernels of deviation 1 / sqrt(fan in), scales 1, everything else .02, leaf by leaf: a slice's float32 draw is the most that
    is held beside them.

    shapes: by path, of a stacked layer or a convolution (the last axis is the output's). dtype: of all; None for each one's own.
    """
    leaves = {}
    for i, (path, like) in enumerate(shapes.items()):
        kind = jnp.dtype(like.dtype if dtype is None else dtype)
        if path.endswith("kernel"):
            stacked = path.startswith("blocks/")
            deviation = math.prod(like.shape[int(stacked) : -1]) ** -0.5
            leaves[path] = _draw(jax.random.key(i), like.shape, kind, deviation)
        else:
            leaves[path] = jnp.full(like.shape, 1.0 if path.endswith("scale") else 0.02, kind)
    return unflatten(leaves)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any, deviation: float) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        return (deviation * jax.random.normal(key, shape[1:])).astype(dtype)

    return jax.lax.map(one, jax.random.split(key, shape[0]))
