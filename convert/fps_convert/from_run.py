"""A run of fps-train as a checkpoint of our format, for the time of a conversion."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from fps_convert.lora.write import write_lora
from fps_convert.torch_to_flax import to_flax
from fps_jax.checkpoints.format import SCHEDULE, load_component, save_component
from fps_jax.checkpoints.open import open_model
from fps_jax.checkpoints.runs import Which, read_run
from fps_jax.files import new_directory
from fps_jax.models.params import flatten, unflatten


@contextlib.contextmanager
def run_as_checkpoint(
    src: str | os.PathLike, dst: str | os.PathLike, which: Which | None = None
) -> Iterator[pathlib.Path]:
    """A directory in our format: the model that the run started from, with the trained DiT, in the model's own dtypes.

    It lies beside `dst`, and is gone afterwards. What was not trained is linked where the model is ours, and converted where
    it isn't.
    Args:
      which: 'ema' or 'raw' weights; None for the moving average where there is one.
    Raises: FileNotFoundError or ValueError for a run without a checkpoint, or one whose model is gone.
    """
    run = read_run(src)
    trained = run.trained(which)
    opened = open_model(run.model)
    base = opened.directory
    parent = pathlib.Path(dst).expanduser().resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        temporary = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(suffix=".partial", dir=parent)))
        whole = temporary / "whole"
        if opened.layout == "run":
            base = stack.enter_context(run_as_checkpoint(base, temporary / "base"))
        if opened.layout in ("run", "ours"):
            whole.mkdir()
            for entry in base.iterdir():
                if entry.name not in ("dit", SCHEDULE):
                    (whole / entry.name).symlink_to(entry.resolve())
            params = load_component(base / "dit")
        else:
            to_flax(base, whole)
            params = load_component(whole / "dit")
            (whole / "dit").rename(temporary / "dit_before")
        if run.base != run.model:
            frozen = dict(flatten(open_model(run.base).load("dit", np.float32)))
            params = unflatten({path: np.asarray(frozen[path]).astype(leaf.dtype) for path, leaf in flatten(params)})
        save_component(whole / "dit", run.apply(params, trained))
        (whole / SCHEDULE).unlink(missing_ok=True)  # the base's own: the run's attention is another, or dense
        schedule = run.directory / SCHEDULE
        if schedule.is_file():
            (whole / SCHEDULE).symlink_to(schedule.resolve())
        yield whole


def write_run_lora(
    src: str | os.PathLike, dst: str | os.PathLike, which: Which | None = None, overwrite: bool = False
) -> pathlib.Path:
    """Writes a LoRA run's adapters as `dst/lora.safetensors`, and its schedule beside it. Returns the file.

    Raises: ValueError for a run that trains weights, not adapters.
    """
    run = read_run(src)
    if run.lora is None:
        raise ValueError(f"run {str(src)!r} trains weights, not adapters; leave --lora out, or pass --lora merged")
    trained = run.trained(which)
    config = open_model(run.model).config
    with new_directory(dst, overwrite=overwrite, sources=(src,)) as fresh:
        write_lora(fresh / "lora.safetensors", config, trained, run.lora)
        schedule = run.directory / SCHEDULE
        if schedule.is_file():
            (fresh / SCHEDULE).write_bytes(schedule.read_bytes())
    return pathlib.Path(dst) / "lora.safetensors"
