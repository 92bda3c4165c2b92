"""fps-sample: a video from a prompt. jax is imported once the arguments are known to be right."""

import io
import os
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Literal

from fps_jax.commands.options import VideoOptions, load_pipeline, read_request, run_record
from fps_jax.errors import parse, run_cli
from fps_jax.files import write_bytes, write_json


@dataclass(frozen=True, kw_only=True)
class Sample(VideoOptions):
    """Sample a video from a Wan2.1 checkpoint."""

    output: pathlib.Path = pathlib.Path("out.mp4")
    """The file to write: .mp4, or .npy with --output-type latent. Settings go to the same name with .json appended."""
    output_type: Literal["np", "latent"] = "np"
    """'latent' writes the denoised latents as .npy and decodes no video."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-sample."""
    sys.exit(run_cli(lambda args: _sample(parse(Sample, args, prog="fps-sample")), argv))


def _sample(options: Sample) -> None:
    _check_output(options)
    request = read_request(options)
    start = time.time()
    pipe = load_pipeline(options, request)
    pipe.show_progress = True
    result = pipe.sample(request)
    if options.output_type == "latent":
        import numpy as np

        np.save(buffer := io.BytesIO(), result)
        write_bytes(options.output, buffer.getvalue())
    else:
        from fps_jax.media.video import save_video

        save_video(result, options.output, fps=options.fps)
    seconds = time.time() - start
    record = run_record(options, request, pipe) | {"seconds": round(seconds, 2)}
    write_json(record, options.output.with_name(options.output.name + ".json"))
    print(f"wrote {options.output} and {options.output}.json in {seconds:.1f} s", file=sys.stderr)


def _check_output(options: Sample) -> None:
    suffix = ".npy" if options.output_type == "latent" else ".mp4"
    if options.output.suffix != suffix:
        raise ValueError(f"output={str(options.output)!r} must end in {suffix} for --output-type {options.output_type}")
    folder = options.output.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"output folder {str(folder)!r} doesn't exist; make it first")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"output folder {str(folder)!r} can't be written; choose another --output")
    for path in (options.output, options.output.with_name(options.output.name + ".json")):
        if path.is_dir():
            raise IsADirectoryError(f"output={str(path)!r} is a folder; name a file")
