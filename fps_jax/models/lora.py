"""Low-rank adapters on the DiT's linear layers: y = x W + b + (alpha / rank) (x A) B, with W frozen.

Source: LoRA (arXiv 2106.09685); A's distribution is that of its code (microsoft/LoRA) and of peft, the paper's is normal.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fps_jax.config import DiTConfig
from fps_jax.models.dit import build_dit
from fps_jax.models.params import Params, abstract_params, flatten, matches, unflatten

DEFAULT_TARGETS = ("blocks/self_attn/[qkvo]", "blocks/cross_attn/[qkvo]", "blocks/mlp/*")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get an adapter, and of which size.

    Attributes:
      rank: r, columns of A and rows of B.
      alpha: the adapter's output is scaled by alpha / rank.
      targets: patterns (as of file names: * ? [abc]) over the paths of linear layers, such as 'blocks/self_attn/q' (of all layers)
        or 'head/proj'. A pattern is for a whole path or its end: 'q' is both attentions' q, 'cross_attn/?_img' what I2V adds.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} of a LoRA is not a whole number of at least 1; 16 to 128 are usual")
        if not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha!r} of a LoRA is not a positive number; the rank itself scales by 1")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(
                f"targets={self.targets!r} of a LoRA is not a list of patterns; the default is {DEFAULT_TARGETS}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def linear_layers(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Paths of the DiT's linear layers with the shapes of their kernels, `[in, out]`; blocks' `[L, in, out]`."""
    leaves = flatten(abstract_params(build_dit(config)))
    return {path.removesuffix("/kernel"): leaf.shape for path, leaf in leaves if path.endswith("/kernel")}


def target_layers(config: DiTConfig, lora: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Those of `linear_layers` that get an adapter. Raises ValueError for a pattern that matches none, and lists them."""
    layers = linear_layers(config)
    chosen: set[str] = set()
    for pattern in lora.targets:
        matched = {path for path in layers if matches(path, pattern)}
        if not matched:
            raise ValueError(f"LoRA target {pattern!r} matches no linear layer; there are {', '.join(sorted(layers))}")
        chosen |= matched
    return {path: shape for path, shape in layers.items() if path in chosen}


def init_lora(config: DiTConfig, lora: LoRAConfig, key: jax.Array) -> Params:
    """New adapters, float32: A uniform in +-1 / sqrt(in) (Kaiming, a = sqrt(5)), B zero, so that the model is still the base.

    Returns: `lora_a` `[L, in, r]` and `lora_b` `[L, r, out]` (without L outside the blocks) at each target's path, and nothing
      else. An adapter's numbers depend on the key and its own path alone.
    Raises: ValueError for a target that matches nothing, or a rank that no layer's matrix has.
    """
    leaves: dict[str, Any] = {}
    for path, (*stack, d_in, d_out) in target_layers(config, lora).items():
        if lora.rank > min(d_in, d_out):
            raise ValueError(f"rank={lora.rank} of a LoRA is above {path}'s own, {min(d_in, d_out)}; use a smaller one")
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound = d_in**-0.5
        a = jax.random.uniform(own, (*stack, d_in, lora.rank), jnp.float32, -bound, bound)
        leaves |= {f"{path}/lora_a": a, f"{path}/lora_b": jnp.zeros((*stack, lora.rank, d_out), jnp.float32)}
    return unflatten(leaves)


def with_lora(base: Params, adapters: Params, lora: LoRAConfig) -> Params:
    """Parameters that the DiT takes in place of `base`, adapters beside the kernels. Differentiable with respect to them.

    The scale alpha / rank goes into B, so that the model needs no word of it. Nothing of `base` is copied.
    Raises: ValueError where an adapter has no kernel in `base`, or doesn't fit it.
    """
    leaves = dict(flatten(base))
    for path, a, b in _pairs(base, adapters):
        leaves |= {f"{path}/lora_a": a, f"{path}/lora_b": b * lora.scale}
    return unflatten(leaves)


def merge_lora(base: Params, adapters: Params, lora: LoRAConfig, scale: float = 1.0) -> Params:
    """W + scale (alpha / rank) A B in place of each W that has an adapter, computed in float32, in W's own dtype.

    Leaves without adapter are `base`'s own, not copies. NumPy kernels give NumPy, jax arrays jax arrays on their device; a stacked
    kernel is merged layer by layer, so that no whole float32 copy of it is made.
    Raises: as `with_lora`.
    """
    leaves = dict(flatten(base))
    for path, a, b in _pairs(base, adapters):
        kernel = leaves[f"{path}/kernel"]
        merge = _merge_numpy if isinstance(kernel, np.ndarray) else _merge_jax
        leaves[f"{path}/kernel"] = merge(kernel, a, b, np.float32(scale * lora.scale))
    return unflatten(leaves)


def _merge_numpy(kernel: np.ndarray, a: Any, b: Any, scale: np.float32) -> np.ndarray:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if kernel.ndim == 2:
        return (kernel.astype(np.float32) + scale * (a @ b)).astype(kernel.dtype)
    merged = np.empty_like(kernel)
    for layer, parts in enumerate(zip(kernel, a, b, strict=True)):
        merged[layer] = _merge_numpy(*parts, scale)
    return merged


@jax.jit
def _merge_jax(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    def merge(layer):
        w, a, b = (value.astype(jnp.float32) for value in layer)
        return (w + scale * jnp.matmul(a, b, precision="highest")).astype(kernel.dtype)

    layers = (kernel, a, b)
    return merge(layers) if kernel.ndim == 2 else jax.lax.map(merge, layers)


def _pairs(base: Params, adapters: Params) -> Iterator[tuple[str, Any, Any]]:
    """`(path, A, B)` of each adapter, checked against the kernel that it is for."""
    kernels, leaves = dict(flatten(base)), dict(flatten(adapters))
    paths = sorted({path.rpartition("/")[0] for path in leaves})
    for path in paths:
        kernel = kernels.get(f"{path}/kernel")
        a, b = (leaves.pop(f"{path}/{name}", None) for name in ("lora_a", "lora_b"))
        if kernel is None or a is None or b is None:
            raise ValueError(f"adapter {path!r} needs lora_a, lora_b and a kernel of the model; make it with init_lora")
        *stack, d_in, d_out = kernel.shape
        if a.shape[-1] != b.shape[-2] or a.shape[:-1] != (*stack, d_in) or b.shape != (*stack, b.shape[-2], d_out):
            raise ValueError(
                f"adapter {path!r} has shapes {list(a.shape)} and {list(b.shape)}, its kernel {list(kernel.shape)}; "
                "it's of another model"
            )
        yield path, a, b
    if leaves:
        raise ValueError(f"{min(leaves)!r} is no part of an adapter; adapters hold lora_a and lora_b alone")
