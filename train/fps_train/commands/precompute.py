"""fps-precompute: clips and captions to the latents and text states that fps-train reads."""

import pathlib
import re
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from fps_jax.choices import Dtype
from fps_jax.errors import parse, run_cli


@dataclass(frozen=True, kw_only=True)
class Precompute:
    """Encode clips and captions once, for training.

    Clips are decoded, brought to 16 frames a second by their timestamps, cut to the largest 4k+1 frames that are there, resized to
    cover the frame and cropped around its centre. A table says what becomes of every clip before anything is encoded. Run it again
    after it was stopped: what is whole is found again. Captions that changed are encoded alone.

    Several processes share the work, on one machine or on many with one file system: start each with the same options and
    --worker 0/4, 1/4, 2/4, 3/4. Each looks at, tells and encodes its own quarter of the clips; the data can be opened when all
    are done.

    fps-precompute --check DATA reads data back instead.
    """

    model: Annotated[str | None, tyro.conf.Positional] = None
    """The checkpoint whose encoders are used: converted, official or diffusers directory, or a Hugging Face repo id."""
    videos: pathlib.Path | None = None
    """Folder of clips, each with a .txt of the same stem beside it; or with a metadata.csv, .json or .jsonl in it."""
    captions: pathlib.Path | None = None
    """Table (.csv, .json, .jsonl) with video_path, file_name or video, relative to it, and caption, text or prompt."""
    output: pathlib.Path | None = None
    """The folder to write."""
    height: int = 480
    """Pixels, a multiple of 16."""
    width: int = 832
    """Pixels, a multiple of 16."""
    num_frames: int = 81
    """4k + 1: the most frames of a clip that are used. A shorter one keeps the largest 4k + 1 that is there."""
    buckets: tuple[str, ...] = ()
    """Fixed sizes in place of these three, as in 480x832x81 832x480x81 480x832x1. A clip goes where most of it is kept."""
    min_frames: int = 5
    """Shorter videos are dropped. Images count as one frame, and are kept for t2v."""
    fps: int = 16
    """Frames a second. Wan's models make 16."""
    validation_prompts: pathlib.Path | None = None
    """Text file with one prompt a line, to sample during training; for i2v and flf2v each with its image files after tabs.
    If left out, captions of the clips that are held out first serve."""
    worker: str = "0/1"
    """Which of several workers this one is, counted from 0."""
    dtype: Dtype = "bfloat16"
    """Compute dtype of the text encoder. The VAE and the image tower are float32 always."""
    vae_tiling: bool = False
    """Encode in spatial tiles, for little memory. Not the same numbers."""
    shard_mib: int = 128
    """A shard is closed when it has so many MiB. A killed run loses the open one."""
    replace: bool = False
    """Let data of another size or VAE take the place of what the output holds."""
    dry_run: bool = False
    """Print the table and stop. Nothing is written."""
    check: pathlib.Path | None = None
    """Read this folder of data back, every record, and say what is in it."""
    contact_sheet: pathlib.Path | None = None
    """With --check and the model: a .png of decoded latents beside the clips' frames."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-precompute."""
    sys.exit(run_cli(lambda args: _precompute(parse(Precompute, args, prog="fps-precompute")), argv))


def _precompute(options: Precompute) -> None:
    if options.check is not None:
        _check(options)
        return
    if options.contact_sheet is not None:
        raise ValueError("contact_sheet shows data that are there; name them with --check DATA")
    for name in ("model", "output"):
        if getattr(options, name) is None:
            flag = "MODEL" if name == "model" else "--output DATA"
            raise ValueError(f"{name} is missing; fps-precompute MODEL --videos DIR --output DATA needs {flag}")
    assert options.model is not None
    assert options.output is not None
    worker = _worker(options.worker)
    for name, least, most in (("fps", 1, 240), ("min_frames", 1, 100_000), ("shard_mib", 1, 100_000)):
        if not least <= getattr(options, name) <= most:
            raise ValueError(f"{name}={getattr(options, name)} is not in {least} to {most}")
    from fps_jax.compilation import enable_compilation_cache
    from fps_jax.sizes import check_frame
    from fps_train.precompute.buckets import Size
    from fps_train.precompute.run import Recipe, precompute

    if options.buckets:
        sizes = tuple(dict.fromkeys(map(Size.parse, options.buckets)))
    else:
        check_frame(options.height, options.width, options.num_frames)
        sizes = (Size(options.height, options.width, options.num_frames),)
    enable_compilation_cache()
    precompute(
        Recipe(
            model=options.model,
            videos=options.videos,
            captions=options.captions,
            output=options.output,
            sizes=sizes,
            exact=bool(options.buckets),
            min_frames=options.min_frames,
            fps=options.fps,
            validation_prompts=options.validation_prompts,
            worker=worker,
            dtype=options.dtype,
            vae_tiling=options.vae_tiling,
            shard_bytes=options.shard_mib << 20,
            replace=options.replace,
            dry_run=options.dry_run,
        )
    )


def _worker(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"worker={text!r} is not i/n with i below n, as in 0/4 for the first of four")
    return int(match[1]), int(match[2])


def _check(options: Precompute) -> None:
    assert options.check is not None
    if options.contact_sheet is not None:
        if options.model is None:
            raise ValueError(
                "contact_sheet needs the checkpoint whose VAE decodes: fps-precompute MODEL --check DATA ..."
            )
        if options.contact_sheet.suffix.lower() != ".png":
            raise ValueError(f"contact_sheet={str(options.contact_sheet)!r} must end in .png")
        if not options.contact_sheet.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"contact_sheet: folder {str(options.contact_sheet.absolute().parent)!r} doesn't exist"
            )
    from fps_jax.compilation import enable_compilation_cache
    from fps_train.precompute.check import check, contact_sheet

    enable_compilation_cache()
    print(check(options.check))
    if options.contact_sheet is not None and options.model is not None:
        contact_sheet(options.check, options.model, options.contact_sheet)
        print(f"wrote {options.contact_sheet}")
