"""A linear layer that may have a low-rank adapter beside it."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Linear):
    """x W + b and, where the parameters hold an adapter, + (x A) B; W itself is never changed, and needs no gradient.

    A module is built without adapter. `params.bind` puts one in where the parameters that it's given have `lora_a` `[in, r]` and
    `lora_b` `[r, out]` beside a kernel. Both are float32 masters, cast to the compute dtype here; the scale is in B already.
    """

    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None

    def __call__(self, inputs: Float[Array, "... I"]) -> Float[Array, "... O"]:
        out = super().__call__(inputs)
        if self.lora_a is None or self.lora_b is None:
            return out
        x, a, b = (jnp.asarray(value).astype(self.dtype) for value in (inputs, self.lora_a[...], self.lora_b[...]))
        return out + jnp.matmul(jnp.matmul(x, a), b)
