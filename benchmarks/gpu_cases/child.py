"""The process of one case: calls its function and prints each part of the result as a line of JSON."""

import importlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from fps_jax.processes import say

_STANDINS = pathlib.Path(__file__).parents[1] / "standins"


def use_standins() -> None:
    """Makes a bare machine do: stand-in modules for what isn't installed and only annotates types."""
    if importlib.util.find_spec("jaxtyping") is None:
        sys.path.append(str(_STANDINS))


def _parts(function: str, toy: bool, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(toy, **kwargs)
    if isinstance(result, dict):
        yield result
    else:
        yield from result


def main() -> None:
    asked = json.loads(sys.argv[1])
    use_standins()
    if asked["toy"]:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("NPROC", "12")  # interpret mode runs a warpgroup a thread of XLA's pool
    for part in _parts(asked["function"], asked["toy"], asked["kwargs"]):
        say(part)


if __name__ == "__main__":
    main()
