"""What a run keeps on each device, before weights are read, and takes, before its first step, held against what a device has."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from fps_jax.mesh import BATCH
from fps_jax.sampling import room
from fps_jax.sampling.room import memory_limit
from fps_train.setup import Setup, Start, abstract_start


class ProgramBytes(NamedTuple):
    """Of one compiled program, on a device.

    arguments: all that it is given. beside: what of that isn't state or frozen weights: a batch, a gradient. results: what it makes
    that doesn't take an argument's place.
    """

    arguments: int
    beside: int
    temporaries: int
    results: int

    @property
    def more(self) -> int:
        """Than state and frozen weights, which stay there."""
        return self.beside + self.temporaries + self.results


def program_bytes(begun: Start, name: str, program: Any) -> ProgramBytes:
    """Sizes as XLA knows them. name, program: of `Programs.compiled`."""
    memory = program.memory_analysis()
    given = begun.state if name == "update" else (begun.state.params, begun.frozen, begun.teacher)
    return ProgramBytes(
        memory.argument_size_in_bytes,
        memory.argument_size_in_bytes - shard_bytes(given),
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )


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


def check_programs(setup: Setup, begun: Start, compiled: Mapping[str, Any]) -> None:
    """Raises ValueError where a program of a step has no room beside what stays on a device. compiled: `Programs.compiled`."""
    limit = device_bytes(setup.mesh)
    if limit is None:
        return
    stays = shard_bytes((begun.state, begun.frozen, begun.teacher))
    more, name = max((program_bytes(begun, name, program).more, name) for name, program in compiled.items())
    if stays + more > limit:
        raise ValueError(
            f"mesh={setup.options.mesh!r}: a step takes {(stays + more) / 1e9:.1f} GB of each device, which has "
            f"{limit / 1e9:.1f} GB: {stays / 1e9:.1f} GB of weights and moments, and {more / 1e9:.1f} GB of batch, gradient and "
            f"temporaries ({name}); {_less(setup)}"
        )


def enough_memory(setup: Setup) -> contextlib.AbstractContextManager[None]:
    """Raises MemoryError, in one line, where XLA finds no room for what is done in the block."""
    return room.enough_memory(f"mesh={setup.options.mesh!r}", lambda: device_bytes(setup.mesh), lambda: _less(setup))


def _less(setup: Setup) -> str:
    """What would take less of a device than this run does."""
    options = setup.options
    ways = ["more devices along fsdp or context"]
    if options.remat != "full":
        ways.append("--remat full")
    if options.batch_size > math.prod(options.mesh_sizes[axis] for axis in BATCH):
        ways.append("a smaller --batch-size")
    if setup.parts.lora is None:
        ways.append("--preset lora")
    return f"use {' or '.join(ways)}"
