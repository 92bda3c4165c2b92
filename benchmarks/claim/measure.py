"""One row of the claim's table: a model with one attention, on held-out captions and clips.

    python -m benchmarks.claim.measure RUN --data DATA --output FOLDER --attention fps --schedule SCHEDULE

writes judged.json, strips.png, clips.npy (uint8 [N, F, H, W, 3]) and losses.json, each whole or not at all; the last says that all
are there.
"""

import dataclasses
import io
import pathlib
import sys
from dataclasses import dataclass

import numpy as np

from benchmarks.claim.judge import Judge, captions, check, sample, write_strips
from benchmarks.claim.losses import DRAWS, paired_losses
from benchmarks.claim.rows import STEPAWARE
from fps_jax.errors import parse, run_cli

LAST = "losses.json"


@dataclass(frozen=True, kw_only=True)
class Measure(Judge):
    """Sample held-out captions, let the checker read the clips, and measure the loss on held-out clips."""

    data: pathlib.Path
    """What fps-precompute wrote of held-out clips."""
    clips: int = 256
    """How many captions."""
    intervals: pathlib.Path = STEPAWARE
    """Schedule whose regimes losses are given for."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    sys.exit(run_cli(_main, argv))


def _main(arguments: list[str]) -> None:
    options = parse(Measure, arguments, prog="python -m benchmarks.claim.measure")
    check(options)
    from fps_jax.attention.schedule import FPSSchedule
    from fps_jax.checkpoints.open import open_model
    from fps_jax.compilation import enable_compilation_cache
    from fps_jax.files import write_bytes, write_json

    enable_compilation_cache()
    model = open_model(options.model)
    schedule = None
    if options.attention not in (None, "dense"):
        own = model.schedule if options.schedule is None else FPSSchedule.load(options.schedule)
        if own is None:
            raise ValueError(
                f"attention={options.attention!r}, but the model has no schedule; give one with --schedule"
            )
        schedule = own.setting(options.attention)
    losses = paired_losses(model, schedule, FPSSchedule.load(options.intervals), options.data)
    facts, texts = captions(options.clips, options.seed, not options.trained)
    judged = sample(options, facts, texts)
    options.output.mkdir(parents=True, exist_ok=True)
    given = json_options(options)
    write_json(given | judged.record() | {"right": judged.right.astype(int).tolist()}, options.output / "judged.json")
    write_strips(judged, options.output / "strips.png")
    np.save(buffer := io.BytesIO(), judged.videos)
    write_bytes(options.output / "clips.npy", buffer.getvalue())
    write_json({"draws": DRAWS, "losses": {k: v.tolist() for k, v in losses.items()}}, options.output / LAST)
    means = ", ".join(f"{name} {values.mean():.4f}" for name, values in losses.items())
    print(f"{options.output.name}: whole {judged.whole.mean():.3f}, loss {means}")


def json_options(options: Judge) -> dict:
    """Options as JSON has them."""
    return {name: str(v) if isinstance(v, pathlib.Path) else v for name, v in dataclasses.asdict(options).items()}


if __name__ == "__main__":
    main()
