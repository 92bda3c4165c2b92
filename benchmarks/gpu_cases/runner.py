"""Runs a case in a process of its own, ends it at its time, and keeps what it had said until then."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_cases.child import MARK

ROOT = pathlib.Path(__file__).parents[2]
_TAIL = 1500  # characters of an error that are kept


@dataclass(frozen=True, kw_only=True)
class Case:
    """One process.

    Attributes:
      name: of the case, 'speed fp8 0.20 14B'.
      stage: facts, correct, speed, peers or tune.
      function: 'module:function', called with `toy` and kwargs.
      kernels: what it launches, the one under test last. A hang is blamed on that, and no other case that launches it runs.
      seconds: its time; not to have ended by then is a hang.
      baseline: measured again in every call that measures something beside it, since ratios are within one call.
      environment: more environment variables.
    """

    name: str
    stage: str
    function: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    seconds: float = 90
    baseline: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def run(case: Case, *, toy: bool, seconds: float) -> dict[str, Any]:
    """The record of a case: what, config, parts (results), seconds, and `failed` and `hung` where it did.

    Args:
      seconds: what is left of the budget. A case that this cut short did not hang, and is `unfinished`.
    """
    limit = min(case.seconds, seconds)
    asked = json.dumps({"function": case.function, "toy": toy, "kwargs": case.kwargs})
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **case.environment,
    }
    start = time.monotonic()
    # To files: what a process that hangs had written is there, and no pipe to a grandchild keeps us waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = [sys.executable, "-m", "benchmarks.gpu_cases.child", asked]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)
        timed_out = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            ended = _end(process)
        said, complaint = (_text(file) for file in (out, err))
    record: dict[str, Any] = {
        "case": case.name,
        "stage": case.stage,
        "kernels": list(case.kernels),
        "config": case.kwargs,
        "seconds_in_all": round(time.monotonic() - start, 1),
        "parts": [json.loads(line[len(MARK) :]) for line in said.splitlines() if line.startswith(MARK)],
    }
    if timed_out and limit < case.seconds:
        record |= {"failed": f"unfinished: the budget ended after {limit:.0f} s", "unfinished": True}
    elif timed_out:
        what = f"no further case of {case.kernels[-1]}" if case.kernels else "of no kernel of ours"
        record |= {"failed": f"timed out after {limit:.0f} s (a hang: {what})", "hung": True}
    elif process.returncode:
        record |= {"failed": f"exit status {process.returncode}"}
    if "failed" in record:
        record["error_tail"] = (complaint or said)[-_TAIL:]
    if not ended:
        record["still_running"] = f"process {process.pid} did not end when killed"
    return record


def _end(process: subprocess.Popen) -> bool:
    """Ends the process and what it started; False where it outlives that, as in a driver call that never returns."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        return False
    return True


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
