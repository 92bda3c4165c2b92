"""fps-compare: what FP8 and sparse attention change in a video. jax is imported once the arguments are known to be right."""

import pathlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fps_jax.commands.options import FILES, VideoOptions, load_pipeline, lora_files, read_request, run_record
from fps_jax.errors import parse, run_cli
from fps_jax.files import new_directory, write_json
from fps_jax.progress import Quiet, waiting

if TYPE_CHECKING:
    from fps_jax.sampling.presets import Settings
    from fps_jax.sampling.request import Request

WRITTEN = {"dense.mp4", "fps.mp4", "fp8.mp4", "sparse.mp4", "side_by_side.mp4", "quality.png", "quality.json"}


@dataclass(frozen=True, kw_only=True)
class Compare(VideoOptions):
    """Sample a video with dense attention and again, from the same noise, with FPSAttention; show and measure the difference.

    The output folder gets dense.mp4, the other video under its setting's name, side_by_side.mp4 with both and their
    difference, quality.png (PSNR and SSIM of each frame) and quality.json (these, the settings, the schedule, times).
    """

    attention: Literal["fps", "fp8", "sparse"] = "fps"
    """What to compare with dense: fps, FP8 and sparse as the schedule says; fp8 or sparse, only that half of it."""
    output: pathlib.Path
    """The folder to write: new or empty. It appears when all is done."""
    overwrite: bool = False
    """Replace an earlier comparison in the output folder."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-compare."""
    sys.exit(run_cli(lambda args: _compare(parse(Compare, args, prog="fps-compare")), argv))


def _compare(options: Compare) -> None:
    request = read_request(options)
    from fps_jax.checkpoints.open import open_model

    _check_output(options)
    loras = (file for file, _ in lora_files(options))
    read = (options.model, options.schedule, *(getattr(options, name) for name in FILES), *loras)
    sources = tuple(path for path in read if path is not None)
    with new_directory(options.output, overwrite=options.overwrite, sources=sources) as folder:
        model = open_model(options.model)
        resolved: Any = request.resolve(model.config, model.schedule)
        _tell(f"{options.attention}: {resolved.schedule.describe(resolved.grid)}")
        from fps_jax.evaluation.compare import compare, write

        pipe = load_pipeline(options, request)
        comparison = compare(pipe, request, tell=_tell)
        subtitle = _subtitle(request.filled(model.config), resolved.settings)
        with waiting("write videos and plot"):
            write(comparison, folder, fps=options.fps, subtitle=subtitle)
        write_json(run_record(options, request, pipe) | comparison.record(), folder / "quality.json")
    print(f"{comparison.summary()} Look at {options.output / 'side_by_side.mp4'} and {options.output / 'quality.png'}.")


def _check_output(options: Compare) -> None:
    """--overwrite removes what an earlier comparison wrote, never anything else."""
    if not options.overwrite or not options.output.is_dir():
        return
    foreign = sorted(path.name for path in options.output.iterdir() if path.name not in WRITTEN)
    if foreign:
        raise FileExistsError(
            f"output={str(options.output)!r} holds {foreign[0]!r}, which fps-compare doesn't write and won't remove; give another"
        )


def _subtitle(request: "Request", settings: "Settings") -> str:
    size = f"{request.width} x {request.height}, {request.num_frames} frames"
    return f"{size}, {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}, seed {request.seed}"


def _tell(line: str) -> None:
    print(line, file=Quiet(sys.stderr), flush=True)
