"""fps-train-vae: trains a small VAE from a folder of clips. jax is imported once the arguments are known to be right."""

import dataclasses
import json
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

from fps_jax.config import DiTConfig, VAEConfig, WanConfig
from fps_jax.errors import parse, run_cli
from fps_jax.files import check_folder, read_json, write_json
from fps_jax.progress import waiting
from fps_jax.sizes import check_frame
from fps_train.vae_options import VAETraining

_OPTIONS, _CHECKPOINT = "options.json", "checkpoint"
_SIZES = {"base_dim": 512, "z_dim": 256, "num_res_blocks": 16}  # several times Wan's 96, 16 and 2
_FREE = {"resume", "output", "log_every", "max_gib"}  # a resumed run may have others of these


@dataclass(frozen=True, kw_only=True)
class TrainVAE(VAETraining):
    """Train a small VAE on clips: on single frames first (--frames 1), then on stretches of clips from there (--init-from).

    Clips are decoded into memory once, as fps-precompute does it: at 16 frames a second, covering the size, cropped.
    OUTPUT/checkpoint is the trained VAE, with latents_mean and latents_std as measured on the clips; beside it metrics.jsonl,
    options.json and state/, from which --resume goes on.
    """

    videos: pathlib.Path | None = None
    """Folder of clips and images, searched with its subfolders. With a metadata.csv, .json or .jsonl in it, those named there."""
    captions: pathlib.Path | None = None
    """Table (.csv, .json, .jsonl) of clips, as for fps-precompute; captions may be empty."""
    output: pathlib.Path
    """Folder of the run: new or empty, or with --resume an earlier run's."""
    init_from: pathlib.Path | None = None
    """Run or checkpoint to start from; its sizes are used. A VAE of images is one of video that codes every fourth frame."""
    resume: bool = False
    """Go on with the run in OUTPUT; the other options must be those that it was started with."""
    base_dim: int | None = None
    """Width; 8 where it isn't said by --init-from."""
    z_dim: int | None = None
    """Latent channels; 6 where it isn't said by --init-from."""
    num_res_blocks: int | None = None
    """Residual blocks a stage; 2, as Wan's, where it isn't said by --init-from."""
    frames: int = 1
    """1: every frame of every clip is an image. 4k + 1: every stretch of so many frames is a clip."""
    size: tuple[int, int] = (64, 64)
    """Height and width in pixels, multiples of 16."""
    max_gib: float = 4.0
    """The most memory that decoded frames may take."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-train-vae."""
    sys.exit(run_cli(lambda args: _train(parse(TrainVAE, args, prog="fps-train-vae")), argv))


def _train(given: TrainVAE) -> None:
    _check_sizes(given)
    _check_output(given)
    from fps_jax.compilation import enable_compilation_cache
    from fps_train import vae
    from fps_train.precompute.buckets import Size
    from fps_train.precompute.memory import load_stretches

    names = [field.name for field in dataclasses.fields(VAETraining)]
    options = VAETraining(**{name: getattr(given, name) for name in names})
    config, start = _start(given)
    enable_compilation_cache()
    max_bytes = int(given.max_gib * 2**30)
    clips = load_stretches(
        given.videos, given.captions, Size(*given.size, given.frames), max_bytes=max_bytes, tell=_tell
    )
    given.output.mkdir(parents=True, exist_ok=True)
    if not given.resume:
        write_json(_record(given), given.output / _OPTIONS)
    with waiting("start"):  # the first compiles
        params = start()
    params = vae.train(config.vae, options, params, clips, given.output, tell=_tell, show=True)

    from fps_jax.checkpoints.format import save_checkpoint

    with waiting("measure"):
        found = vae.measure(config.vae, params, clips, given.batch_size)
    if given.train == "all":  # else latents are what they were, and so must be what they are normalised by
        statistics = dataclasses.replace(config.vae, latents_mean=found.mean, latents_std=found.std)
        config = dataclasses.replace(config, vae=statistics)
    save_checkpoint(given.output / _CHECKPOINT, config, {"vae": params}, overwrite=True)
    print(
        f"wrote {given.output / _CHECKPOINT}: {given.steps} steps, PSNR {found.psnr:.1f} dB without noise, latents_std "
        f"{min(config.vae.latents_std):.2f} to {max(config.vae.latents_std):.2f}"
    )


def _check_sizes(given: TrainVAE) -> None:
    check_frame(*given.size, given.frames, names=("size: height ", "size: width ", "frames="))
    if given.train == "decoder" and given.init_from is None:
        raise ValueError("train='decoder' needs a VAE whose encoder stays; give it with --init-from")
    for name, most in _SIZES.items():
        value = getattr(given, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name}={value} is not in 1 to {most}")
    if not 0 < given.max_gib <= 1024:
        raise ValueError(f"max_gib={given.max_gib} is not above 0, up to 1024")


def _record(given: TrainVAE) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(given), default=str))


def _check_output(given: TrainVAE) -> None:
    file = given.output / _OPTIONS
    check_folder(given.output, "output")
    if not given.resume:
        if given.output.exists() and any(given.output.iterdir()):
            raise FileExistsError(
                f"output={str(given.output)!r} is not empty; give another folder, or --resume to go on with it"
            )
        return
    if not file.exists():
        raise FileNotFoundError(f"output={str(given.output)!r} holds no run to --resume; leave it out to start one")
    before, now = read_json(file, "a run writes its own; start another in a new folder"), _record(given)
    for name in sorted(now.keys() - _FREE):
        if before.get(name) != now[name]:
            raise ValueError(
                f"{name}={now[name]!r}, but the run in {str(given.output)!r} has {before.get(name)!r}; give that, or another folder"
            )


def _start(given: TrainVAE) -> tuple[WanConfig, Any]:
    """The config, and a function that gives the parameters to start from."""
    if given.init_from is None:
        import jax

        from fps_jax.models.init import init_vae_for_training

        z = given.z_dim or 6
        config = VAEConfig(
            base_dim=given.base_dim or 8,
            z_dim=z,
            num_res_blocks=given.num_res_blocks or 2,
            latents_mean=(0.0,) * z,
            latents_std=(1.0,) * z,
        )
        # Nobody's yet: the smallest DiT that takes these latents stands in until one is trained.
        dit = DiTConfig(
            task="t2v", dim=128, mlp_dim=256, num_heads=4, num_layers=4, text_dim=64, in_channels=z, out_channels=z
        )
        return WanConfig(dit=dit, vae=config), lambda: init_vae_for_training(config, jax.random.key(given.seed))
    from fps_jax.checkpoints.open import open_model

    source = given.init_from
    if (source / _OPTIONS).is_file():  # a run of this command
        source = source / _CHECKPOINT
        if not source.is_dir():
            raise ValueError(f"init_from={str(given.init_from)!r} has not finished; --resume it first")
    model = open_model(source)
    for name in ("base_dim", "z_dim", "num_res_blocks"):
        wanted, there = getattr(given, name), getattr(model.config.vae, name)
        if wanted not in (None, there):
            raise ValueError(f"{name}={wanted}, but {given.init_from} has {there}; leave it out, or train from scratch")
    return model.config, lambda: model.load("vae", "float32")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
