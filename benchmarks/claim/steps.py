"""The claim, command by command: what a stage runs, and how it is known to be done."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.claim.rows import FLAT, ROWS, STEPAWARE

RECIPES = pathlib.Path(__file__).parent / "recipes"
STAGES = ("data", "vae", "dit", "recover", "measure", "report")
CLIPS, HELD_OUT = 6000, 300

_TRAIN = ("fps_train.commands.train", "main")


@dataclass(frozen=True)
class Step:
    """One command. Paths among its arguments are inside the claim's folder where they start with '@'.

    Attributes:
      stage: one of `STAGES`.
      entry: (module, function) of the command.
      output: what it writes.
      is_done: of that path.
      resumes: whether it goes on with what is there, by --resume.
    """

    stage: str
    entry: tuple[str, str]
    arguments: tuple[str, ...]
    output: str
    is_done: Callable[[pathlib.Path], bool]
    resumes: bool = False


def _exists(name: str) -> Callable[[pathlib.Path], bool]:
    return lambda output: (output / name).exists()


def _never(output: pathlib.Path) -> bool:
    """Seconds of work, and what it reads may have changed."""
    return False


def _has_steps(recipe: str) -> Callable[[pathlib.Path], bool]:
    def done(output: pathlib.Path) -> bool:
        from fps_jax.checkpoints.runs import is_run, read_run
        from fps_train.config import TrainConfig

        return is_run(output) and TrainConfig.load(RECIPES / recipe).steps in read_run(output).steps()

    return done


def _vae(output: str, *arguments: str) -> Step:
    common = ("--videos", "@clips", "--output", f"@{output}", "--size", "48", "64")
    entry = ("fps_train.commands.train_vae", "main")
    return Step("vae", entry, (*common, *arguments), output, _exists("checkpoint/config.json"), resumes=True)


def _train(output: str, recipe: str, data: str, *arguments: str, stage: str = "dit") -> Step:
    common = ("@base", "--config", str(RECIPES / recipe), "--data", f"@{data}", "--output", f"@{output}")
    return Step(stage, _TRAIN, (*common, *arguments), output, _has_steps(recipe), resumes=True)


def _recover(output: str, seed: int, schedule: pathlib.Path | None) -> Step:
    attention = ("--attention", "dense") if schedule is None else ("--attention", "fps", "--schedule", str(schedule))
    arguments = ("--init-from", "@dense", "--seed", str(seed), *attention)
    return _train(output, "recover.toml", "data_clips", *arguments, stage="recover")


def _measure() -> tuple[Step, ...]:
    found = []
    for row in ROWS:
        schedule = () if row.schedule is None else ("--schedule", str(row.schedule))
        for name, model in row.places():
            given = (f"@{model}", "--data", "@data_held_out", "--output", f"@measured/{name}")
            arguments = (*given, "--attention", row.attention, *schedule)
            entry = ("benchmarks.claim.measure", "main")
            found.append(Step("measure", entry, arguments, f"measured/{name}", _exists("losses.json")))
    return tuple(found)


def _clips(output: str, *arguments: str) -> Step:
    return Step("data", ("benchmarks.claim.world", "main"), (f"@{output}", *arguments), output, _exists("metadata.csv"))


def _encoded(output: str, frames: int, clips: str = "clips", stage: str = "dit") -> Step:
    size = ("--height", "48", "--width", "64", "--num-frames", str(frames), "--min-frames", str(frames))
    arguments = ("@base", "--videos", f"@{clips}", "--output", f"@{output}", *size)
    return Step(stage, ("fps_train.commands.precompute", "main"), arguments, output, _exists("manifest.json"))


STEPS = (
    _clips("clips", "--clips", str(CLIPS), "--seed", "0"),
    _clips("held_out", "--clips", str(HELD_OUT), "--seed", "1", "--held-out"),
    _vae("vae_images", "--base-dim", "8", "--z-dim", "6", "--num-res-blocks", "1", "--steps", "1500"),
    _vae("vae_clips", "--init-from", "@vae_images", "--frames", "17", "--batch-size", "4", "--steps", "1600"),
    _vae(
        "vae", "--init-from", "@vae_clips", "--train", "decoder", "--frames", "17", "--batch-size", "4", "--steps", "800",
        "--lr", "6e-4",
    ),
    Step(
        "dit", ("benchmarks.claim.model", "main"), ("--output", "@base", "--vae", "@vae/checkpoint"), "base",
        _exists("config.json"),
    ),
    _encoded("data_images", 1),
    _encoded("data_clips", 17),
    _train("images", "images.toml", "data_images"),
    _train("long", "clips.toml", "data_clips", "--init-from", "@images"),
    _train("dense", "settle.toml", "data_clips", "--init-from", "@long"),
    _recover("recover_e0", 0, STEPAWARE),
    _recover("recover_f0", 0, None),
    _recover("recover_g", 0, FLAT),
    _recover("recover_e1", 1, STEPAWARE),
    _recover("recover_f1", 1, None),
    _encoded("data_held_out", 17, "held_out", "measure"),
    *_measure(),
    Step("report", ("benchmarks.claim.report", "main"), ("@",), "report", _never),
)  # fmt: skip
