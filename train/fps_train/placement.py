"""Where a run's arrays come to lie on its mesh. Where that spans processes, each gives its own shards alone."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fps_jax.mesh import BATCH


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Of arrays whose first dimension is so many samples: shared out where the devices along `BATCH` divide them, else whole."""
    shared = rows % math.prod(mesh.shape[axis] for axis in BATCH) == 0
    return NamedSharding(mesh, PartitionSpec(BATCH if shared else None))


def process_rows(mesh: Mesh, rows: int) -> range:
    """Those of so many samples that this process's devices need. Processes along `context` or `tensor` need the same ones."""
    places = batch_sharding(mesh, rows).addressable_devices_indices_map((rows,)).values()
    needed = [place[0].indices(rows)[:2] for place in places if place is not None]
    return range(min(first for first, _ in needed), max(end for _, end in needed))


def put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put`. Of what every process holds whole, each gives its own shards alone where a mesh spans processes."""

    def place(leaf, sharding):
        if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def put_rows(tree: Any, mesh: Mesh, rows: int) -> Any:
    """Arrays of this process's `process_rows` of so many samples, as arrays of all of them on the mesh."""
    sharding, mine = batch_sharding(mesh, rows), process_rows(mesh, rows)

    def place(leaf):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)

        def part(index):
            first, end, _ = index[0].indices(rows)
            return leaf[first - mine.start : end - mine.start]

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(place, tree)
