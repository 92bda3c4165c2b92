"""`make mutants`: small faults planted one at a time, to see whether the tests of a file notice. Not in CI: a quarter of an hour.

    python -m benchmarks.mutants --only fps_jax/sampling/flow.py --most 20

Each mutant (`faults.py`) is planted in a copy of the tree, and the tests that mirror the file are run (`forks.py`) until one fails:
those that found an earlier mutant first, slow ones last.

Those that survive are listed; whole runs go into benchmarks/results/mutants.json. What a survivor is excused by is written there by
hand, and kept while its line and fault are.
"""

import argparse
import ast
import json
import pathlib
import random
import shutil
import tempfile

from benchmarks import record
from benchmarks.mutants.faults import Mutant, mutants
from benchmarks.mutants.forks import ROOT, Runs, import_what_is_foreign

# File -> the tests that mirror it.
TARGETS = {
    "convert/fps_convert/formats/pth.py": "tests/fps_convert/test_pth.py tests/fps_convert/test_pth_refused.py "
    "tests/fps_convert/test_pth_written.py",
    "convert/fps_convert/formats/readers.py": "tests/fps_convert/test_readers.py tests/fps_convert/test_bad_input.py",
    "fps_jax/attention/windows.py": "tests/fps_jax/attention/test_windows.py tests/fps_jax/attention/test_cache.py "
    "tests/fps_jax/attention/test_block_causal.py",
    "fps_jax/attention/schedule.py": "tests/fps_jax/attention/test_schedule.py",
    "fps_jax/sampling/solvers.py": "tests/fps_jax/sampling/test_solvers.py tests/fps_jax/sampling/test_denoise.py",
    "fps_jax/sampling/flow.py": "tests/fps_jax/sampling/test_solvers.py tests/fps_jax/sampling/test_request.py "
    "tests/fps_jax/sampling/test_few_step.py tests/fps_jax/test_causal.py",
    "fps_jax/sampling/request.py": "tests/fps_jax/sampling/test_request.py tests/fps_jax/sampling/test_call.py "
    "tests/fps_jax/sampling/test_few_step.py",
    "fps_jax/sampling/request_fields.py": "tests/fps_jax/sampling/test_request.py tests/fps_jax/sampling/test_request_fields.py",
    "fps_jax/config.py": "tests/fps_jax/test_config.py tests/fps_convert/test_mapping.py",
    "fps_jax/sizes.py": "tests/fps_jax/test_sizes.py tests/fps_jax/sampling/test_request.py",
}
# Seconds that a mutant has, or ten times what the unmutated file takes: one that never ends is noticed, too.
_LEAST = 30


def survivors(file: str, trees: list[pathlib.Path], most: int | None) -> tuple[int, list[Mutant]]:
    """How many mutants there are, and those that no test of the file found. Raises ValueError where tests fail without one."""
    source = (ROOT / file).read_text()
    runs, plain = Runs(file, TARGETS[file], trees), ast.unparse(ast.parse(source))
    for _ in range(2):  # in the order of the files, and in that of their durations
        outcome = runs.once(plain)
        if not outcome.passed:
            raise ValueError(
                f"{file}: its tests fail as it is, first {outcome.failed or 'at collection'}\n"
                + (trees[-1] / "output.txt").read_text()
            )
        runs.seconds = outcome.seconds or {}
    runs.limit = max(_LEAST, 10 * sum(runs.seconds.values()))
    planted = list(mutants(source))
    if most is not None:
        planted = random.Random(0).sample(planted, min(most, len(planted)))
    waiting, left = list(reversed(planted)), []
    try:
        while waiting or runs.running:
            while waiting and runs.free:
                runs.start(waiting[-1].text, waiting.pop())
            for mutant, outcome in runs.ended():
                if outcome.passed:
                    left.append(mutant)
                    print(f"{file}  line {mutant.line}: {mutant.change}", flush=True)
    finally:
        runs.stop()
    for tree in trees:
        (tree / file).write_text(source)
    return len(planted), sorted(left)


def written(file: str, count: int, left: list[Mutant]) -> None:
    """A file's whole run into the results: others keep what they have, and a survivor that was there its reason."""
    path = record.RESULTS / "mutants.json"
    files = json.loads(path.read_text())["files"] if path.exists() else {}
    known = {(s["text"], s["change"]): s["why"] for s in files.get(file, {}).get("survivors", [])}
    files[file] = {
        "mutants": count,
        "found": count - len(left),
        "survivors": [
            {"line": m.line, "text": m.shown, "change": m.change, "why": known.get((m.shown, m.change), "")}
            for m in left
        ],
    }
    files = {file: files[file] for file in TARGETS if file in files}
    record.write("mutants", {"files": files})


def main() -> None:
    """Prints a line a file and its survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TARGETS, help="one file")
    parser.add_argument("--most", type=int, help="mutants a file, drawn by a fixed seed; all if left out")
    parser.add_argument("--at-once", type=int, default=2, help="processes")
    options = parser.parse_args()
    import_what_is_foreign()
    with tempfile.TemporaryDirectory() as folder:
        trees = [pathlib.Path(folder) / str(i) for i in range(options.at_once)]
        for tree in trees:
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "outputs", "*.egg-info", "results"))
        for file in [options.only] if options.only else TARGETS:
            count, left = survivors(file, trees, options.most)
            print(f"{file}: {count - len(left)} of {count} found", flush=True)
            if options.most is None:
                written(file, count, left)


if __name__ == "__main__":
    main()
