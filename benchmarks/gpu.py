"""On a GPU, in one command: are the Hopper kernels right, how fast are they, and which tuning is best?

    python3 -m benchmarks.gpu --gpu            # everything, most valuable first, 9 minutes at most; again: continues
    python3 -m benchmarks.gpu correct          # a stage: facts, correct, speed, peers, whole
    python3 -m benchmarks.gpu headline "fp8x1 0.20"  # families and cases of this name, else whose name holds this
    python3 -m benchmarks.gpu --list

Needs jax with CUDA, flax, optax, einops, jaxtyping and NumPy; torch for its own baselines. Cases come in families, a process each;
several compile while one has the GPU. Results (gpu.json in $OUT, else in benchmarks/results) are written after each case. A case
that has a result on this kind of GPU is skipped (`--again` repeats it), but for wrong numbers; where $OUT holds none, those in
benchmarks/results count. No further case runs of a kernel that hung. Without a GPU the same code runs at toy size in interpret mode
on a CPU, writes gpu_toy.json ($OUT, else outputs/), and says "not measured"; `--gpu` makes that an error.
"""

import argparse
import dataclasses
import datetime
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence, Set
from typing import Any

from benchmarks import record
from benchmarks.gpu_cases.alone import LOCK, BusyError, alone
from benchmarks.gpu_cases.facts import Clocks, add_cuda_to_path
from benchmarks.gpu_cases.plan import SWEEP, all_families
from benchmarks.gpu_cases.report import table
from benchmarks.gpu_cases.results import Results
from benchmarks.gpu_cases.runner import REFERENCES, ROOT, Case, Family, Runner, python_path
from pallas_kernels.sm90.tuned import fastest, write_tuned_table

STAGES = ("facts", "correct", "speed", "peers", "whole")
TIMED = ("speed", "peers")  # compared with dense attention
_AHEAD = 8  # families that prepare at a time
_TOY_PATIENCE = 1800  # seconds that interpret mode may take for a case


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


def select(families: Sequence[Family], words: Sequence[str]) -> list[Family]:
    """What the words name: a stage, a family or a case where it is its whole name, else each whose name holds it; all for none.

    Of the baselines the dense ones at the sizes that are timed come with it: ratios are within one call.

    Raises: ValueError for a word that names nothing.
    """
    if not words:
        return list(families)
    chosen: set[str] = set()
    for word in words:
        named = _named(families, word)
        if not named:
            raise ValueError(
                f"{word!r} names no stage ({', '.join(STAGES)}), family or case; take words of what --list prints"
            )
        chosen |= named
    sizes = {c.kwargs.get("size") for f in families if f.stage in TIMED for c in f.cases if c.name in chosen}
    chosen |= {c.name for f in families for c in f.cases if _compares(f, c, sizes)}
    return _only(families, lambda _, case: case.name in chosen)


def _named(families: Sequence[Family], word: str) -> set[str]:
    """Names of the cases that a word of the command line means."""
    both = [(family, case) for family in families for case in family.cases]
    whole = {c.name for f, c in both if word in (f.stage, f.name)} or {c.name for _, c in both if word == c.name}
    return whole or {c.name for f, c in both if word in f.name or word in c.name}


def _compares(family: Family, case: Case, sizes: Set[str | None]) -> bool:
    """Whether it is dense attention of a baseline, at one of these sizes."""
    return family.baseline and case.name.startswith("dense ") and case.kwargs["size"] in sizes


def _only(families: Sequence[Family], wanted: Callable[[Family, Case], bool]) -> list[Family]:
    fewer = [dataclasses.replace(f, cases=tuple(c for c in f.cases if wanted(f, c))) for f in families]
    return [family for family in fewer if family.cases]


def due(families: Sequence[Family], results: Results, *, again: bool, gpu: str | None = None) -> list[Family]:
    """What has to run in this call: cases without a result, and of the baselines the dense ones of the sizes that they need."""
    new = {c.name for f in families for c in f.cases if again or not results.done(c.name, gpu)}
    sizes = {c.kwargs.get("size") for f in families if f.stage in TIMED for c in f.cases if c.name in new}
    return _only(families, lambda family, case: case.name in new or _compares(family, case, sizes))


