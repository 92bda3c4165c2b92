"""A linear layer that may have a low-rank adapter beside it."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.platform import target_platform


class Linear(nnx.Linear):
    """x W + b and, where the parameters hold an adapter, + (x A) B; W itself is never changed, and needs no gradient.

    A module is built without adapter. `params.bind` puts one in where the parameters that it's given have `lora_a` `[in, r]` and
    `lora_b` `[r, out]` beside a kernel. Both are float32 masters, cast to the compute dtype here; the scale is in B already.
    """

    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, dot_general=_dot_general, **kwargs)

    def __call__(self, inputs: Float[Array, "... I"]) -> Float[Array, "... O"]:
        out = super().__call__(inputs)
        if self.lora_a is None or self.lora_b is None:
            return out
        x, a, b = (jnp.asarray(value).astype(self.dtype) for value in (inputs, self.lora_a[...], self.lora_b[...]))
        return out + _project(_project(x, a), b)


def _project(x: Array, w: Array) -> Array:
    return _dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _dot_general(x: Array, w: Array, dimensions: Any, precision: Any = None, **options: Any) -> Array:
    """`lax.dot_general`, but that in 16 bits the result is rounded to them after it: gradients are then products in float32.

    For CPUs, where XLA has a fast product in 16 bits for the forward, and a slow one, ten times as slow as float32's, for weights'
    gradients, which sum over the first dimension. The same bits forward.
    """
    if target_platform() == "cpu" and x.dtype.itemsize == 2 and x.dtype == w.dtype:
        return lax.dot_general(x, w, dimensions, precision, jnp.float32).astype(x.dtype)
    return lax.dot_general(x, w, dimensions, precision=precision, **options)
