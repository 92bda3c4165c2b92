"""Where parameters lie on a mesh: one table from parameter paths to mesh axes, for training and sampling alike."""

import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fps_jax.models.params import Params, flatten, unflatten

# data: samples. fsdp: samples, and shards of parameters. context: tokens of a sample. tensor: heads and MLP columns.
AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")

# (pattern of a parameter's path, axis names of its last dimensions). Leading dimensions that aren't named (layers) stay whole.
_RULES: tuple[tuple[re.Pattern[str], tuple[str | None, ...]], ...] = tuple(
    (re.compile(pattern), axes)
    for pattern, axes in (
        (r"attn/(q|k|v|k_img|v_img)/kernel$|mlp/up/kernel$", ("fsdp", "tensor")),
        (r"attn/o/kernel$|mlp/down/kernel$", ("tensor", "fsdp")),
        (r"/lora_a$", ("fsdp", None)),
        (r"/lora_b$", (None, "fsdp")),
        (r"kernel$", ("fsdp", None)),
    )
)


def make_mesh(sizes: dict[str, int] | None = None, devices: list[Any] | None = None) -> Mesh:
    """A mesh with all of `AXES`; those that `sizes` doesn't name have size 1. devices: this process's first one if left out."""
    sizes = sizes or {}
    devices = jax.local_devices()[:1] if devices is None else devices
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def partition_spec(path: str, ndim: int) -> PartitionSpec:
    """How the parameter at `path` ('blocks/self_attn/q/kernel') is cut; what no rule names is whole on every device."""
    for pattern, axes in _RULES:
        if pattern.search(path) and ndim >= len(axes):
            return PartitionSpec(*(None,) * (ndim - len(axes)), *axes)
    return PartitionSpec()


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """The sharding of every leaf of a nested dict of arrays, or of what only has shapes."""
    return unflatten(
        {path: NamedSharding(mesh, partition_spec(path, len(leaf.shape))) for path, leaf in flatten(params)}
    )
