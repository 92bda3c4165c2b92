"""`fps-convert`: torch checkpoints to this project's format and back."""

import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fps_convert.formats.readers import Dtype
from fps_convert.layouts import LayoutName
from fps_jax.choices import file_and_scale
from fps_jax.errors import parse, run_cli


@dataclass(frozen=True, kw_only=True)
class ToFlax:
    """Convert an official or diffusers Wan2.1 directory to this project's format."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """The official or diffusers directory; which one it is goes by its content."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """The directory to write; it appears when it is whole."""

    dtype: Dtype | None = None
    """Cast the DiT, the text encoder and the image tower. Left out: each tensor keeps its dtype. The VAE always does."""

    lora: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE[:SCALE] ...")] = ()
    """LoRA files (.safetensors, any trainer's) to merge into the DiT's weights, each with a scale; 1 if left out."""

    lora_partial: bool = False
    """Leave out what of a LoRA this model has no place for, in place of an error."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""


@dataclass(frozen=True, kw_only=True)
class ToTorch:
    """Convert a checkpoint of this project to a directory that the official code or diffusers reads."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """A directory that `fps-convert to-flax` or `save_pretrained` wrote, or a run of fps-train."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """The directory to write; it appears when it is whole."""

    layout: LayoutName | None = None
    """Whose file names and keys to write; not for --lora apart."""

    weights: Literal["ema", "raw"] | None = None
    """Of a run: the moving average, or the weights themselves; the average where there is one if left out."""

    lora: Literal["merged", "apart"] = "merged"
    """Of a run that trained a LoRA: the model with it merged, or apart: DST/lora.safetensors alone, which ComfyUI and diffusers
    load."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""


Command = Annotated[ToFlax, tyro.conf.subcommand("to-flax")] | Annotated[ToTorch, tyro.conf.subcommand("to-torch")]


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def _run(argv: list[str]) -> None:
    command = parse(
        Command,
        argv,
        prog="fps-convert",
        description="Wan2.1 checkpoints from PyTorch and back. --debug shows tracebacks.",
    )
    loras = [file_and_scale(text) for text in command.lora] if isinstance(command, ToFlax) else []
    # Late: until here, JAX isn't imported, and a wrong argument is told at once. The accelerator has no part in this.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from fps_convert.report import summary
    from fps_convert.torch_to_flax import to_flax

    if isinstance(command, ToFlax):
        report = to_flax(
            command.src, command.dst, command.dtype, command.overwrite, loras=loras, lora_partial=command.lora_partial
        )
        print(summary(report, f"report: {os.path.join(command.dst, 'audit.json')}"))
    else:
        _to_torch(command)


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
        if command.layout is not None:
            raise ValueError(
                f"--layout {command.layout} was given with --lora apart, a file that all layouts share; leave it out"
            )
        print(f"wrote {write_run_lora(command.src, command.dst, command.weights, command.overwrite)}")
        return
    if command.layout is None:
        raise ValueError("--layout is missing; whose file names and keys to write: official or diffusers")
    with run_as_checkpoint(command.src, command.dst, command.weights) if trained else nullcontext(command.src) as src:
        report = to_torch(src, command.dst, command.layout, command.overwrite)
    print(summary(report, f"report: {report['report']}"))


def main(argv: list[str] | None = None) -> None:
    """Entry point of `fps-convert`."""
    if argv is None:  # a process of its own
        signal.signal(signal.SIGTERM, _interrupt)  # so that nothing half-written stays
    sys.exit(run_cli(_run, argv))


if __name__ == "__main__":
    main()
