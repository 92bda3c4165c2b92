"""Processes of a script on a clock of their own, in the place of real ones: a whole call of the benchmark in a second."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_cases.results import Results
from benchmarks.gpu_cases.runner import Case, Family, Runner
from fps_jax.processes import Ended

PREPARE = 25.0  # seconds that a family takes before it is ready, where the script says nothing else


@dataclass(frozen=True, kw_only=True)
class Script:
    """What happens: 'hang', 'die' or 'trap' in a case's turn, 'die early' or 'never ready' while it is prepared; else seconds."""

    outcomes: Mapping[str, str] = field(default_factory=dict)
    seconds: Callable[[Case], float] = lambda case: 1.5
    prepare: float = PREPARE


@dataclass
class Turn:
    family: Family
    begin: float
    end: float | None = None


@dataclass
class Stage:
    """The clock, and all that happened."""

    script: Script
    now: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    started: list["Actor"] = field(default_factory=list)
    preparing: int = 0  # most at a time

    def launch(self, family: Family, toy: bool) -> "Actor":
        actor = Actor(self, family)
        self.started.append(actor)
        self.preparing = max(self.preparing, sum(a.alive and a.turn is None for a in self.started))
        return actor

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Actor:
    """A process that says the lines of its script when their time has come."""

    def __init__(self, stage: Stage, family: Family):
        self.stage, self.family = stage, family
        self.lines: list[tuple[float, dict[str, Any]]] = []
        self.heard, self.status, self.dies = 0, 0, float("inf")
        self.turn: Turn | None = None
        self.alive, self.ready = True, float("inf")
        time, outcomes = stage.now, stage.script.outcomes
        for case in family.cases:
            time += stage.script.prepare / len(family.cases)
            early = outcomes.get(case.name)
            if early == "die early":
                self.dies, self.status = time, 1
                return
            if early == "never ready":
                return
            self.lines.append((time, {"prepared": case.name}))
        self.ready = time
        self.lines.append((time, {"ready": True}))

    def tell(self, line: str) -> None:
        stage, names = self.stage, json.loads(line)
        assert stage.now >= self.ready, "it got a turn before it was ready"
        assert not [t for t in stage.turns if t.end is None], "two have the GPU"
        self.turn = Turn(
            dataclasses.replace(self.family, cases=tuple(c for c in self.family.cases if c.name in names)), stage.now
        )
        stage.turns.append(self.turn)
        time = stage.now
        for case in self.turn.family.cases:
            self.lines.append((time, {"starting": case.name}))
            self.lines.append((time, {"case": case.name, "result": {"part": "first", "ok": True}}))
            outcome = stage.script.outcomes.get(case.name)
            if outcome == "hang":
                return
            time += stage.script.seconds(case)
            if outcome in ("die", "trap"):
                if outcome == "trap":
                    self.lines.append((time, {"case": case.name, "failed": "LAUNCH_FAILED", "trapped": True}))
                self.dies, self.status = time, 3
                return
            self.lines.append((time, {"case": case.name, "result": {"part": "kernel", "ok": True}}))
            self.lines.append((time, {"finished": case.name}))
        self.dies = time

    def hear(self) -> list[dict[str, Any]]:
        said = [line for time, line in self.lines[self.heard :] if time <= self.stage.now]
        self.heard += len(said)
        return said

    def wait(self, seconds: float) -> bool:
        return self.stage.now >= self.dies

    def end(self, *, timed_out: bool = False) -> Ended:
        assert self.alive, "ended twice"
        self.alive = False
        if self.turn is not None:
            self.turn.end = self.stage.now
        status = self.status if self.wait(0) else -9
        return Ended(said=[], status=status, timed_out=timed_out, seconds=0.0, complaint="", gone=True)


class Unwritten(Results):
    """Results that stay in memory."""

    def save(self) -> None:
        pass


def rehearse(families: Sequence[Family], script: Script, results: Results, *, budget: float, ahead: int) -> Stage:
    """A call of the benchmark by a script. Asserts that no two have the GPU at a time, and that every process was ended."""
    stage = Stage(script)
    runner = Runner(
        results, "now", toy=False, budget=budget, ahead=ahead,
        launch=stage.launch, clock=lambda: stage.now, sleep=stage.sleep,
    )  # fmt: skip
    runner.run(families)
    assert not [a.family.name for a in stage.started if a.alive]
    return stage
