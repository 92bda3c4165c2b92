"""The paper's claim, shown small: a world, a VAE, a DiT, and what FP8 and sparsity cost with and without training.

    python -m benchmarks.claim                      all stages, on from where they stopped
    python -m benchmarks.claim --stages data vae    some of them
    python -m benchmarks.claim --dry-run            the commands, and which are done

Every step is a command that a user could type. One that was stopped is continued.
"""

import os
import pathlib
import shlex
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.claim.steps import STAGES, STEPS, Step
from fps_jax.errors import parse, run_cli


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Make the claim's data and models."""

    folder: pathlib.Path = pathlib.Path("outputs/claim")
    """Where everything goes."""
    stages: tuple[str, ...] = STAGES
    """Which stages to run."""
    dry_run: bool = False
    """Print the commands, and which are done."""


def _arguments(step: Step, folder: pathlib.Path) -> list[str]:
    given = [str(folder / a[1:]) if a.startswith("@") else a for a in step.arguments]
    output = folder / step.output
    if step.resumes and output.is_dir() and any(output.iterdir()):
        # A run that is continued has its start already.
        if "--init-from" in given and step.entry[0] == "fps_train.commands.train":
            at = given.index("--init-from")
            del given[at : at + 2]
        given.append("--resume")
    return given


def _main(arguments: list[str]) -> None:
    options = parse(Claim, arguments, prog="python -m benchmarks.claim")
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"stages: {unknown[0]!r} is not one of {', '.join(STAGES)}")
    folder = options.folder.resolve()
    for step in STEPS:
        if step.stage not in options.stages:
            continue
        given, (module, function) = _arguments(step, folder), step.entry
        done = step.is_done(folder / step.output)
        print(f"{'done: ' if done else ''}{module} {shlex.join(given)}", file=sys.stderr, flush=True)
        if done or options.dry_run:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        command = f"from {module} import {function}; {function}()"
        subprocess.run([sys.executable, "-c", command, *given], check=True, env=os.environ)
        if step.resumes and not step.is_done(folder / step.output):
            raise InterruptedError(f"{step.output} was stopped before its end; the same command goes on with it")


if __name__ == "__main__":
    sys.exit(run_cli(_main))
