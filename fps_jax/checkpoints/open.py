"""The door to checkpoints: ours, one in a torch layout, or a Hugging Face repository. Behind it, nobody asks which it was.

The only module of fps_jax that imports the converter, and only for a checkpoint that isn't ours, or a LoRA file.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fps_jax.attention.schedule import FPSSchedule
from fps_jax.checkpoints import hub
from fps_jax.checkpoints.format import SCHEDULE, abstract_component, is_checkpoint, read_config
from fps_jax.checkpoints.lora import LoRA
from fps_jax.checkpoints.placement import builds, place, place_shards, restore
from fps_jax.checkpoints.runs import Which, is_run, read_run
from fps_jax.config import Component, WanConfig
from fps_jax.models.params import Params, flatten

if TYPE_CHECKING:
    from fps_convert.source import Source


class Load(Protocol):
    """Reads a component: load(name, dtype, shardings).

    dtype: of the DiT and the text encoder; what else there is has its own.
    shardings: nested as the parameters are: each is read straight into its shards. None: to the devices that sampling wants.
    """

    def __call__(self, name: Component, dtype: Any, shardings: Params | None = None) -> Params: ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint that was opened: its config is known, none of its weights were read.

    Attributes:
      directory: where it lies.
      layout: 'ours', 'run' for a run of fps-train, or the torch layout's name.
      config: the architecture.
      components: those that it has.
      tokenizer_dir: the folder that holds tokenizer.json or spiece.model.
      stored_dtypes: stored_dtypes() is the dtype of every parameter, by component and path, as the files hold it.
      load: load(name, dtype) is a component's parameters.
      schedule: that it was trained with; None for dense.
      notes: what a person should know of how it was read: files left out, FP8, a guess.
    """

    directory: pathlib.Path
    layout: str
    config: WanConfig
    components: tuple[Component, ...]
    tokenizer_dir: pathlib.Path
    stored_dtypes: Callable[[], dict[Component, dict[str, np.dtype]]]
    load: Load
    schedule: FPSSchedule | None = None
    notes: tuple[str, ...] = ()


def open_model(path: str | os.PathLike) -> Model:
    """Opens a directory, or 'owner/name' of a Hugging Face repository, which is downloaded into Hugging Face's own cache.

    A run of fps-train is the model that it started from with the weights of its newest checkpoint: their moving average, where it
    keeps one.
    Raises: FileNotFoundError, ValueError or NotImplementedError in one line: missing, damaged, or not a Wan2.1 checkpoint.
    """
    directory = resolve_checkpoint(path)
    if is_run(directory):
        return open_run(directory)
    model = _ours(directory) if _is_ours(directory) else _theirs(directory)
    return dataclasses.replace(model, schedule=_schedule(directory))


def open_run(directory: pathlib.Path, which: Which | None = None) -> Model:
    """Opens a run of fps-train. which: 'ema' or 'raw' weights; None for the average where there is one. Raises as `open_model`."""
    run = read_run(directory)
    model = open_model(run.model)
    base = model if run.base == run.model else open_model(run.base)
    run.trained_folder(which)  # that there is one is known now

    def load(name: Component, dtype: Any, shardings: Params | None = None) -> Params:
        if name != "dit":
            return model.load(name, dtype, shardings)
        return run.apply(base.load(name, dtype, shardings), run.trained(which, shardings=shardings))

    return dataclasses.replace(model, directory=directory, layout="run", load=load, schedule=_schedule(directory))


def _schedule(directory: pathlib.Path) -> FPSSchedule | None:
    file = directory / SCHEDULE
    return FPSSchedule.load(file) if file.is_file() else None


def _is_ours(directory: pathlib.Path) -> bool:
    """Whether to read a directory as our format. One that only looks like it gets our reader's error, not the converter's."""
    return is_checkpoint(directory) or (directory / "dit").is_dir()


def _ours(directory: pathlib.Path) -> Model:
    config = read_config(directory)
    models = builds(config)
    components: tuple[Component, ...] = tuple(
        name for name in models if name != "image_encoder" or (directory / name).is_dir()
    )
    return Model(
        directory=directory,
        layout="ours",
        config=config,
        components=components,
        tokenizer_dir=directory / "tokenizer",
        stored_dtypes=lambda: {
            name: {path: np.dtype(leaf.dtype) for path, leaf in flatten(abstract_component(directory / name))}
            for name in components
        },
        load=lambda name, dtype, shardings=None: restore(directory / name, models[name], dtype, shardings),
    )


