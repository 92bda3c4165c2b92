"""Command lines: fps-sample and fps-info. jax is imported once the arguments are known to be right."""

import dataclasses
import json
import os
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from fps_jax.errors import parse, run_cli


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample a video from a Wan2.1 checkpoint."""

    model: Annotated[str, tyro.conf.Positional]
    """A converted checkpoint, an official or diffusers directory, or a Hugging Face repo id."""
    prompt: str
    """What the video shows."""
    output: pathlib.Path = pathlib.Path("out.mp4")
    """The file to write: .mp4, or .npy with --output-type latent. Settings go to the same name with .json appended."""
    negative_prompt: str | None = None
    """What it should not show; Wan's own default for the model if left out, '' for nothing."""
    image: pathlib.Path | None = None
    """First frame (I2V, FLF2V): an image file, or .npy with floats in [0, 1] or uint8."""
    last_image: pathlib.Path | None = None
    """Last frame (FLF2V)."""
    image_embeds: pathlib.Path | None = None
    """Image-tower tokens as .npy, in place of those computed from the images."""
    height: int = 480
    """Pixels, a multiple of 16."""
    width: int = 832
    """Pixels, a multiple of 16."""
    num_frames: int = 81
    """4k + 1."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance weight; at 1 or below the negative prompt isn't used."""
    flow_shift: float | None = None
    """Shift of the noise levels; the checkpoint's own if left out."""
    solver: Literal["unipc", "dpm++", "euler"] = "unipc"
    """The ODE solver."""
    sigma_grid: Literal["wan", "diffusers"] = "wan"
    """Noise levels of the official code or of diffusers."""
    seed: int = 0
    """Seed of the initial noise."""
    latents: pathlib.Path | None = None
    """Initial noise as .npy, [1, 16, F, H/8, W/8], in place of the seed's."""
    output_type: Literal["np", "latent"] = "np"
    """'latent' writes the denoised latents as .npy and decodes no video."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype of the DiT and the text encoder."""
    fps: int = 16
    """Frames a second in the mp4 (Wan's models make 16)."""
    vae_tiling: bool = False
    """Decode in spatial tiles, for little memory."""
    batch_guidance: bool = False
    """Evaluate prompt and negative prompt as one batch of two."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a Wan2.1 checkpoint without loading its weights."""

    model: Annotated[str, tyro.conf.Positional]
    """A converted checkpoint, or an official or diffusers directory."""
    height: int = 480
    """Frame height that the memory estimate is for."""
    width: int = 832
    """Frame width that the memory estimate is for."""
    num_frames: int = 81
    """Frames that the memory estimate is for."""


def sample(argv: list[str] | None = None) -> None:
    """Entry point of fps-sample."""
    sys.exit(run_cli(lambda args: _sample(parse(Sample, args, prog="fps-sample")), argv))


def info(argv: list[str] | None = None) -> None:
    """Entry point of fps-info."""
    sys.exit(run_cli(lambda args: _info(parse(Info, args, prog="fps-info")), argv))


def _sample(options: Sample) -> None:
    _check_output(options)
    arrays = {name: _array(options, name) for name in ("image", "last_image", "image_embeds", "latents")}
    from fps_jax.pipeline import WanPipeline
    from fps_jax.requests import check_frame
    from fps_jax.solvers import solver_table

    start = time.time()
    # What needs no checkpoint is checked before one is read, which can take minutes.
    check_frame(options.height, options.width, options.num_frames)
    solver_table(
        options.solver,
        options.sigma_grid,
        options.num_inference_steps,
        5.0 if options.flow_shift is None else options.flow_shift,
    )
    pipe = WanPipeline.from_pretrained(options.model, dtype=options.dtype)
    pipe.show_progress = True
    keywords = {f.name for f in dataclasses.fields(Sample)} - {"model", "prompt", "output", "dtype", "fps"}
    arguments: dict[str, Any] = {name: getattr(options, name) for name in keywords} | arrays
    result = pipe(options.prompt, **arguments)
    if options.output_type == "latent":
        _save_array(result, options.output)
    else:
        from fps_jax.video import save_video

        save_video(result, options.output, fps=options.fps)
    _save_settings(options, pipe, time.time() - start)
    print(f"wrote {options.output} and {options.output}.json in {time.time() - start:.1f} s", file=sys.stderr)


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


def _array(options: Sample, name: str) -> Any:
    """A .npy file as an array; another file's path as it is (an image)."""
    path = getattr(options, name)
    if path is None:
        return None
    if path.suffix != ".npy":
        if name in ("image_embeds", "latents"):
            raise ValueError(f"{name}={str(path)!r} is not a .npy file; save the array with numpy.save")
        return path
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}={str(path)!r} doesn't exist") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{name}={str(path)!r} is not a readable .npy array: {error}") from None


def _save_array(array: Any, path: pathlib.Path) -> None:
    import numpy as np

    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:
            np.save(file, array)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _save_settings(options: Sample, pipe: Any, seconds: float) -> None:
    """Everything that another run needs to make the same video."""
    import jax

    import fps_jax
    from fps_jax.requests import default_flow_shift

    settings = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(options).items()}
    if settings["flow_shift"] is None:
        settings["flow_shift"] = default_flow_shift(pipe.config, options.height, options.width)
    if settings["negative_prompt"] is None:
        from fps_jax.config import NEGATIVE_PROMPTS

        settings["negative_prompt"] = NEGATIVE_PROMPTS[pipe.config.task]
    device = jax.local_devices()[0]
    record = {
        "settings": settings,
        "task": pipe.config.task,
        "versions": {"fps_jax": fps_jax.__version__, "jax": jax.__version__, "python": sys.version.split()[0]},
        "device": f"{device.platform} {device.device_kind}",
        "seconds": round(seconds, 2),
    }
    path = options.output.with_name(options.output.name + ".json")
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _info(options: Info) -> None:
    from fps_jax.info import describe

    print(describe(options.model, options.height, options.width, options.num_frames))
