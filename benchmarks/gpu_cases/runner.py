"""Runs families of cases, each in a process of its own, so that the GPU measures all the time.

A family imports, lowers and compiles without the GPU's attention, several of them at once; then it waits for its turn. Turns are
given one at a time, to the first family in the order of the plan that is ready. A process that falls silent has hung: it is ended,
the case that it had started is blamed, and the family starts again with what is left of it. So it is with one that dies, also while
it prepares, and with one that is not ready in time.
"""

import bisect
import dataclasses
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.gpu_cases.results import Results
from fps_jax.processes import Ended, Running

ROOT = pathlib.Path(__file__).parents[2]
_CACHE = "JAX_COMPILATION_CACHE_DIR"
REFERENCES = "FPS_BENCHMARK_REFERENCES"  # names the folder where `references` leaves what it computes
SILENCE = 25.0  # seconds without a word that are a hang, where a case claims no more
_LOOK = 0.1  # seconds between two looks
_HOPELESS = 3  # hangs in a row


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that is checked or timed.

    Attributes:
      name: of the case, 'fp8x1 0.20 14B'.
      function: 'module:function', a generator called with `toy` and kwargs. What it does before its first yield, of None, is
        done before the family's turn: nothing that keeps the GPU busy. Each dict that it yields is a part of the result.
      kernels: what it launches, the one under test last. A hang is blamed on that, and no other case that launches it runs.
      expected: of the ratio to the fastest 16-bit dense attention, for the table.
      silence: seconds without a word that are a hang: more than its longest part takes.
    """

    name: str
    function: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    expected: str = ""
    silence: float = SILENCE


@dataclass(frozen=True, kw_only=True)
class Family:
    """Cases that share a process, what it compiled and its arrays.

    Attributes:
      stage: facts, correct, speed, peers or whole.
      seconds: for its turn; what is not done by then is left out, and is no hang.
      baseline: its cases run in every call that measures something, since ratios are within one call.
      environment: more environment variables.
    """

    name: str
    stage: str
    cases: tuple[Case, ...]
    seconds: float = 60
    baseline: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class Process(Protocol):
    """What is needed of `fps_jax.processes.Running`."""

    def hear(self) -> list[dict[str, Any]]: ...
    def tell(self, line: str) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def end(self, *, timed_out: bool = False) -> Ended: ...


Launch = Callable[[Family, bool], Process]


def python_path() -> str:
    """Where the packages are, installed or not."""
    own = [str(folder) for folder in (ROOT, ROOT / "convert", ROOT / "train")]
    return os.pathsep.join(filter(None, [*own, os.environ.get("PYTHONPATH")]))


def cache() -> str:
    """Where compiled programs stay: for a family that starts again, a later call, and, where it is named, another machine."""
    return os.environ.get(_CACHE) or os.path.join(tempfile.gettempdir(), "fps_benchmarks_xla")


def launch(family: Family, toy: bool) -> Process:
    """The process of a family (`benchmarks.gpu_cases.child`)."""
    asked = {"toy": toy, "cases": [{"name": c.name, "function": c.function, "kwargs": c.kwargs} for c in family.cases]}
    return Running(
        [sys.executable, "-m", "benchmarks.gpu_cases.child", json.dumps(asked)],
        environment={
            "PYTHONPATH": python_path(),
            "PYTHONUNBUFFERED": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            # A plugin that is broken must not have a CPU timed in the GPU's place. Host callbacks need the CPU as well.
            "JAX_PLATFORMS": "cpu" if toy else "cuda,cpu",
            **({} if toy else {_CACHE: cache(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}),
            # On a CPU XLA's flags are those of whoever asked.
            **{k: v for k, v in family.environment.items() if not (toy and k == "XLA_FLAGS")},
        },
        folder=ROOT,
        listens=True,
    )


@dataclass
class _Started:
    """A family under way. `order`: its place in the plan."""

    order: int
    family: Family
    process: Process
    since: float
    ready: bool = False
    prepared: set[str] = field(default_factory=set)


class Runner:
    """One call of the benchmark.

    Args:
      ahead: families that prepare at a time, beside the one that has the GPU.
      clock, sleep: of `time`; a rehearsal passes its own.
    """

    def __init__(
        self,
        results: Results,
        call: str,
        *,
        toy: bool,
        budget: float,
        ahead: int = 1,
        prepare_seconds: float = 240,
        launch: Launch = launch,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.results, self.call, self.toy = results, call, toy
        self.end = clock() + budget
        self.ahead, self.prepare_seconds = ahead, prepare_seconds
        self._launch, self._clock, self._sleep = launch, clock, sleep
        self._begin = clock()
        self._hangs = 0

    def run(self, families: Sequence[Family]) -> None:
        """All of them, until the budget is over or nothing more is to be expected of the GPU."""
        waiting, started = list(enumerate(families)), []
        try:
            while (waiting or started) and self._left() > 0 and self._hangs < _HOPELESS:
                while waiting and len(started) <= self.ahead:
                    order, family = waiting.pop(0)
                    family = self._without_hung(family)
                    if family.cases:
                        one = _Started(order, family, self._launch(family, self.toy), self._clock())
                        bisect.insort(started, one, key=lambda s: s.order)
                for one in started:
                    rest = self._look_after(one)
                    if rest is not None:
                        started.remove(one)
                        # First, and in its old place: it came before what waits.
                        waiting[:0] = [(one.order, rest)] if rest.cases else []
                        break
                else:
                    self._sleep(_LOOK)
        finally:
            for one in started:
                one.process.end(timed_out=True)
        why = f"{_HOPELESS} hangs in a row: the GPU itself may" if self._hangs >= _HOPELESS else "the budget is spent"
        for family in [*(s.family for s in started), *(family for _, family in waiting)]:
            self._leave(family, f"not run: {why}; call again to continue")

    def _left(self) -> float:
        return self.end - self._clock()

    def _look_after(self, one: _Started) -> Family | None:
        """Gives the family the GPU, if it is ready. Returns what has to start again, where it came to an end; None before."""
        process, cases = one.process, one.family.cases
        ended = process.wait(0)
        for said in process.hear():
            one.ready = one.ready or "ready" in said
            if "prepared" in said:
                one.prepared.add(said["prepared"])
        if one.ready:
            return self._turn(one.family, process)
        if not ended and self._clock() - one.since <= self.prepare_seconds:
            return None
        done = process.end(timed_out=not ended)
        what = f"exit status {done.status}" if ended else f"not ready after {self.prepare_seconds:.0f} s"
        guilty = next((case for case in cases if case.name not in one.prepared), cases[-1])
        self._record(one.family, guilty, [], failed=f"in preparation: {what}", error_tail=done.complaint)
        return dataclasses.replace(one.family, cases=tuple(c for c in cases if c is not guilty))

    def _turn(self, family: Family, process: Process) -> Family:
        """Gives a family the GPU. Returns what is left of it, where it has to start again."""
        family = self._without_hung(family)  # since it was started another may have hung
        begin = heard = case_begin = self._clock()
        limit = min(begin + family.seconds, self.end)
        names = {c.name: c for c in family.cases}
        parts: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        failed: dict[str, dict[str, Any]] = {}
        finished: set[str] = set()
        current: Case | None = None
        process.tell(json.dumps(list(names)))
        ended = timed_out = silent = False
        patience = SILENCE

        def listen() -> None:
            nonlocal heard, current, case_begin
            for said in process.hear():
                heard = self._clock()
                if "starting" in said:
                    current, case_begin = names[said["starting"]], heard
                elif "result" in said:
                    parts[said["case"]].append(said["result"])
                elif "failed" in said:
                    failed[said["case"]] = {k: v for k, v in said.items() if k != "case"}
                elif "finished" in said:
                    name = said["finished"]
                    finished.add(name)
                    self._record(family, names[name], parts[name], heard - case_begin, **failed.get(name, {}))
                    self._hangs = 0
                    current = None

        while not ended and not timed_out:
            ended = process.wait(0)
            listen()
            if ended:
                break
            now = self._clock()
            patience = current.silence if current else SILENCE
            silent = now > heard + patience
            timed_out = silent or now > limit
            if not timed_out:
                self._sleep(_LOOK)
        done = process.end(timed_out=timed_out)
        listen()
        left = tuple(c for c in family.cases if c.name not in finished)
        rest = dataclasses.replace(family, cases=left)
        if timed_out and not silent:
            why = "the budget is spent" if limit == self.end else f"its family's {family.seconds:.0f} s were over"
            self._leave(rest, f"unfinished: {why}; call again to continue", parts)
        elif left:  # it hung, or died
            guilty = current or left[0]
            self._hangs += silent
            why = f"hung: said nothing for {patience:.0f} s" if silent else f"exit status {done.status}"
            failure = failed.get(guilty.name, {})
            more = {"hung": True} if silent or failure.get("trapped") else {}
            self._record(
                family, guilty, parts[guilty.name], self._clock() - case_begin,
                **{"failed": why, "error_tail": done.complaint} | failure | more,
            )  # fmt: skip
            return dataclasses.replace(family, cases=tuple(c for c in left if c is not guilty))
        return dataclasses.replace(family, cases=())

    def _without_hung(self, family: Family) -> Family:
        """Without the cases of kernels that hung, which are recorded as such."""
        hung = self.results.hung()
        kept = []
        for case in family.cases:
            banned = [kernel for kernel in case.kernels if hung.get(kernel, case.name) != case.name]
            if banned:
                alone = dataclasses.replace(family, cases=(case,))
                self._leave(alone, f"not run: {banned[0]} hung in '{hung[banned[0]]}'")
            else:
                kept.append(case)
        return dataclasses.replace(family, cases=tuple(kept))

    def _leave(self, family: Family, why: str, parts: Mapping[str, list[dict[str, Any]]] | None = None) -> None:
        for case in family.cases:
            self._record(family, case, (parts or {}).get(case.name, []), failed=why, unfinished=True)

    def _record(
        self, family: Family, case: Case, parts: list[dict[str, Any]], seconds: float = math.nan, **more: Any
    ) -> None:
        record = {
            "case": case.name, "family": family.name, "stage": family.stage, "kernels": list(case.kernels),
            "config": case.kwargs, "expected": case.expected, "parts": parts, "call": self.call, **more,
        }  # fmt: skip
        if not math.isnan(seconds):
            record["seconds_in_all"] = round(seconds, 2)
        self.results.add(record)
        wrong = [str(p.get("part")) for p in parts if p.get("ok") is False]
        outcome = more.get("failed") or (f"WRONG: {', '.join(wrong)}" if wrong else f"{len(parts)} results")
        took = f"{seconds:5.1f} s" if not math.isnan(seconds) else "       "
        print(f"{self._clock() - self._begin:5.0f} s  {case.name:40} {took}  {outcome}", flush=True)
