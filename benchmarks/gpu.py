"""On a GPU, in one command: are the Hopper kernels right, how fast are they, and which tuning is best?

    python -m benchmarks.gpu                  # all stages, most valuable first, 9 minutes at most; again: continues
    python -m benchmarks.gpu correct          # a stage: facts, correct, speed, peers, tune
    python -m benchmarks.gpu "fp8x1 0.20"     # cases whose name holds this
    python -m benchmarks.gpu --list

Needs jax with CUDA, flax and NumPy; torch for its own baselines. Every case runs in a process of its own with a time limit, and
the results (gpu.json in $OUT, else in benchmarks/results) are written after each. A case that has a result is skipped (`--again`
repeats it); where $OUT holds none, those in benchmarks/results count. No further case runs of a kernel that hung. Without a GPU
the same code runs at toy size in interpret mode on a CPU, writes gpu_toy.json, and says "not measured".
"""

import argparse
import dataclasses
import datetime
import os
import pathlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import record
from benchmarks.gpu_cases.cases import all_cases
from benchmarks.gpu_cases.report import fastest_baseline, table
from benchmarks.gpu_cases.results import Results
from benchmarks.gpu_cases.runner import Case, run
from pallas_kernels.tuning import fastest, write_tuned_table

STAGES = ("facts", "correct", "speed", "peers", "tune")
_LEAST = 30  # seconds in which a case can end: no other starts with less left
_HOPELESS = 3  # hangs in a row
_AGAIN = 35  # seconds kept for the baseline's repetition


def gpu_name() -> str | None:
    """Name, id and driver of the first GPU; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        query = ["nvidia-smi", "--query-gpu=name,uuid,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def select(cases: Sequence[Case], words: Sequence[str]) -> list[Case]:
    """The cases of these stages, of these names, or with these words in their names; all for none.

    Raises: ValueError for a word of neither.
    """
    unknown = [w for w in words if w not in STAGES and not any(w in c.name for c in cases)]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no stage ({', '.join(STAGES)}) and in no case's name; see --list")
    whole = {*STAGES, *(c.name for c in cases)}  # a case's whole name means that one, though it is part of others
    return [
        c for c in cases if not words or any(w in (c.stage, c.name) or (w not in whole and w in c.name) for w in words)
    ]


def is_due(case: Case, chosen: Sequence[Case], results: Results, call: str, again: bool) -> bool:
    """Whether a case has to run in this call: it has no result, or it is the baseline of cases that have none."""
    if again or not case.baseline:
        return not results.done(case.name, call if again else None)
    if results.done(case.name, call):
        return False
    if not results.done(case.name):
        return True
    waiting = any(
        not c.baseline
        and c.stage in ("speed", "peers")
        and c.kwargs.get("size") == case.kwargs["size"]
        and not results.done(c.name)
        for c in chosen
    )
    # Ratios are within one call; of baselines known from earlier ones, only the fastest matters.
    best = fastest_baseline(results.records, case.kwargs["size"])
    return waiting and best is not None and best[0] == case.name


def work(cases: Sequence[Case], results: Results, call: str, *, toy: bool, budget: float, again: bool = False) -> None:
    """Runs the cases that are due, until `budget` seconds are over."""
    end = time.monotonic() + budget
    in_a_row = 0
    first: Case | None = None  # the baseline that this call began with
    for case in cases:
        if not is_due(case, cases, results, call, again):
            continue
        hung = {kernel: where for kernel, where in results.hung().items() if where != case.name}
        if banned := [kernel for kernel in case.kernels if kernel in hung]:
            results.add(_not_run(case, call, f"not run: {banned[0]} hung in '{hung[banned[0]]}'"))
            _say(results.records[-1])
            continue
        left = end - time.monotonic() - (_AGAIN if first and not toy else 0)
        if left < min(case.seconds, _LEAST):
            print(f"{case.name:36} not run: the budget is spent; call again to continue", flush=True)
            continue
        result = {**run(case, toy=toy, seconds=left), "call": call}
        results.add(result)
        _say(result)
        first = first or (case if case.baseline else None)
        in_a_row = in_a_row + 1 if result.get("hung") else 0
        if in_a_row == _HOPELESS:
            print(f"{_HOPELESS} cases in a row hung: the GPU itself may. Stopped.", flush=True)
            return
    if first and end - time.monotonic() > _LEAST:  # what clocks did meanwhile
        repeat = dataclasses.replace(first, name=f"{first.name} again")
        results.add({**run(repeat, toy=toy, seconds=end - time.monotonic()), "call": call})
        _say(results.records[-1])


def _not_run(case: Case, call: str, why: str) -> dict[str, Any]:
    return {
        "case": case.name, "stage": case.stage, "kernels": list(case.kernels), "config": case.kwargs, "parts": [],
        "failed": why, "unfinished": True, "call": call,
    }  # fmt: skip


def _say(result: dict[str, Any]) -> None:
    wrong = [str(p.get("part")) for p in result["parts"] if p.get("ok") is False]
    outcome = result.get("failed") or (f"WRONG: {', '.join(wrong)}" if wrong else f"{len(result['parts'])} results")
    print(f"{result['case']:36} {result.get('seconds_in_all', 0):6.1f} s  {outcome}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}, or words of a case's name")
    parser.add_argument("--again", action="store_true", help="run cases that have a result already, too")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="of this call (540)")
    parser.add_argument("--toy", action="store_true", help="toy size on a CPU, as where there is no GPU")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    options = parser.parse_args(arguments)
    try:
        chosen = select(all_cases(), options.what)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(f"{case.stage:8} {case.name}" for case in chosen))
        return
    gpu = None if options.toy else gpu_name()
    toy = gpu is None
    if toy:
        print("No GPU: toy sizes in interpret mode on a CPU, which prove the script. Nothing is measured.", flush=True)
    out = pathlib.Path(os.environ.get("OUT") or record.RESULTS)
    name = "gpu_toy.json" if toy else "gpu.json"
    # A toy run elsewhere is to prove the script there: what is committed proves nothing of it.
    results = Results(out / name, toy=toy, earlier=None if toy else record.RESULTS / name)
    call = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = ["python", "-m", "benchmarks.gpu", *["--toy"] * options.toy, *options.what]
    environment = {**record.environment(), "command": shlex.join(command)}
    results.calls[call] = {"gpu": gpu or "none", "environment": environment}
    work(chosen, results, call, toy=toy, budget=options.budget, again=options.again)
    best = fastest(p for r in results.records if r["stage"] == "tune" for p in r["parts"])
    if best:
        path = out / "tuned_sm90.json"
        write_tuned_table(best, path=path)
        print(f"written: {path} (copy it to pallas_kernels/ to ship it)")
    results.save()
    print(table(results))
    print(f"written: {results.path}")


if __name__ == "__main__":
    main()
