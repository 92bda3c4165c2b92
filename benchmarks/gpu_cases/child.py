"""The process of a family: prepares all of its cases, waits for its turn, runs them, and says each part of their results."""

import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from fps_jax.processes import say

_TAIL = 1500  # characters of an error that are kept
_COMPILER = os.path.join("jax", "_src", "compiler.py")
_WORD = 2.0  # seconds between two words of a process that compiles


def _prepared(case: dict[str, Any], toy: bool) -> Iterator[dict[str, Any]]:
    """The case's generator, before its turn. An error in preparation is raised where the case would run."""
    module, name = case["function"].split(":")
    parts = getattr(importlib.import_module(module), name)(toy, **case["kwargs"])
    first = next(parts)
    assert first is None, f"{case['function']} said {first} before its turn"
    return parts


def _speak_while_compiling() -> None:
    """Starts a thread that says so, word after word, as long as XLA compiles for the cases: a minute and more for a whole model.

    A hang of the GPU is silence then, however large the model.
    """
    cases = threading.main_thread().ident

    def compiling() -> bool:
        frame = sys._current_frames().get(cases)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "backend_compile_and_load" and code.co_filename.endswith(_COMPILER):
                return True
            frame = frame.f_back
        return False

    def watch() -> None:
        while True:
            time.sleep(_WORD)
            if compiling():
                say({"compiling": True})

    threading.Thread(target=watch, daemon=True).start()


def _alive(toy: bool) -> bool:
    """Whether the GPU still answers this process: after an illegal address or a trap it never does again."""
    if toy:
        return True
    try:
        if "jax" in sys.modules:
            import jax.numpy as jnp

            (jnp.zeros(1) + 1).block_until_ready()
        if "torch" in sys.modules:
            import torch  # pyright: ignore[reportMissingImports]

            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _failure(error: Exception) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "error_tail": text[-_TAIL:]}


def main() -> None:
    asked = json.loads(sys.argv[1])
    toy = asked["toy"]
    if toy:
        os.environ.setdefault("NPROC", "12")  # interpret mode runs a warpgroup a thread of XLA's pool
    _speak_while_compiling()
    waiting: list[tuple[str, Iterator[dict[str, Any]] | Exception, float]] = []
    for case in asked["cases"]:
        start = time.monotonic()
        try:
            parts: Iterator[dict[str, Any]] | Exception = _prepared(case, toy)
        except Exception as error:
            parts = error
        waiting.append((case["name"], parts, time.monotonic() - start))
        say({"prepared": case["name"]})
    if not toy and "jax" in sys.modules and "torch" not in sys.modules:  # whose memory jax would take
        import jax

        if jax.default_backend() != "gpu":
            # CUDA's plugin failed, which jax warns of and goes on: a CPU must not be timed in the GPU's place.
            sys.exit(f"jax runs on {jax.default_backend()}, not on a GPU: its CUDA plugin is missing or broken")
    say({"ready": True})
    turn = sys.stdin.readline()
    if not turn:
        return  # the parent has gone
    names = json.loads(turn)  # without those that meanwhile must not run
    for name, parts, seconds in waiting:
        if name not in names:
            continue
        say({"starting": name})
        try:
            if isinstance(parts, Exception):
                raise parts
            for part in parts:
                say({"case": name, "result": part})
        except Exception as error:
            failure = {"case": name, **_failure(error)}
            if not _alive(toy):
                # The process is lost, and says so for the case; what is left of the family needs a new one.
                trapped = "trap" in failure["error_tail"].lower() or "LAUNCH" in failure["error_tail"]
                say({**failure, "trapped": trapped})
                os._exit(3)
            say(failure)
        say({"case": name, "result": {"part": "preparation", "took": round(seconds, 2)}})
        say({"finished": name})


if __name__ == "__main__":
    main()
