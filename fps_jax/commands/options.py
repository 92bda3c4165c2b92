"""What the commands that sample have in common: their options, the request these make, and the record of a run."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fps_jax.causal import CausalConfig
from fps_jax.choices import CausalPreset, Dtype, KVCacheFormat, check_fps, check_text, file_and_scale
from fps_jax.files import check_name, check_regular
from fps_jax.progress import Quiet
from fps_jax.sampling.request_fields import RequestFields

if TYPE_CHECKING:
    from fps_jax.config import WanConfig
    from fps_jax.sampling.pipeline import WanPipeline
    from fps_jax.sampling.request import Request

FILES = ("image", "last_image", "image_embeds", "latents")


@dataclass(frozen=True, kw_only=True)
class VideoOptions(RequestFields):
    """A checkpoint and the video to sample from it: a request's fields in a command line's types, and what goes with them."""

    model: Annotated[str, tyro.conf.Positional]
    """A converted checkpoint, an official or diffusers directory, or a Hugging Face repo id."""
    prompt: str
    """What the video shows."""
    negative_prompt: str | None = RequestFields.negative_prompt
    """What it should not show; the checkpoint's own default if left out, '' for nothing."""
    image: pathlib.Path | None = RequestFields.image
    """First frame (I2V, FLF2V): an image file, or .npy with floats in [0, 1] or uint8."""
    last_image: pathlib.Path | None = RequestFields.last_image
    """Last frame (FLF2V)."""
    image_embeds: pathlib.Path | None = RequestFields.image_embeds
    """Image-tower tokens as .npy, in place of those computed from the images."""
    seed: int = RequestFields.seed
    """Seed of the initial noise, and of the noise that lcm adds."""
    latents: pathlib.Path | None = RequestFields.latents
    """Initial noise as .npy, [1, 16, F, H/8, W/8], in place of the seed's."""
    schedule: pathlib.Path | None = RequestFields.schedule
    """Schedule as JSON, from fps-calibrate; if left out the checkpoint's own, or the default one."""
    dtype: Dtype = "bfloat16"
    """Compute dtype of the DiT and the text encoder."""
    fps: float = 16
    """Frames a second in the mp4 (Wan's models make 16); fractions too."""
    lora: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE[:SCALE] ...")] = ()
    """LoRA files (.safetensors, any trainer's) to merge into the DiT's weights, each with a scale; 1 if left out."""
    lora_partial: bool = False
    """Leave out what of a LoRA this model has no place for, in place of an error."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """A causal checkpoint, and how it makes its blocks."""

    model: Annotated[str, tyro.conf.Positional]
    """A checkpoint directory or a Hugging Face repo id."""
    preset: CausalPreset | None = None
    """How the model makes its blocks, where the checkpoint doesn't say."""
    window: int | None = None
    """Latent frames that a block attends, in place of the model's own."""
    sink: int | None = None
    """Of those, the first ones of the video, which stay."""
    first_frame_alone: bool = False
    """The first block has one frame, whatever the model says of it."""
    kv_cache: KVCacheFormat = "same"
    """What is kept of the frames so far: same, keys and values in the compute dtype; fp8, their codes and scales, half of bf16's
    bytes, and self-attention is then FP8 too."""
    height: int | None = None
    """Pixels, a multiple of 16; the checkpoint's own if left out, 480 for all of Wan's."""
    width: int | None = None
    """Pixels, a multiple of 16; the checkpoint's own if left out, 832 for Wan's."""
    seed: int = 0
    """Of all noise."""
    dtype: Dtype = "bfloat16"
    """Compute dtype of the DiT and the text encoder."""
    fps: float = 16
    """Frames a second of the video."""


def causal_config(options: StreamOptions, config: "WanConfig", own: CausalConfig | None = None) -> CausalConfig:
    """How a checkpoint of this config is to make its blocks. own: in place of what it says, where no preset is given.

    Raises: ValueError as `CausalConfig`, and where nothing says it.
    """
    from fps_jax.sampling.stream_plan import causal_of

    causal = causal_of(config, own if options.preset is None else options.preset)
    given = {name: getattr(options, name) for name in ("window", "sink") if getattr(options, name) is not None}
    if options.first_frame_alone:
        given["first_frame_alone"] = True
    return dataclasses.replace(causal, **given)


