"""Training runs as checkpoints: what a run's folder says of itself, and its weights in place of the model's that it started from.

RUN/run.json, RUN/config.toml, RUN/fps_schedule.json and RUN/checkpoints/<step>/{params, ema, optimizer, meta}. `params` and `ema`
are components in the sense of `checkpoints.format`: all of a DiT, the part of it that was trained, or its adapters.
"""

import os
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fps_jax.checkpoints.format import load_component
from fps_jax.choices import Which
from fps_jax.files import read_json
from fps_jax.models.lora import LoRAConfig, merge_lora
from fps_jax.models.params import Params, flatten, unflatten

FORMAT = "fps_train"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder.

    Attributes:
      directory: where it lies.
      model: the checkpoint that it is of, a directory or a Hugging Face repository: VAE, encoders and DiT.
      base: the checkpoint whose DiT the weights that aren't trained are of: the model, or what `--init-from` named.
      lora: of its adapters; None where it trains weights.
    """

    directory: pathlib.Path
    model: str
    base: str
    lora: LoRAConfig | None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising. A checkpoint has its name only when it is whole."""
        folder = self.directory / "checkpoints"
        if not folder.is_dir():
            return []
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())

    def trained(
        self, which: Which | None = None, step: int | None = None, *, shardings: Params | None = None
    ) -> Params:
        """The trained parameters of a checkpoint, float32. Other arguments and errors as for `trained_folder`.

        shardings: of all of the base's parameters, nested as they are: trained weights are read into them. None, and for adapters,
        which are small: NumPy arrays.
        """
        folder = self.trained_folder(which, step)
        if shardings is None or self.lora is not None:
            return load_component(folder)
        where = dict(flatten(shardings))

        def sharding(path: str) -> Any:
            if path not in where:
                raise self._not_in_base(path)
            return where[path]

        return load_component(folder, shardings=sharding)

    def trained_folder(self, which: Which | None = None, step: int | None = None) -> pathlib.Path:
        """The orbax directory that holds them.

        Args:
          which: 'ema', the moving average, or 'raw'; None for the average where there is one.
          step: of the checkpoint; None for the newest.
        Raises: FileNotFoundError or ValueError for a checkpoint, or an average, that isn't there.
        """
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(
                f"run {str(self.directory)!r} has no checkpoint yet; its first comes after checkpoint.every steps"
            )
        if step is None:
            step = steps[-1]
        if step not in steps:
            have = ", ".join(map(str, steps))
            raise FileNotFoundError(f"run {str(self.directory)!r} has no checkpoint of step {step}; it has {have}")
        folder = self.directory / "checkpoints" / str(step)
        has_ema = (folder / "ema").is_dir()
        if which == "ema" and not has_ema:
            raise ValueError(
                f"run {str(self.directory)!r} keeps no moving average (optimizer.ema = 0); take the raw weights"
            )
        return folder / ("params" if which == "raw" or not has_ema else "ema")

    def apply(self, base: Params, trained: Params) -> Params:
        """The base DiT with what was trained in place, leaf by leaf in the base's dtypes."""
        if self.lora is not None:
            return merge_lora(base, trained, self.lora)
        leaves = dict(flatten(base))
        for path, leaf in flatten(trained):
            if path not in leaves or leaves[path].shape != leaf.shape:
                raise self._not_in_base(path, leaf.shape)
            like = leaves[path]
            own = leaf.astype(like.dtype)
            leaves[path] = own if isinstance(like, np.ndarray) else jax.device_put(own, like.sharding)
        return unflatten(leaves)

    def _not_in_base(self, path: str, shape: tuple[int, ...] | None = None) -> ValueError:
        size = "" if shape is None else f" {list(shape)}"
        return ValueError(f"{self.directory} trained {path!r}{size}, which {self.base} doesn't have")


def is_run(path: str | os.PathLike) -> bool:
    """Whether `path` is the folder of a run."""
    try:
        return read_json(pathlib.Path(path) / "run.json").get("format") == FORMAT
    except (OSError, ValueError):
        return False


def read_run(path: str | os.PathLike) -> Run:
    """Reads run.json. Raises ValueError where it is of another version or isn't whole."""
    directory = pathlib.Path(path)
    content = read_json(directory / "run.json", "start the run anew")
    if content.get("version") != VERSION:
        raise ValueError(f"{directory} is a run of version {content.get('version')!r}, this release reads {VERSION}")
    try:
        lora = None if content["lora"] is None else LoRAConfig(
            **{**content["lora"], "targets": tuple(content["lora"]["targets"])}
        )  # fmt: skip
        return Run(directory=directory, model=str(content["model"]), base=str(content["base"]), lora=lora)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory}/run.json is not what fps-train writes ({error}); start the run anew") from None
