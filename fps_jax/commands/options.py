"""What the commands that sample have in common: their options, checks that need no checkpoint, and the record of a run."""

import dataclasses
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from fps_jax.choices import Dtype, Setting, SigmaGrid, Solver
from fps_jax.sizes import latent_grid, token_grid

FILES = ("image", "last_image", "image_embeds", "latents")
_NOT_FOR_THE_CALL = {"model", "dtype", "fps"}


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """A checkpoint and the video to sample from it."""

    model: Annotated[str, tyro.conf.Positional]
    """A converted checkpoint, an official or diffusers directory, or a Hugging Face repo id."""
    prompt: str
    """What the video shows."""
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
    solver: Solver = "unipc"
    """The ODE solver."""
    sigma_grid: SigmaGrid = "wan"
    """Noise levels of the official code or of diffusers."""
    seed: int = 0
    """Seed of the initial noise."""
    latents: pathlib.Path | None = None
    """Initial noise as .npy, [1, 16, F, H/8, W/8], in place of the seed's."""
    dtype: Dtype = "bfloat16"
    """Compute dtype of the DiT and the text encoder."""
    fps: int = 16
    """Frames a second in the mp4 (Wan's models make 16)."""
    vae_tiling: bool = False
    """Decode in spatial tiles, for little memory."""
    batch_guidance: bool = False
    """Evaluate prompt and negative prompt as one batch of two."""
    attention: Setting = "dense"
    """Self-attention: dense; fps, FP8 and sparse as the schedule says; fp8 or sparse, only that half of it."""
    schedule: pathlib.Path | None = None
    """Schedule as JSON, from fps-calibrate; the default one if left out."""


def check_options(options: VideoOptions) -> None:
    """What needs no checkpoint is checked before one is read, which can take minutes. Raises ValueError or FileNotFoundError."""
    from fps_jax.sampling import request
    from fps_jax.sampling.solvers import solver_table

    request.check_frame(options.height, options.width, options.num_frames)
    solver_table(
        options.solver,
        options.sigma_grid,
        options.num_inference_steps,
        5.0 if options.flow_shift is None else options.flow_shift,
    )
    request.guidance(options.guidance_scale)
    if options.latents is None:
        request.noise(None, options.seed, (1, 1))  # one number: for the checks of the seed
    if not 1 <= options.fps <= 1000:
        raise ValueError(f"fps={options.fps} must be in 1 to 1000; Wan's videos are 16")
    grid = token_grid(latent_grid(options.height, options.width, options.num_frames))
    request.schedule(options.attention, options.schedule, grid)


def call_arguments(options: VideoOptions) -> dict[str, Any]:
    """Keyword arguments of `WanPipeline.__call__`, arrays read. Raises OSError or ValueError for a file that can't be read."""
    names = [f.name for f in dataclasses.fields(VideoOptions) if f.name not in _NOT_FOR_THE_CALL]
    return {name: _array(options, name) if name in FILES else getattr(options, name) for name in names}


def _array(options: VideoOptions, name: str) -> Any:
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


def run_record(options: VideoOptions, pipe: Any) -> dict[str, Any]:
    """Everything that another run needs to make the same video: settings with defaults filled in, schedule, versions, device.

    pipe: the `WanPipeline` that made it.
    """
    import jax

    import fps_jax
    from fps_jax.config import NEGATIVE_PROMPTS
    from fps_jax.sampling.request import default_flow_shift

    settings = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(options).items()}
    if settings["flow_shift"] is None:
        settings["flow_shift"] = default_flow_shift(pipe.config, options.height, options.width)
    if settings["negative_prompt"] is None:
        settings["negative_prompt"] = NEGATIVE_PROMPTS[pipe.config.task]
    size = (options.height, options.width, options.num_frames)
    schedule = pipe.resolve_schedule(options.attention, options.schedule, *size)
    device = jax.local_devices()[0]
    return {
        "settings": settings,
        "task": pipe.config.task,
        "schedule": None if schedule is None else schedule.to_dict(),
        "versions": {"fps_jax": fps_jax.__version__, "jax": jax.__version__, "python": sys.version.split()[0]},
        "device": f"{device.platform} {device.device_kind}",
    }
