"""`fps-convert`: torch checkpoints to this project's format and back."""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fps_jax.choices import CausalPreset, ComfyDtype, LayoutName, WeightDtype, Which, choices, file_and_scale
from fps_jax.errors import parse, run_cli
from fps_jax.progress import waiting


@dataclass(frozen=True, kw_only=True)
class ToFlax:
    """Convert a Wan2.1 checkpoint from PyTorch to this project's format: a directory, single files, or a causal model's .pt with a
    directory for the rest of it."""

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SRC] DST")]
    """SRC: an official or diffusers directory, or one with single files in any tree; which it is goes by its content. Left out,
    where --dit, --vae and --text-encoder give the files. DST: the directory to write; it appears when it is whole."""

    base: str | None = None
    """SRC by name, where --dit and others give what is special: the directory for the parts that they don't."""

    dit: str | None = None
    """The diffusion transformer's .safetensors, such as ComfyUI's or Kijai's, FP8 or not, or a .pt of Self-Forcing's or CausVid's
    training; in place of SRC's."""

    root: str | None = None
    """Of a .pt that holds several models, such as generator, generator_ema and critic: which one. Left out: generator_ema, else
    generator, else model."""

    preset: CausalPreset | None = None
    """How a causal model makes its blocks, kept with the checkpoint: fps-stream then needs none."""

    vae: str | None = None
    """The VAE's file."""

    text_encoder: str | None = None
    """UMT5's file."""

    image_encoder: str | None = None
    """CLIP's file (I2V, FLF2V)."""

    tokenizer: str | None = None
    """The folder with UMT5's tokenizer.json or spiece.model; left out, what is in the text encoder's file, or in SRC."""

    dtype: WeightDtype | None = None
    """Cast the DiT, the text encoder and the image tower. Left out: each tensor keeps its dtype. The VAE always does."""

    lora: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE[:SCALE] ...")] = ()
    """LoRA files (.safetensors, any trainer's) to merge into the DiT's weights, each with a scale; 1 if left out."""

    lora_partial: bool = False
    """Leave out what of a LoRA this model has no place for, in place of an error."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""


@dataclass(frozen=True, kw_only=True)
class ToTorch:
    """Convert a checkpoint of this project to a directory that the official code or diffusers reads, to ComfyUI's files, or to
    Self-Forcing's .pt."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """A directory that `fps-convert to-flax` or `save_pretrained` wrote, or a run of fps-train."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """The directory to write, of self-forcing the .pt; it appears when it is whole."""

    layout: LayoutName | None = None
    """Whose file names and keys to write; not for --lora apart. self-forcing: the DiT alone, as its training writes it."""

    dtype: ComfyDtype | None = None
    """With --layout comfyui: cast all but the VAE; fp8_scaled writes the matrices of the DiT's blocks in FP8 with a scale each.
    Left out: as stored."""

    weights: Which | None = None
    """Of a run: the moving average, or the weights themselves; the average where there is one if left out."""

    lora: Literal["merged", "apart"] = "merged"
    """Of a run that trained a LoRA: the model with it merged, or apart: DST/lora.safetensors alone, which ComfyUI and diffusers
    load."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""


_PARTS = ("dit", "vae", "text_encoder", "image_encoder", "tokenizer")
Command = Annotated[ToFlax, tyro.conf.subcommand("to-flax")] | Annotated[ToTorch, tyro.conf.subcommand("to-torch")]


def _run(argv: list[str]) -> None:
    command = parse(
        Command,
        argv,
        prog="fps-convert",
        description="Wan2.1 checkpoints from PyTorch and back. --debug shows tracebacks.",
    )
    loras = [file_and_scale(text) for text in command.lora] if isinstance(command, ToFlax) else []
    src, dst = _src_and_dst(command)
    # Late: until here, JAX isn't imported, and a wrong argument is told at once. The accelerator has no part in this.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from fps_convert.report import summary
    from fps_convert.single_files import Given
    from fps_convert.torch_to_flax import to_flax

    if isinstance(command, ToFlax):
        files = (getattr(command, name) for name in _PARTS)
        with waiting("at work"):
            report = to_flax(
                src,
                dst,
                command.dtype,
                command.overwrite,
                given=Given(*files, root=command.root),
                loras=loras,
                lora_partial=command.lora_partial,
                preset=command.preset,
            )
        print(summary(report, f"report: {os.path.join(dst, 'audit.json')}"))
    else:
        _to_torch(command)


def _src_and_dst(command: ToFlax | ToTorch) -> tuple[str | None, str]:
    """Raises ValueError where one of them is missing."""
    if isinstance(command, ToTorch):
        _check_named({"SRC": command.src, "DST": command.dst})
        return command.src, command.dst
    _check_named(dict(zip(("SRC", "DST")[-len(command.paths) :], command.paths, strict=False)))
    _check_named({name: getattr(command, name) for name in ("base", *_PARTS)})
    if command.base is not None:
        if len(command.paths) != 1:
            raise ValueError(f"{len(command.paths)} paths were given with --base, which is SRC; give DST alone")
        return command.base, command.paths[0]
    if len(command.paths) == 2:
        return command.paths[0], command.paths[1]
    missing = [name for name in ("dit", "vae", "text_encoder") if getattr(command, name) is None]
    if len(command.paths) != 1:
        raise ValueError(
            f"{len(command.paths)} paths were given; give SRC and DST, or DST alone with --dit, --vae and --text-encoder"
        )
    if missing:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(
            f"only one path was given, and no {options}; give SRC (--base) and DST, or DST and files for all parts"
        )
    return None, command.paths[0]


def _check_named(paths: dict[str, str | None]) -> None:
    """Raises ValueError for an empty path, as an unset variable of a shell is, which would be the working directory."""
    for name, path in paths.items():
        if path is not None and not path.strip():
            raise ValueError(f"{name}={path!r} is empty; give a path")


def _to_torch(command: ToTorch) -> None:
    from fps_convert.flax_to_torch import to_torch
    from fps_convert.from_run import run_as_checkpoint, write_run_lora
    from fps_convert.report import summary
    from fps_jax.checkpoints.runs import is_run

    trained = is_run(command.src)
    if not trained and (command.weights is not None or command.lora == "apart"):
        what = "weights" if command.weights is not None else "lora"
        raise ValueError(f"--{what} was given, but {command.src} is no run of fps-train; leave it out")
    if command.lora == "apart":
        given = "layout" if command.layout is not None else "dtype" if command.dtype is not None else None
        if given is not None:
            raise ValueError(
                f"--{given} {getattr(command, given)} was given with --lora apart, a file that all layouts share; leave it out"
            )
        print(f"wrote {write_run_lora(command.src, command.dst, command.weights, command.overwrite)}")
        return
    if command.layout is None:
        raise ValueError(f"--layout is missing; whose file names and keys to write: one of {choices(LayoutName)}")
    opened = run_as_checkpoint(command.src, command.dst, command.weights) if trained else nullcontext(command.src)
    with waiting("at work"), opened as src:
        report = to_torch(src, command.dst, command.layout, command.overwrite, dtype=command.dtype)
    print(summary(report, f"report: {report['report']}"))


def main(argv: list[str] | None = None) -> None:
    """Entry point of `fps-convert`."""
    sys.exit(run_cli(_run, argv))


if __name__ == "__main__":
    main()
