"""What all processes of a run have to agree on before its first step, and what one of them decides for all."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fps_jax.errors import one_line
from fps_train.config import TrainConfig

# Where things lie may be another path on each host; that they are the same is seen in their fingerprints.
_PATHS = {"model", "data", "output", "schedule", "init_from"}
_TELLS = (ValueError, NotImplementedError, OSError)
_PACKAGES = ("fps_jax", "fps_train", "fps_convert", "pallas_kernels")


class Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop, and saved itself first. signal: which signal asked."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by signal {number} after step {step}, which is saved; --resume goes on from there")
        self.signal = number


AGREED = (FloatingPointError, Stopped)  # what all processes raise at the same step, or none


def is_lead() -> bool:
    """Whether this process writes what a run has once: its config, its metrics, its videos, lines on a screen."""
    return jax.process_index() == 0


def lead_decides(decide: Callable[[], int]) -> int:
    """`decide()` of process 0, for all. What is seen of a shared folder may come later to one host than to another."""
    if jax.process_count() == 1:
        return decide()
    return int(multihost_utils.broadcast_one_to_all(np.int32(decide() if is_lead() else 0)))


def together[T](work: Callable[[], T], facts: Callable[[T], dict[str, Any]] = lambda _: {}) -> T:
    """`work()` of every process, once all have done theirs and the facts about their results are the same.

    facts: JSON, by names that a user knows.
    Raises: what `work` raised here; else ValueError, on all processes, that says what it raised on another one, or which of the
      facts differs, on which process, and how.
    """
    if jax.process_count() == 1:
        return work()
    done: Any = None
    failed: Exception | None = None
    try:
        done = work()
        said = {"facts": facts(done)}
    except _TELLS as error:
        failed, said = error, {"error": one_line(error)}
    everyone = _exchange(said)
    if failed is not None:
        raise failed
    check(everyone)
    return done


def check(everyone: Sequence[dict[str, Any]]) -> None:
    """What `together` raises of what each process said."""
    for number, said in enumerate(everyone):
        if "error" in said:
            raise ValueError(f"process {number} of {len(everyone)}: {said['error']}")
    first = everyone[0]["facts"]
    for number, said in enumerate(everyone):
        for name in [*first, *(name for name in said["facts"] if name not in first)]:
            mine, theirs = first.get(name), said["facts"].get(name)
            if mine != theirs:
                raise ValueError(
                    f"processes disagree on {name}: {mine!r} on process 0, {theirs!r} on process {number}; "
                    "start all of them with the same options, code and files"
                )


def option_facts(options: TrainConfig) -> dict[str, Any]:
    """Every option by its name, but for paths; and the code that reads them."""
    found: dict[str, Any] = {"the versions of code": _versions()}
    for name, value in dataclasses.asdict(options).items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": deeper for inner, deeper in value.items()}
        elif name not in _PATHS:
            found[name] = value
    return found


def _versions() -> str:
    """Of jax and jaxlib, and a hash of our own source."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in map(pathlib.Path, (spec.submodule_search_locations or ()) if spec else ()):
            for file in sorted(folder.rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}, ours {digest.hexdigest()[:12]}"


def _exchange(said: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process said, by their numbers."""
    mine = np.frombuffer(json.dumps(said).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(mine))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(mine)] = mine
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(text[:length])) for text, length in zip(texts, lengths, strict=True)]