def swept(results: Results) -> list[dict[str, Any]]:
    """What the tuned table is made of: the sweeps, one call a key.

    Without sums that stay in the tensor cores, which cost accuracy: whoever wants them asks for them.
    """
    parts = [p for r in results.records if r["family"].startswith(SWEEP) for p in r["parts"] if "key" in p]
    return [p for p in parts if p["config"]["promote_every"] == 1]


def _patient(family: Family) -> Family:
    """With the time that interpret mode takes."""
    cases = tuple(dataclasses.replace(case, silence=_TOY_PATIENCE) for case in family.cases)
    return dataclasses.replace(family, cases=cases, seconds=_TOY_PATIENCE)


def _references(folder: str) -> subprocess.Popen:
    """The process that computes what the specification says, on the CPUs."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_cases.references", folder],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": python_path(),
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = ", ".join(STAGES)
    parser.add_argument("what", nargs="*", metavar="STAGE", help=f"{stages}, or words of a family's or a case's name")
    parser.add_argument("--again", action="store_true", help="run cases that have a result already, too")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="of this call (540)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpu", action="store_true", help="fail where there is no GPU, in place of a toy run")
    where.add_argument("--toy", action="store_true", help="toy size on a CPU, as where there is no GPU")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    options = parser.parse_args(arguments)
    if not 0 < options.budget <= 86400:
        parser.error(f"budget={options.budget} is not above 0, up to 86400 seconds")
    try:
        chosen = select(all_families(), options.what)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(f"{family.stage:8} {family.name:26} {case.name}" for family in chosen for case in family.cases))
        return
    add_cuda_to_path()
    gpu = None if options.toy else gpu_name()
    if gpu is None and options.gpu:
        parser.error(
            "--gpu demands a GPU, and nvidia-smi names none; run where it does, or leave --gpu out for toy sizes"
        )
    command = shlex.join(["python3", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    if gpu is None:
        print("No GPU: toy sizes in interpret mode on a CPU, which prove the script. Nothing is measured.", flush=True)
        run_call([_patient(family) for family in chosen], gpu, command, budget=options.budget, again=options.again)
        return
    try:
        with alone(command):
            run_call(chosen, gpu, command, budget=options.budget, again=options.again)
    except BusyError as error:
        parser.error(f"another call has this machine's GPU ({error}); wait until it has ended, or end it with Ctrl-C")
    except OSError as error:
        if error.filename != str(LOCK):
            raise
        parser.error(f"the lock file {LOCK} can't be opened ({error.strerror}); another user made it: remove it")


def run_call(chosen: Sequence[Family], gpu: str | None, command: str, *, budget: float, again: bool) -> None:
    """What of the chosen families has no result yet, into the results file, and the table. `gpu`: None for toy sizes."""
    toy = gpu is None
    # A toy run is to prove the script as it is here: what is committed proves nothing of it, and stays as it is.
    out = pathlib.Path(os.environ.get("OUT") or ("outputs" if toy else record.RESULTS))
    name = "gpu_toy.json" if toy else "gpu.json"
    results = Results(out / name, toy=toy, earlier=None if toy else record.RESULTS / name)
    call = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    environment = {**record.environment(), "command": command}
    results.calls[call] = {"gpu": gpu or "none", "environment": environment}
    patience = {"ahead": 0, "prepare_seconds": _TOY_PATIENCE} if toy else {"ahead": _AHEAD}
    runner = Runner(results, call, toy=toy, budget=budget, **patience)
    families = due(chosen, results, again=again, gpu=gpu)
    with tempfile.TemporaryDirectory() as folder:
        references = None
        if not toy:
            os.environ[REFERENCES] = folder
            references = _references(folder)
        clocks = Clocks()
        try:
            runner.run(families)
        finally:
            results.calls[call]["clocks"] = clocks.stop()
            if references is not None:
                references.kill()
                references.wait()
            os.environ.pop(REFERENCES, None)
    best = fastest(swept(results))
    if best:
        path = out / "tuned_sm90.json"
        write_tuned_table(best, path=path)
        print(f"written: {path} (copy it to pallas_kernels/ to ship it)")
    results.save()
    print(f"written: {results.path}")
    print(table(results))


if __name__ == "__main__":
    main()
