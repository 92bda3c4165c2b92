"""Ours and PyTorch on the same CPU in the same run: they take turns in processes of their own, on the same weights and inputs."""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

THREADS = 2
Side = Callable[[int], tuple[np.ndarray, dict[str, Any]]]  # timed runs -> (output, `measure`'s times)


def measure(call: Callable[[], np.ndarray], runs: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The output and the seconds of `runs` calls, after a first one that compiles."""
    seconds, cpu_seconds = [], []
    for _ in range(runs + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        out = call()
        seconds.append(round(time.perf_counter() - start, 3))
        cpu_seconds.append(round(time.process_time() - cpu_start, 3))  # says how far other programs disturbed the run
    return out, {"first_s": seconds[0], "seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:]}


def compare(script: str, *, claim: str, case: str, ours: Side, torch: Side, packages: tuple[str, ...]) -> None:
    """A benchmark's main: runs the sides in turn, writes results/<script>.json with medians, ratio and output error.

    Args:
      script: the script's path (`__file__`), which is run again for each side.
      packages: what the torch side's versions are told of.
    """
    parser = argparse.ArgumentParser(description=claim)
    parser.add_argument("--torch-python", required=True, help=f"a Python with {', '.join(packages)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--runs", type=int, default=3, help="timed runs a turn, after one that isn't counted")
    parser.add_argument("--side", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        out, times = {"ours": ours, "torch": torch}[options.side](options.runs)
        np.save(options.out, out)
        print(json.dumps(times))
        return

    turns: dict[str, list[dict[str, Any]]] = {"torch": [], "ours": []}
    outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for side, python in (("torch", options.torch_python), ("ours", sys.executable)):
                out = f"{folder}/{side}.npy"
                command = [
                    python,
                    script,
                    "--torch-python=-",
                    f"--side={side}",
                    f"--runs={options.runs}",
                    f"--out={out}",
                ]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                turns[side].append(json.loads(done.stdout.splitlines()[-1]))
                outputs[side] = np.load(out)
                print(side, turns[side][-1], flush=True)
    median = {side: statistics.median(s for turn in rounds for s in turn["seconds"]) for side, rounds in turns.items()}
    code = f"import importlib.metadata as m; print({{p: m.version(p) for p in {packages!r}}})"
    versions = subprocess.run([options.torch_python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)

    from record import write

    write(
        pathlib.Path(script).stem,
        {
            "claim": claim,
            "case": f"{case}, float32, {THREADS} threads",
            "ours_median_s": median["ours"],
            "torch_median_s": median["torch"],
            "speed_against_torch": round(median["torch"] / median["ours"], 3),
            "first_call_with_compile_s": turns["ours"][0]["first_s"],
            "relative_l2_between_outputs": float(
                np.linalg.norm(outputs["ours"] - outputs["torch"]) / np.linalg.norm(outputs["torch"])
            ),
            "torch_side": versions.stdout.strip(),
            "turns": turns,
        },
    )
