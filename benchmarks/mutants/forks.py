"""Tests in processes forked from one that has imported what isn't the project's, which takes longer than most of them."""

import collections
import gc
import importlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# What the tests import that isn't the project's. None of it starts a thread or a jax backend, which a fork would break.
_FOREIGN = ("jax.experimental.pallas", "flax.nnx", "orbax.checkpoint", "scipy.stats", "hypothesis.strategies", "PIL.Image",
            "safetensors.numpy", "einops", "jaxtyping", "tyro")  # fmt: skip
_OWN = ("tests", "benchmarks", "fps_jax", "fps_convert", "fps_train", "pallas_kernels")
_LEAST = (
    30  # seconds that a mutant has, or ten times what the unmutated file takes: one that never ends is noticed, too
)
_MOST_MEMORY = 8 << 30  # bytes: one that would take the machine's is noticed before it does


class Outcome(NamedTuple):
    """passed: all tests did. failed: the first that didn't, '' where none was named. seconds: by test, where all passed."""

    passed: bool
    failed: str = ""
    seconds: dict[str, float] | None = None


class _Watch:
    """A plugin of pytest: in which order tests are run, and what became of them."""

    def __init__(self, found: dict[str, int], seconds: dict[str, float], pipe: Any):
        self.found, self.before, self.pipe = found, seconds, pipe
        self.seconds = collections.defaultdict(float)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = collections.defaultdict(float)
        for name, seconds in self.before.items():
            files[name.split("::")[0]] += seconds

        def place(item: pytest.Item) -> tuple:
            file = item.nodeid.split("::")[0]  # file by file, the fixtures of each made once
            return -self.found.get(item.nodeid, 0), files[file], file, self.before.get(item.nodeid, 0)

        items.sort(key=place)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            print(report.longreprtext)
            self.pipe.send((False, report.nodeid))
            sys.stdout.flush()
            os._exit(0)


def _forked(tree: pathlib.Path, tests: str, watch: _Watch, bytecode: bool) -> None:
    """Runs tests in a tree, in this process, and sends the fields of an `Outcome`."""
    os.setsid()  # with all that it starts it can be ended
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, _MOST_MEMORY))
    with open(tree / "output.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    ours = {str(ROOT / room) for room in ("", "convert", "train")} | {""}
    sys.path[:] = [path for path in sys.path if path not in ours]
    os.environ["PYTHONPATH"] = os.pathsep.join(str(tree / room) for room in ("", "convert", "train"))
    sys.dont_write_bytecode = not bytecode
    os.environ["PYTHONDONTWRITEBYTECODE"] = "" if bytecode else "1"
    for name in [name for name in sys.modules if name.partition(".")[0] in _OWN]:
        del sys.modules[name]
    already = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"  # plugins among what was imported
    code = pytest.main(["-qx", "-pno:cacheprovider", "-pno:xdist", "-W", already, *tests.split()], plugins=[watch])
    watch.pipe.send((code == 0, "", dict(watch.seconds)))
    os._exit(0)


def import_what_is_foreign() -> None:
    """Once, before `Runs`."""
    importlib.import_module("tests.conftest")  # settings of jax that must be made before it is imported
    for name in _FOREIGN:
        importlib.import_module(name)
    gc.freeze()


def _end(process: Any) -> None:
    """A process that ran tests, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or not begun
        process.kill()
    process.join()


class Runs:
    """Processes with the tests of a file that is changed, so many at once as there are copies of the tree."""

    def __init__(self, file: str, tests: str, trees: list[pathlib.Path]):
        self.file, self.tests, self.free = file, tests, list(trees)
        self.found: collections.Counter[str] = collections.Counter()
        self.seconds: dict[str, float] = {}
        self.limit = 900.0
        self.running: dict[Any, tuple[Any, pathlib.Path, float, Any]] = {}

    def start(self, text: str, key: Any) -> None:
        """Plants a file's text in a free tree and runs its tests there."""
        tree = self.free.pop(0)
        (tree / self.file).write_text(text)
        # Python would take it for that of a file of this second and size.
        pathlib.Path(importlib.util.cache_from_source(str(tree / self.file))).unlink(missing_ok=True)
        mine, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=_forked, args=(tree, self.tests, _Watch(self.found, self.seconds, theirs), key is None)
        )
        process.start()
        theirs.close()
        self.running[mine] = process, tree, time.monotonic() + self.limit, key

    def ended(self) -> Iterator[tuple[Any, Outcome]]:
        """(key, outcome) of those that ended since; waits for one."""
        first = min(deadline for _, _, deadline, _ in self.running.values())
        ready = multiprocessing.connection.wait(list(self.running), max(0.0, first - time.monotonic()))
        for pipe, (process, tree, deadline, key) in list(self.running.items()):
            if pipe not in ready and time.monotonic() < deadline:
                continue
            try:
                outcome = Outcome(*pipe.recv()) if pipe in ready else Outcome(False)
            except EOFError:  # it crashed
                outcome = Outcome(False)
            _end(process)
            pipe.close()
            del self.running[pipe]
            self.free.append(tree)
            self.found[outcome.failed] += bool(outcome.failed)
            yield key, outcome

    def once(self, text: str) -> Outcome:
        """The outcome of one."""
        self.start(text, None)
        return next(self.ended())[1]

    def stop(self) -> None:
        """Ends those that still run."""
        for process, *_ in self.running.values():
            _end(process)
