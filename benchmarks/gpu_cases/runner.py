"""Runs a case in a process of its own, ends it at its time, and keeps what it had said until then."""

import json
import math
import os
import pathlib
import sys
from dataclasses import dataclass, field
from typing import Any

from fps_jax import processes

ROOT = pathlib.Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One process.

    Attributes:
      name: of the case, 'speed fp8 0.20 14B'.
      stage: facts, correct, speed, peers or tune.
      function: 'module:function', called with `toy` and kwargs.
      kernels: what it launches, the one under test last. A hang is blamed on that, and no other case that launches it runs.
      seconds: its time; not to have ended by then is a hang.
      silence: the time between two of its results; for a case with many, whose hang is then seen early.
      baseline: measured again in every call that measures something beside it, since ratios are within one call.
      environment: more environment variables.
    """

    name: str
    stage: str
    function: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    seconds: float = 90
    silence: float = math.inf
    baseline: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def run(case: Case, *, toy: bool, seconds: float) -> dict[str, Any]:
    """The record of a case: what, config, parts (results), seconds, and `failed` and `hung` where it did.

    Args:
      seconds: what is left of the budget. A case that this cut short did not hang, and is `unfinished`.
    """
    limit = min(case.seconds, seconds)
    asked = json.dumps({"function": case.function, "toy": toy, "kwargs": case.kwargs})
    ended = processes.run(
        [sys.executable, "-m", "benchmarks.gpu_cases.child", asked],
        environment={
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **case.environment,
        },
        seconds=limit,
        silence=case.silence,
        folder=ROOT,
    )
    record: dict[str, Any] = {
        "case": case.name,
        "stage": case.stage,
        "kernels": list(case.kernels),
        "config": case.kwargs,
        "seconds_in_all": round(ended.seconds, 1),
        "parts": ended.said,
    }
    silent = ended.timed_out and ended.seconds < limit
    if ended.timed_out and limit < case.seconds and not silent:
        record |= {"failed": f"unfinished: the budget ended after {limit:.0f} s", "unfinished": True}
    elif ended.timed_out:
        what = f"no further case of {case.kernels[-1]}" if case.kernels else "of no kernel of ours"
        when = f"said nothing for {case.silence:.0f} s" if silent else f"timed out after {limit:.0f} s"
        record |= {"failed": f"{when} (a hang: {what})", "hung": True}
    elif ended.status:
        record |= {"failed": f"exit status {ended.status}"}
    if "failed" in record:
        record["error_tail"] = ended.complaint
    if not ended.gone:
        record["still_running"] = "its process did not end when killed"
    return record
