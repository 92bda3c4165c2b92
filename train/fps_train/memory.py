"""What a run keeps on each device, held against what a device has, before weights are read."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from fps_jax.sampling.room import memory_limit
from fps_train.setup import Setup, Start, abstract_start


def shard_bytes(tree: Any) -> int:
    """Of one device's shards of arrays, or of shapes with shardings."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def kept_bytes(begun: Start) -> int:
    """A device's part of state, gradient, frozen weights and teacher: there in every step, whatever else is."""
    return shard_bytes((begun.state, begun.state.params, begun.frozen, begun.teacher))


def device_bytes(mesh: Mesh) -> int | None:
    """What programs may take of one of this process's devices, the smallest. None where nothing tells."""
    here = mesh.local_devices
    return min((limit for device in here if (limit := memory_limit(device, len(here)))), default=None)


def check_memory(setup: Setup) -> None:
    """Raises ValueError where the mesh's devices can't even hold what stays on them, such as fewer ones than a run began on."""
    limit, kept = device_bytes(setup.mesh), kept_bytes(abstract_start(setup))
    if limit is not None and kept > limit:
        raise ValueError(
            f"mesh={setup.options.mesh!r}: weights, moments and gradient take {kept / 1e9:.1f} GB of each device, which has "
            f"{limit / 1e9:.1f} GB; use more devices along fsdp or context, or --preset lora"
        )
