"""Where parameters lie on a mesh: one table from parameter paths to mesh axes, for training and sampling alike."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fps_jax.mesh import AXES
from fps_jax.models.params import Params, flatten, unflatten

# Devices along context hold the same weights as those along fsdp would, so they hold shards too.
_SHARDS = ("fsdp", "context")
# (pattern of a parameter's path, axes of its last dimensions). Leading dimensions that aren't named (layers) stay whole.
_RULES: tuple[tuple[re.Pattern[str], tuple[Any, ...]], ...] = tuple(
    (re.compile(pattern), axes)
    for pattern, axes in (
        (r"attn/(q|k|v|k_img|v_img)/kernel$|mlp/up/kernel$", (_SHARDS, "tensor")),
        (r"attn/o/kernel$|mlp/down/kernel$", ("tensor", _SHARDS)),
        (r"/lora_a$", (_SHARDS, None)),
        (r"/lora_b$", (None, _SHARDS)),
        (r"kernel$", (_SHARDS, None)),
    )
)
_BLOCK_MATRIX = re.compile(r"^blocks/.*/kernel$")


def make_mesh(sizes: dict[str, int] | None = None, devices: list[Any] | None = None) -> Mesh:
    """A mesh with all of `AXES`; those that `sizes` doesn't name have size 1. devices: as many as it takes of those that there are.

    Devices follow each other process by process, and neighbours along the last axes, `tensor` and `context`, are neighbours in that
    order: what is sent in every layer stays inside a node where the node has room for it.

    Raises: ValueError for more devices than there are, or for fewer where several processes share them: none may stay idle.
    """
    sizes = sizes or {}
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    there = sorted(jax.devices(), key=lambda d: (d.process_index, d.id)) if devices is None else devices
    processes = len({device.process_index for device in there}) if devices is None else 1
    if math.prod(shape) > len(there) or (processes > 1 and math.prod(shape) < len(there)):
        words = ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True) if size > 1)
        of = f" in {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"mesh={words!r} takes {math.prod(shape)} devices and there are {len(there)}{of}; "
            f"fsdp={len(there)} takes all of them"
        )
    # Not `jax.make_mesh`, which refuses GPUs of several nodes: each node is a slice of its own to it
    grid = np.array(there[: math.prod(shape)]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(path: str, ndim: int) -> PartitionSpec:
    """How the parameter at `path` ('blocks/self_attn/q/kernel') is cut; what no rule names is whole on every device."""
    for pattern, axes in _RULES:
        if pattern.search(path) and ndim >= len(axes):
            return PartitionSpec(*(None,) * (ndim - len(axes)), *axes)
    return PartitionSpec()


def undivided(params: Params, mesh: Mesh) -> tuple[tuple[str, ...], int] | None:
    """(axes, size): mesh axes that don't divide that dimension of one of the blocks' matrices; None where all are cut.

    Such a matrix would be whole along them, and the blocks' matrices are nearly all of the weights.
    """
    for path, leaf in flatten(params):
        if not _BLOCK_MATRIX.search(path):
            continue
        for axes, size in zip(partition_spec(path, len(leaf.shape)), leaf.shape, strict=True):
            names = (axes,) if isinstance(axes, str) else axes or ()
            if size % math.prod(mesh.shape[name] for name in names):
                return tuple(name for name in names if mesh.shape[name] > 1), size
    return None


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """The sharding of every leaf of a nested dict of arrays, or of what only has shapes.

    A dimension is cut along the first of its axes that divide it, one after the other; where none does it stays whole.
    """

    def cut(axes, size):
        taken: list[str] = []
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if size % math.prod(mesh.shape[name] for name in (*taken, axis)) == 0:
                taken.append(axis)
        return tuple(taken) or None

    def sharding(path, leaf):
        spec = partition_spec(path, len(leaf.shape))
        return NamedSharding(mesh, PartitionSpec(*map(cut, spec, leaf.shape)))

    return unflatten({path: sharding(path, leaf) for path, leaf in flatten(params)})
