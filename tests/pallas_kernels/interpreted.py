"""Interpret mode in a process with a deadline: a deadlock in a kernel is a hang there, and must become a test that fails."""

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

# Importing jax and the first trace take some 5 s, a case 1 to 5 s; ten times that on a busy machine.
CASE_SECONDS = 100

_ENVIRONMENT = {
    # Six warpgroups of a cluster wait for each other in XLA's thread pool, which has as many threads as the machine cores.
    "NPROC": "12",
    # A case compiles longer than it runs.
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip(),
}


class _Process:
    """A process that runs functions one after the other. Started once, since importing jax takes longer than most cases."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        with mock.patch.dict(os.environ, _ENVIRONMENT):
            self.process = context.Process(target=_serve, args=(other,), daemon=True)
            self.process.start()
        other.close()

    def end(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()


_started: list[_Process] = []


def run(fn: Callable[..., Any], *args: Any, seconds: float = CASE_SECONDS) -> Any:
    """fn(*args) in the other process. Raises AssertionError with its traceback, or TimeoutError after `seconds`."""
    if not _started:
        _started.append(_Process())
    worker = _started[0]
    worker.pipe.send((fn, args))
    try:
        if not worker.pipe.poll(seconds):
            raise TimeoutError(f"{fn.__name__}{args} gave no answer in {seconds} s: a deadlock in the kernel?")
        ok, result = worker.pipe.recv()
    except (TimeoutError, EOFError):
        _started.clear()
        worker.end()
        raise
    if not ok:
        _started.clear()  # an exception inside a kernel leaves threads of the interpreter behind
        worker.end()
        raise AssertionError(result)
    return result


def _serve(pipe: Any) -> None:
    import jax

    gc.set_threshold(10_000)  # as in tests/conftest.py
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
