"""`make mutants`: small faults planted one at a time, to see whether the tests of a file notice. Not in CI; it takes an hour.

    python -m tests.mutants --only fps_jax/sampling/flow.py --most 20

Each mutant (`tests/faults.py`) is planted in a copy of the tree, and the tests that mirror the file are run until one fails: those
that found an earlier mutant first, slow ones last. What they import from other packages takes longer than most of them, so it is
imported once, and each mutant has a process forked from there.

Those that survive are listed; whole runs go into benchmarks/results/mutants.json, where a person says of each survivor why.
"""

import argparse
import ast
import collections
import gc
import importlib
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from benchmarks import record
from tests.faults import Mutant, mutants

ROOT = pathlib.Path(__file__).parents[1]
# File -> the tests that mirror it.
TARGETS = {
    "convert/fps_convert/formats/pth.py": "tests/fps_convert/test_pth.py",
    "convert/fps_convert/formats/readers.py": "tests/fps_convert/test_readers.py tests/fps_convert/test_bad_input.py",
    "fps_jax/attention/windows.py": "tests/fps_jax/attention/test_windows.py tests/fps_jax/attention/test_cache.py "
    "tests/fps_jax/attention/test_block_causal.py",
    "fps_jax/attention/schedule.py": "tests/fps_jax/attention/test_schedule.py",
    "fps_jax/sampling/solvers.py": "tests/fps_jax/sampling/test_solvers.py tests/fps_jax/sampling/test_denoise.py",
    "fps_jax/sampling/flow.py": "tests/fps_jax/sampling/test_solvers.py tests/fps_jax/sampling/test_request.py "
    "tests/fps_jax/sampling/test_few_step.py tests/fps_jax/test_causal.py",
    "fps_jax/sampling/request.py": "tests/fps_jax/sampling/test_request.py tests/fps_jax/sampling/test_call.py "
    "tests/fps_jax/sampling/test_few_step.py",
    "fps_jax/sampling/request_fields.py": "tests/fps_jax/sampling/test_request.py",
    "fps_jax/config.py": "tests/fps_jax/test_config.py tests/fps_convert/test_mapping.py",
    "fps_jax/sizes.py": "tests/fps_jax/test_sizes.py tests/fps_jax/sampling/test_request.py",
}
# What the tests import that isn't the project's. None of it starts a thread or a jax backend, which a fork would break.
_FOREIGN = ("jax.experimental.pallas", "flax.nnx", "orbax.checkpoint", "scipy.stats", "hypothesis.strategies", "PIL.Image",
            "safetensors.numpy", "einops", "jaxtyping", "tyro")  # fmt: skip
_OWN = ("tests", "benchmarks", "fps_jax", "fps_convert", "fps_train", "pallas_kernels")
_LEAST = 30  # seconds that a mutant has, or ten times those of the unmutated file: one that never ends is noticed, too
_MOST_MEMORY = 8 << 30  # bytes: one that would take the machine's is noticed before it does


class Outcome(NamedTuple):
    """passed: all tests did. failed: the first that didn't, '' for none or where collection failed. seconds: by test."""

    passed: bool
    failed: str = ""
    seconds: dict[str, float] = {}  # noqa: RUF012


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
            self.pipe.send(Outcome(False, report.nodeid))
            sys.stdout.flush()
            os._exit(0)


def _forked(tree: pathlib.Path, tests: str, watch: _Watch, bytecode: bool) -> None:
    """Runs tests in a tree, in this process, and sends their `Outcome`."""
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
    watch.pipe.send(Outcome(code == 0, "", dict(watch.seconds)))
    os._exit(0)


class Runs:
    """Processes with tests, so many at once as there are trees, each in one of them."""

    def __init__(self, file: str, trees: list[pathlib.Path]):
        self.file, self.tests, self.free = file, TARGETS[file], list(trees)
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
                outcome = pipe.recv() if pipe in ready else Outcome(False)
            except EOFError:  # it crashed
                outcome = Outcome(False)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
            process.join()
            pipe.close()
            del self.running[pipe]
            self.free.append(tree)
            self.found[outcome.failed] += bool(outcome.failed)
            yield key, outcome

    def once(self, text: str) -> Outcome:
        self.start(text, None)
        return next(self.ended())[1]


def survivors(file: str, trees: list[pathlib.Path], most: int | None) -> tuple[int, list[Mutant]]:
    """How many mutants there are, and those that no test of the file found. Raises ValueError where tests fail without one."""
    source = (ROOT / file).read_text()
    runs, plain = Runs(file, trees), ast.unparse(ast.parse(source))
    for _ in range(2):  # in the order of the files, and in that of their durations
        outcome = runs.once(plain)
        if not outcome.passed:
            raise ValueError(
                f"{file}: its tests fail as it is, first {outcome.failed or 'at collection'}\n"
                + (trees[-1] / "output.txt").read_text()
            )
        runs.seconds = outcome.seconds
    runs.limit = max(_LEAST, 10 * sum(runs.seconds.values()))
    planted = list(mutants(source))
    if most is not None:
        planted = random.Random(0).sample(planted, min(most, len(planted)))
    waiting, left = list(reversed(planted)), []
    while waiting or runs.running:
        while waiting and runs.free:
            runs.start(waiting[-1].text, waiting.pop())
        for mutant, outcome in runs.ended():
            if outcome.passed:
                left.append(mutant)
                print(f"{file}  line {mutant.line}: {mutant.change}", flush=True)
    for tree in trees:
        (tree / file).write_text(source)
    return len(planted), sorted(left)


def written(rows: dict[str, tuple[int, list[Mutant]]]) -> None:
    """Whole runs of files into the results: others keep what they have, and a survivor that was there its reason."""
    path = record.RESULTS / "mutants.json"
    files = json.loads(path.read_text())["files"] if path.exists() else {}
    for file, (count, left) in rows.items():
        known = {(s["text"], s["change"]): s["why"] for s in files.get(file, {}).get("survivors", [])}
        faults = [{"line": mutant.line, "text": mutant.shown, "change": mutant.change} for mutant in left]
        files[file] = {
            "mutants": count,
            "found": count - len(left),
            "survivors": [{**fault, "why": known.get((fault["text"], fault["change"]), "")} for fault in faults],
        }
    environment = {**record.environment(), "command": "python -m tests.mutants"}
    record.write(
        "mutants", {"environment": environment, "files": {file: files[file] for file in TARGETS if file in files}}
    )


def main() -> None:
    """Prints a line a file and its survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TARGETS, help="one file")
    parser.add_argument("--most", type=int, help="mutants a file, drawn by a fixed seed; all if left out")
    parser.add_argument("--at-once", type=int, default=2, help="processes")
    options = parser.parse_args()
    importlib.import_module("tests.conftest")  # settings of jax that must be made before it is imported
    for name in _FOREIGN:
        importlib.import_module(name)
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        trees = [pathlib.Path(folder) / str(i) for i in range(options.at_once)]
        for tree in trees:
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "outputs", "*.egg-info", "results"))
        for file in [options.only] if options.only else TARGETS:
            count, left = survivors(file, trees, options.most)
            print(f"{file}: {count - len(left)} of {count} found", flush=True)
            if options.most is None:
                written({file: (count, left)})


if __name__ == "__main__":
    main()
