"""What devices hold, and what is put on them, counted while a block runs."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np


def shard_bytes(tree: Any) -> int:
    """Of arrays with shardings: the bytes of one device's shards."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


@dataclass
class Watch:
    """What a block did.

    Attributes:
      peak: bytes at worst of arrays that came while it ran, on the device that held most.
      put: bytes of each array of the host's that was put on a device.
    """

    before: list[Any]
    peak: int = 0
    put: list[int] = field(default_factory=list)

    def look(self) -> None:
        old = set(map(id, self.before))
        held: dict[Any, int] = {}
        for array in jax.live_arrays():
            if id(array) not in old:
                for device in array.sharding.device_set:
                    held[device] = held.get(device, 0) + shard_bytes(array)
        self.peak = max(self.peak, *held.values(), 0)


@contextlib.contextmanager
def watching(monkeypatch: Any) -> Iterator[Watch]:
    """Counts before and after every `jax.device_put` of the block, and at its end."""
    watch, real = Watch(jax.live_arrays()), jax.device_put

    def device_put(x, *args, **kwargs):
        watch.put += [a.nbytes for a in jax.tree.leaves(x) if isinstance(a, np.ndarray)]
        made = real(x, *args, **kwargs)
        watch.look()
        return made

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", device_put)
        yield watch
    watch.look()