def check_output(*files: pathlib.Path, overwrite: bool) -> None:
    """Holds that a command's output can be written, before anything is loaded. files: all of it.

    Raises: ValueError for a name that a disk can't take; OSError for a folder that can't be written, and for a file that exists,
    unless it is to be overwritten.
    """
    check_name(max(files, key=lambda path: len(path.name)), "output")
    folder = files[0].absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"output folder {str(folder)!r} doesn't exist; make it first")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"output folder {str(folder)!r} can't be written; choose another --output")
    for path in files:
        if path.is_dir():
            raise IsADirectoryError(f"output={str(path)!r} is a folder; name a file")
        if path.exists() and not overwrite:
            raise FileExistsError(f"output={str(path)!r} exists; give another --output, or --overwrite")


def read_request(options: VideoOptions) -> "Request":
    """The request that the options describe, arrays read. To be called before a checkpoint is read, which can take minutes.

    Raises: OSError or ValueError for a file that can't be read; as `Request`; ValueError for a frame rate that no player has.
    """
    lora_files(options)
    arrays = {name: _array(options, name) for name in FILES}
    options.check_fields()
    from fps_jax.sampling.request import Request

    names = {f.name for f in dataclasses.fields(Request)} & {f.name for f in dataclasses.fields(options)}
    request = Request(**{name: getattr(options, name) for name in names} | arrays)
    for name, value in dataclasses.asdict(options).items():
        if isinstance(value, str | pathlib.Path):
            check_text(name, str(value))
    check_fps(options.fps)
    return request


def lora_files(options: VideoOptions) -> list[tuple[pathlib.Path, float]]:
    """The LoRA files with their scales. Raises ValueError or FileNotFoundError for one that is none."""
    files = [(pathlib.Path(file), scale) for file, scale in map(file_and_scale, options.lora)]
    for file, _ in files:
        if not file.exists():
            raise FileNotFoundError(f"lora={str(file)!r} doesn't exist; give a .safetensors file")
    return files


def load_pipeline(
    options: VideoOptions, request: "Request", check: Callable[["Request"], None] = lambda _: None
) -> "WanPipeline":
    """The checkpoint with the LoRAs merged; these and the request are checked in full before its weights are read, which can take
    minutes.

    check: what a command asks of the request beside, with the model's sizes filled in.
    """
    from fps_jax.checkpoints.open import open_lora, open_model
    from fps_jax.sampling.pipeline import WanPipeline

    model = open_model(options.model)
    request.resolve(model.config, model.schedule)
    check(request.filled(model.config))
    request.frames(model.config)  # read again later: one that is no image is told now
    request.check_tower(model.config, "image_encoder" in model.components)
    opened = [
        (open_lora(file, model.config, partial=options.lora_partial), scale) for file, scale in lora_files(options)
    ]
    if model.config.preset != "wan" and options.preset is None:
        from fps_jax.sampling.presets import PRESETS

        preset = model.config.preset
        print(f"this checkpoint is sampled by preset {preset}: {PRESETS[preset].words()}", file=Quiet(sys.stderr))
    pipe = WanPipeline.from_pretrained(model.directory, dtype=options.dtype, show_progress=True)
    for lora, scale in opened:
        print(f"{pipe.load_lora(lora, scale).summary} at scale {scale:g}", file=Quiet(sys.stderr))
    return pipe


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
        check_regular(path)
        # Mapped first: a header that claims more than the file holds is told before memory is asked for.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}={str(path)!r} doesn't exist") from None
    except OSError:
        raise
    except (
        Exception
    ) as error:  # NumPy parses headers as Python literals: SyntaxError, RecursionError, MemoryError and others
        raise ValueError(f"{name}={str(path)!r} is not a readable .npy array: {str(error)[:200]}") from None


def run_record(options: VideoOptions, request: "Request", pipe: Any) -> dict[str, Any]:
    """Everything that another run needs to make the same video: settings with defaults filled in, schedule, versions, device.

    request: of the options (`read_request`). pipe: the `WanPipeline` that sampled it.
    """
    import jax

    import fps_jax

    resolved = request.resolve(pipe.config, pipe.schedule)
    settings = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(options).items()}
    filled = request.filled(pipe.config)
    settings |= {name: getattr(filled, name) for name in ("height", "width", "num_frames", "size")}
    settings |= dataclasses.asdict(resolved.settings) | {
        "preset": resolved.preset,
        "flow_shift": resolved.flow_shift,
        "attention": resolved.attention,
    }
    if settings["negative_prompt"] is None:
        settings["negative_prompt"] = resolved.negatives[0]
    device = jax.local_devices()[0]
    return {
        "settings": settings,
        "task": pipe.config.task,
        "schedule": None if resolved.schedule is None else resolved.schedule.to_dict(),
        "versions": {"fps_jax": fps_jax.__version__, "jax": jax.__version__, "python": sys.version.split()[0]},
        "device": f"{device.platform} {device.device_kind}",
    }
