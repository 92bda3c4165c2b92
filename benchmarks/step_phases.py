"""Where a step of the Hopper kernel spends its time: Nsight Compute's samples of each instruction, by phases of the main loop.

    ncu --clock-control none --kernel-name regex:mosaic --section SourceCounters -o kernel \\
        python3 -m benchmarks.gpu_cases.counters 1.3B 1.0 1 '{"stages": 4}'      # size, density, scales a tile or None, config
    ncu --import kernel.ncu-rep --page source --csv > source.csv
    python -m benchmarks.step_phases source.csv fp8     # a name for each kernel that was launched, in order

The phases lie between landmarks of the consumers' loop: the last matmul that is issued, the wait for Q K, the vote on maxima, the
wait for the next keys, the wait for P V. Writes benchmarks/results/step_phases.json.
"""

import csv
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.record import write

SAMPLES, EXECUTED, SOURCE = "# Samples", "Instructions Executed", "Source"


def kernels(path: pathlib.Path) -> Iterator[list[dict[str, str]]]:
    """The instructions of each kernel of a source page."""
    header: list[str] | None = None
    rows: list[dict[str, str]] = []
    with path.open(newline="") as file:
        for line in csv.reader(file):
            if line[:1] == ["Kernel Name"]:
                if rows:
                    yield rows
                header, rows = None, []
            elif header is None and SOURCE in line:
                header = line
            elif header is not None and line:
                rows.append(dict(zip(header, line, strict=False)))
    if rows:
        yield rows


def main_loop(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The consumers' loop: from the branch target before its first matmul to the branch that closes it.

    Raises: ValueError where there is no loop of matmuls.
    """
    found = [{"op": r[SOURCE], "n": int(r[EXECUTED] or 0), "samples": int(r[SAMPLES] or 0)} for r in rows]
    matmuls = [i for i, r in enumerate(found) if "GMMA.64" in r["op"]]
    if not matmuls:
        raise ValueError("no wgmma in this kernel; profile the forward kernel")
    most = max(found[i]["n"] for i in matmuls)
    inside = [i for i in matmuls if found[i]["n"] == most]
    first, last = inside[0], inside[-1]
    # What runs as often as the matmuls, and what it jumps over.
    while first > 0 and most * 0.98 <= found[first - 1]["n"] <= most * 1.02:
        first -= 1
    while last + 1 < len(found) and not (
        found[last]["n"] >= most * 0.98 and "BRA" in found[last]["op"] and _closes(found, last, most)
    ):
        last += 1
    return found[first : last + 1]


def _closes(found: list[dict[str, Any]], i: int, most: int) -> bool:
    """Whether nothing that runs in every step follows within reach."""
    return not any(r["n"] >= most * 0.98 for r in found[i + 1 : i + 200])


def phases(loop: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the loop's samples."""
    ops = [r["op"] for r in loop]

    def last(word: str) -> int:
        return max(i for i, op in enumerate(ops) if word in op)

    def after(start: int, word: str) -> int:
        return next(i for i in range(start, len(ops)) if word in ops[i])

    issued = last("GMMA.64")
    first_wait = after(issued, "DEPBAR")
    vote = after(first_wait, "VOTE")
    jump = after(vote, "BRA")
    keys = max(i for i in range(jump, len(ops)) if "PHASECHK" in ops[i])
    last_wait = after(keys, "DEPBAR")
    edges = {
        "waits for V, issue of both products": (0, issued + 1),
        "wait for Q K": (issued + 1, first_wait + 2),
        "row maxima and vote": (first_wait + 2, jump + 1),
        "exponentials (and what is jumped over)": (jump + 1, keys),
        "wait for the next keys": (keys, last_wait),
        "wait for P V": (last_wait, last_wait + 1),
        "sums, conversion of P": (last_wait + 1, len(ops)),
    }
    total = sum(r["samples"] for r in loop)
    return {name: round(sum(r["samples"] for r in loop[a:b]) / total, 4) for name, (a, b) in edges.items()}


def main() -> None:
    path, *names = sys.argv[1:]
    found = {}
    for name, rows in zip(names, kernels(pathlib.Path(path)), strict=True):
        try:
            found[name] = phases(main_loop(rows))
        except (StopIteration, ValueError) as error:
            found[name] = {"not told apart": str(error) or "a landmark is missing"}
        print(name, found[name])
    write("step_phases", {"of": "a consumer's time in the main loop, by Nsight Compute's samples", "kernels": found})


if __name__ == "__main__":
    main()
