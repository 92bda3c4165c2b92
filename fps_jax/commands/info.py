"""fps-info: what a checkpoint is, and what memory it takes. jax is imported once the arguments are known to be right."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from fps_jax.errors import parse, run_cli


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a Wan2.1 checkpoint without loading its weights."""

    model: Annotated[str, tyro.conf.Positional]
    """A converted checkpoint, an official or diffusers directory, one with single files, or a Hugging Face repo id, of which no
    weights are downloaded."""
    height: int | None = None
    """Frame height that the memory estimate is for; the checkpoint's own if left out, 480 for all of Wan's."""
    width: int | None = None
    """Frame width that the memory estimate is for; the checkpoint's own if left out, 832 for Wan's."""
    num_frames: int | None = None
    """Frames that the memory estimate is for; the checkpoint's own if left out, 81 for Wan's."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-info."""
    sys.exit(run_cli(lambda args: _info(parse(Info, args, prog="fps-info")), argv))


def _info(options: Info) -> None:
    from fps_jax.sampling.describe import describe

    print(describe(options.model, options.height, options.width, options.num_frames))