def open_model_files(
    *,
    dit: str | os.PathLike,
    vae: str | os.PathLike,
    text_encoder: str | os.PathLike,
    image_encoder: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    root: str | None = None,
) -> Model:
    """Opens single files, such as ComfyUI's, one for each component; tokenizer: its folder, where no file holds it.

    root: of a DiT's .pt that holds several state dicts under names, the one to read; None for the moving average, if it has one.
    Raises: FileNotFoundError, ValueError or NotImplementedError in one line: missing, damaged, something else, not Wan2.1.
    """
    from fps_convert import open_checkpoint
    from fps_convert.single_files import Given

    return _of_source(open_checkpoint(None, Given(dit, vae, text_encoder, image_encoder, tokenizer, root)))


def _theirs(directory: pathlib.Path) -> Model:
    from fps_convert import open_checkpoint

    return _of_source(open_checkpoint(directory))


def _of_source(source: "Source") -> Model:
    models = builds(source.config)

    def load(name: Component, dtype: Any, shardings: Params | None = None) -> Params:
        if shardings is None:
            return place(name, source.load(name), dtype)
        return place_shards(name, functools.partial(source.read, name), models[name], dtype, shardings)

    on_parts = [f"{name}: {note}" for name, part in source.parts.items() for note in part.notes]
    return Model(
        notes=(*source.audit["notes"], *on_parts),
        directory=source.path,
        layout=source.layout,
        config=source.config,
        components=source.components,
        tokenizer_dir=source.tokenizer_dir,
        stored_dtypes=lambda: {name: source.stored_dtypes(name) for name in source.components},
        load=load,
    )


def open_lora(path: str | os.PathLike, config: WanConfig, *, partial: bool = False) -> LoRA:
    """Opens a LoRA file in any spelling of its keys, checked against a model of this config.

    Args:
      partial: leave out what this model has no place for, in place of an error.
    Raises: FileNotFoundError, ValueError or NotImplementedError in one line: missing, damaged, a pickle, or for another model.
    """
    from fps_convert.lora.read import open_lora as read

    return read(path, config, partial=partial)


def resolve_checkpoint(path: str | os.PathLike) -> pathlib.Path:
    """A local directory as it is; 'owner/name' downloaded from the Hugging Face hub, the files of a Wan2.1 checkpoint only.

    Raises: as `open_model`; of a repository that isn't supported, no weights are downloaded.
    """
    directory = _local(path)
    if directory is not None:
        return directory
    from fps_convert.remote import judge

    return hub.fetch(str(path), judge)


def _local(path: str | os.PathLike) -> pathlib.Path | None:
    """A local directory; None for 'owner/name'. Raises NotADirectoryError or FileNotFoundError for neither."""
    directory = pathlib.Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise NotADirectoryError(
            f"checkpoint {str(path)!r} is a file; pass the directory that holds it, or files for all parts to from_files, or "
            "convert it with fps-convert to-flax --base DIR --dit FILE"
        )
    if not hub.is_repository(str(path)):
        raise FileNotFoundError(
            f"checkpoint {str(path)!r} doesn't exist; pass a directory, or 'owner/name' of a Hugging Face repository"
        )
    return None


def open_description(path: str | os.PathLike) -> Model:
    """As `open_model`, for what is said of a checkpoint: of a repository, the JSON files are fetched and no weights.

    Its `stored_dtypes` then has none, its config is what the JSON files say, and it can't be loaded.
    """
    if _local(path) is not None:
        return open_model(path)
    from fps_convert.remote import judge

    folder, names = hub.listing(str(path))
    if is_checkpoint(folder):
        layout, config = "ours", read_config(folder)
    else:
        repository = judge(folder, names, str(path), hub.tensor_names(str(path)))
        layout, config = repository.layout.name, repository.config

    def load(name: Component, dtype: Any, shardings: Params | None = None) -> Params:
        raise ValueError(f"{path}: the weights of {name} were not downloaded; open it with open_model")

    return Model(
        directory=pathlib.Path(path),
        layout=layout,
        config=config,
        components=tuple(name for name in builds(config)),
        tokenizer_dir=folder / "tokenizer",
        stored_dtypes=dict,
        load=load,
    )
