"""fps-sample: a video from a prompt. jax is imported once the arguments are known to be right."""

import io
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fps_jax.commands.options import VideoOptions, check_output, load_pipeline, read_request, run_record
from fps_jax.commands.profiled import profiled
from fps_jax.errors import parse, run_cli
from fps_jax.files import json_bytes, write_together
from fps_jax.progress import Quiet, waiting

if TYPE_CHECKING:
    from fps_jax.sampling.request import Request


@dataclass(frozen=True, kw_only=True)
class Sample(VideoOptions):
    """Sample a video from a Wan2.1 checkpoint."""

    output: pathlib.Path = pathlib.Path("out.mp4")
    """The file to write: .mp4 (.mov, .mkv), .png for one frame, or .npy with --output-type latent. Settings go to the same name
    with .json appended."""
    overwrite: bool = False
    """Replace the output and its .json, if they exist."""
    output_type: Literal["np", "latent"] = "np"
    """'latent' writes the denoised latents as .npy and decodes no video."""
    profile: pathlib.Path | None = None
    """A new folder for where the time goes: profile.html to look at, profile.json, and a trace of jax.profiler."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-sample."""
    sys.exit(run_cli(lambda args: _sample(parse(Sample, args, prog="fps-sample")), argv))


def _sample(options: Sample) -> None:
    _check_output(options)
    request = read_request(options)
    with profiled(options.profile, f"fps-sample {options.output.name}", options.output):
        _write(options, request)


def _write(options: Sample, request: "Request") -> None:
    from fps_jax.profiling.stages import stage

    start = time.time()
    with stage("load"):
        pipe = load_pipeline(options, request, lambda filled: _check_frames(options, filled.num_frames))
    result = pipe.sample(request)
    with stage("write"), waiting(f"write {options.output.name}"):
        content = _content(options, result)
        seconds = time.time() - start
        record = run_record(options, request, pipe) | {"seconds": round(seconds, 2)}
        write_together({_record_of(options.output): json_bytes(record), options.output: content})
    print(f"wrote {options.output} and {options.output}.json in {seconds:.1f} s", file=Quiet(sys.stderr))


def _content(options: Sample, result: Any) -> bytes:
    """Of the output: latents as .npy, or the video's file."""
    if options.output_type == "latent":
        import numpy as np

        np.save(buffer := io.BytesIO(), result)
        return buffer.getvalue()
    from fps_jax.media.video import video_bytes

    return video_bytes(result, options.output, fps=options.fps)


def _record_of(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(output.name + ".json")


def _check_output(options: Sample) -> None:
    suffixes = (".npy",) if options.output_type == "latent" else (".mp4", ".mov", ".mkv", ".png")
    if options.output.suffix not in suffixes:
        raise ValueError(
            f"output={str(options.output)!r} must end in {', '.join(suffixes)} for --output-type {options.output_type}"
        )
    check_output(options.output, _record_of(options.output), overwrite=options.overwrite)


def _check_frames(options: Sample, frames: int | None) -> None:
    """A picture has one frame. To be called when the number of frames is known, and before the weights are read."""
    if options.output.suffix == ".png" and frames != 1:
        raise ValueError(
            f"output={str(options.output)!r} is a picture, and num_frames={frames}; use .mp4, or --num-frames 1"
        )
