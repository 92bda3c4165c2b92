"""fps-train as a process of its own, which also says when it has joined the others, a hash of each state that it saves and
restores, and what it reads. `poison=N` beside its arguments puts a NaN into what it reads of microbatch N.
"""

import functools
import hashlib
import os
import sys

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from fps_train import hosts
from fps_train.batches import Batches
from fps_train.checkpoints import Checkpoints

JOINED = "joined the others\n"  # on stderr


def state_hash(state) -> str:
    """Of every bit of a state, wherever its shards lie."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        whole = np.asarray(leaf) if getattr(leaf, "is_fully_addressable", True) else process_allgather(leaf, tiled=True)
        digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()[:16]


def tell(monkeypatch_into, say) -> None:
    """Has `say("saved", "average" or "restored", step, hash)` and `say("read", microbatch, rows)` called.

    monkeypatch_into: as setattr.
    """
    save, restore, read = Checkpoints.save, Checkpoints.restore, Batches.at

    @functools.wraps(save)
    def told_save(self, state, notes, validation):
        say("saved", notes["step"], state_hash(state))
        say("average", notes["step"], state_hash(state.ema))
        save(self, state, notes, validation)

    @functools.wraps(restore)
    def told_restore(self, like, step):
        restored = restore(self, like, step)
        say("restored", step, state_hash(restored.state))
        return restored

    @functools.wraps(read)
    def told_read(self, i):
        batch = read(self, i)
        say("read", i, len(batch.sample))
        return batch

    monkeypatch_into(Batches, "at", told_read)
    monkeypatch_into(Checkpoints, "save", told_save)
    monkeypatch_into(Checkpoints, "restore", told_restore)


def poison(microbatch: int) -> None:
    read = Batches.at

    def poisoned(self, i):
        batch = read(self, i)
        if i == microbatch:
            batch.latents[0, 0, 0, 0, 0] = np.nan
        return batch

    Batches.at = poisoned


def tell_of_joining() -> None:
    """Past Python's own stream, where a word of the command would be seen as its first."""
    start = hosts.start

    def told(options):
        start(options)
        os.write(2, JOINED.encode())

    hosts.start = told


if __name__ == "__main__":
    from fps_train.commands.train import main

    tell_of_joining()
    tell(setattr, lambda *words: print(*words, flush=True))
    for word in [word for word in sys.argv if word.startswith("poison=")]:
        sys.argv.remove(word)
        poison(int(word.partition("=")[2]))
    main()
