"""The demo's two models from the claim's runs: whole checkpoints in the diffusers layout, bf16, with schedule and sizes.

    python -m benchmarks.claim.export outputs/claim fps_jax/demo_models

writes dense (row a) and fps (row e) below the second folder, in place of what is there.
"""

import pathlib
import sys
import tempfile
from dataclasses import dataclass
from typing import Annotated

import tyro

from fps_jax.errors import parse, run_cli

RUNS = {"dense": "dense", "fps": "recover_e0"}  # demo model -> run inside the claim's folder
DTYPE = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the demo's models."""

    folder: Annotated[pathlib.Path, tyro.conf.Positional]
    """The claim's folder."""
    output: Annotated[pathlib.Path, tyro.conf.Positional]
    """Folder of the demo's models."""


def export(run: pathlib.Path, output: pathlib.Path) -> None:
    """A run's newest weights (their moving average) and its encoders, every number rounded to bf16."""
    import jax
    import jax.numpy as jnp

    from fps_convert.flax_to_torch import to_torch
    from fps_jax.checkpoints.format import save_checkpoint
    from fps_jax.checkpoints.open import open_model

    model = open_model(run)
    parts = {
        name: jax.device_get(jax.tree.map(lambda a: jnp.asarray(a, jnp.dtype(DTYPE)), model.load(name, "float32")))
        for name in model.components
    }
    with tempfile.TemporaryDirectory() as folder:
        ours = pathlib.Path(folder) / "ours"
        save_checkpoint(ours, model.config, parts, tokenizer_dir=model.tokenizer_dir, schedule=model.schedule)
        to_torch(ours, output, "diffusers", overwrite=True)
    output.with_name(f"{output.name}.audit.json").unlink()


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    sys.exit(run_cli(_main, argv))


def _main(arguments: list[str]) -> None:
    options = parse(Export, arguments, prog="python -m benchmarks.claim.export")
    for run in RUNS.values():
        if not (options.folder / run).is_dir():
            raise FileNotFoundError(f"folder={str(options.folder)!r} has no {run}; run the claim's stages first")
    for name, run in RUNS.items():
        export(options.folder / run, options.output / name)
        size = sum(file.stat().st_size for file in (options.output / name).rglob("*") if file.is_file())
        print(f"wrote {options.output / name} of {options.folder / run}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
