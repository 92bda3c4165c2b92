"""How arrays lie in the shared memory of a thread block."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for TMA copies and matrix instructions, in the widest swizzle that a row fills."""
    size = jnp.dtype(dtype).itemsize
    width = min(128, shape[-1] * size)
    tiling: Any = plgpu.TilingTransform  # Any: declared abstract, instantiated everywhere
    swizzle: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, width // size)), swizzle(width)))
