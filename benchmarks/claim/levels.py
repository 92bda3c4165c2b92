r"""The loss at single high noise levels, where what moves and where is decided, of the two models that are shipped.

    python -m benchmarks.claim.world held_out --clips 300 --seed 1 --held-out
    fps-precompute fps_jax/demo_models/dense --videos held_out --output data_held_out --height 48 --width 64 --num-frames 17 \
        --min-frames 17
    python -m benchmarks.claim.levels --data data_held_out

--data is what fps-precompute wrote of held-out clips (the first two lines do). Rows a, d, e and h of docs/claim.md; the
same clips and noise for all. Writes benchmarks/results/claim_levels.json.
"""

import pathlib
import sys
from dataclasses import dataclass

import numpy as np

from benchmarks.claim.losses import DRAWS, level_losses
from benchmarks.claim.rows import STEPAWARE
from fps_jax.errors import parse, run_cli

MODELS = pathlib.Path(__file__).parents[2] / "fps_jax" / "demo_models"
ROWS = {"a": ("dense", "dense"), "d": ("dense", "fps"), "e": ("fps", "fps"), "h": ("fps", "dense")}  # model, attention


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Losses at single noise levels."""

    data: pathlib.Path
    """What fps-precompute wrote of held-out clips."""
    levels: tuple[float, ...] = (0.9, 0.96)
    """Noise levels sigma, above 0 and below 1."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    sys.exit(run_cli(_main, argv))


def _main(arguments: list[str]) -> None:
    options = parse(Levels, arguments, prog="python -m benchmarks.claim.levels")
    for level in options.levels:
        if not 0 < level < 1:
            raise ValueError(f"levels={level} is not above 0 and below 1")
    from benchmarks.record import write
    from fps_jax.attention.schedule import FPSSchedule
    from fps_jax.checkpoints.open import open_model
    from fps_jax.compilation import enable_compilation_cache

    enable_compilation_cache()
    schedule, found = FPSSchedule.load(STEPAWARE), {}
    for row, (name, attention) in ROWS.items():
        own = None if attention == "dense" else schedule
        found[row] = level_losses(open_model(MODELS / name), own, options.levels, options.data)
        print(f"{row}: " + ", ".join(f"{level} {losses.mean():.4f}" for level, losses in found[row].items()))
    rng = np.random.default_rng(0)
    rows = {
        row: {level: _record(losses, found["a"][level], rng) for level, losses in of.items()}
        for row, of in found.items()
    }
    write("claim_levels", {"clips": len(next(iter(found["a"].values()))), "draws": DRAWS, "rows": rows})


def _record(losses: np.ndarray, base: np.ndarray, rng: np.random.Generator) -> dict[str, object]:
    """Mean, and the mean difference to row a's with its 95% bootstrap interval over clips."""
    difference = losses - base
    means = difference[rng.integers(len(difference), size=(2000, len(difference)))].mean(1)
    return {
        "loss": round(float(losses.mean()), 5),
        "over_a": round(float(difference.mean()), 5),
        "interval": [round(float(q), 5) for q in np.quantile(means, (0.025, 0.975))],
    }


if __name__ == "__main__":
    main()
