"""What a run keeps on each device, held against what a device has, before weights are read."""

import math
import os
from typing import Any

import jax
from jax.sharding import Mesh

from fps_train.setup import Setup, Start, abstract_start


def shard_bytes(tree: Any) -> int:
    """Of one device's shards of arrays, or of shapes with shardings."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def kept_bytes(begun: Start) -> int:
    """A device's part of state, gradient, frozen weights and teacher: there in every step, whatever else is."""
    return shard_bytes((begun.state, begun.state.params, begun.frozen, begun.teacher))


def device_bytes(mesh: Mesh) -> int | None:
    """What programs may take of one of this process's devices, the smallest; of a share of the machine's memory where these are
    its CPU. None where nothing tells."""
    here = mesh.local_devices
    if here and here[0].platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        return None if pages is None else pages * os.sysconf("SC_PAGE_SIZE") // len(here)
    return min((limit for limit in map(_limit, here) if limit), default=None)


def _limit(device: Any) -> int | None:
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except RuntimeError:  # an allocator that keeps no count
        return None


def check_memory(setup: Setup) -> None:
    """Raises ValueError where the mesh's devices can't even hold what stays on them, such as fewer ones than a run began on."""
    limit, kept = device_bytes(setup.mesh), kept_bytes(abstract_start(setup))
    if limit is not None and kept > limit:
        raise ValueError(
            f"mesh={setup.options.mesh!r}: weights, moments and gradient take {kept / 1e9:.1f} GB of each device, which has "
            f"{limit / 1e9:.1f} GB; use more devices along fsdp or context, or --preset lora"
        )
