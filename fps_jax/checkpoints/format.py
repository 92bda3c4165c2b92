"""Checkpoints on disk: `config.json`, one orbax directory per component, `tokenizer/`, `audit.json`.

A path either holds all of a checkpoint or is untouched: see `files.new_directory`.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fps_jax.attention.schedule import FPSSchedule
from fps_jax.checkpoints.writes import orbax_writes, quiet_orbax
from fps_jax.config import COMPONENTS, WanConfig
from fps_jax.files import MAX_JSON, check_regular, check_space, new_directory, read_json
from fps_jax.models.params import Params, flatten, unflatten

FORMAT = "fps_jax"
VERSION = 1
SAMPLING = "fps_sampling.json"  # beside one of a torch layout: `SamplingDefaults`, where they aren't Wan's
SCHEDULE = "fps_schedule.json"  # beside a checkpoint of any layout: the schedule that it was trained with
_TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_IN_FLIGHT_GB = 1  # orbax's default, 96 GB, would let a read double the component in memory


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that XLA's CPU client can take over without a copy (64-byte aligned)."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether `path` is a directory in this format."""
    try:
        return _read(pathlib.Path(path)).get("format") == FORMAT
    except (OSError, ValueError):
        return False


def _read(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path / "config.json", "convert the checkpoint again")


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """All of config.json: `format`, `version`, `config`, `components`, and what the converter noted for the way back.

    Raises: FileNotFoundError or ValueError, naming the path, where this is no checkpoint of this format and version.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist; give a directory that fps-convert to-flax wrote")
    if not is_checkpoint(path):
        with contextlib.suppress(OSError):
            _read(path)  # a corrupt config.json is the better message
        raise ValueError(f"{path} is not a checkpoint of this project; make one with fps-convert to-flax SRC DST")
    manifest = _read(path)
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {manifest.get('version')!r}, this release reads {VERSION}; convert it again"
        )
    return manifest


def read_config(path: str | os.PathLike) -> WanConfig:
    """The model's config. Raises as `read_manifest`, and ValueError for unknown or missing fields."""
    manifest = read_manifest(path)
    try:
        if not isinstance(manifest.get("config"), dict):
            raise ValueError("it has no object 'config'")
        return WanConfig.from_dict(manifest["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}/config.json doesn't describe a Wan model ({error}); convert the checkpoint again"
        ) from None


def write_config(path: pathlib.Path, config: WanConfig, **notes: Any) -> None:
    """Writes config.json; `notes` are kept beside the config."""
    manifest = {"format": FORMAT, "version": VERSION, "config": config.to_dict(), **notes}
    (path / "config.json").write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def _handler(largest: int = 0):
    """`largest`: bytes of the largest parameter, which has to fit into what may be in flight."""
    ocp = quiet_orbax()
    # Compression off: zstd gains 0.1% on weights and halves the speed. OCDBT off: it costs a third of the speed, and
    # without it a parameter is a folder of plain files, which the converter fills in place.
    in_flight = max(_IN_FLIGHT_GB, -(-largest // 10**9))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, restore_concurrent_gb=in_flight)
    return ocp, ocp.Checkpointer(handler)


def save_component(path: str | os.PathLike, params: Params) -> None:
    """Writes one component's parameters (nested dict of NumPy or jax arrays) as an orbax directory.

    NumPy arrays go to orbax as jax arrays on the CPU that alias them (see `empty_aligned`): orbax copies plain NumPy
    arrays first, and writes them ten times slower.
    Raises: OSError where the disk is full or the path can't be written.
    """
    ocp, checkpointer = _handler()
    cpu = jax.local_devices(backend="cpu")[0]
    leaves = {
        name: jax.device_put(leaf, cpu, may_alias=True) if isinstance(leaf, np.ndarray) else leaf
        for name, leaf in flatten(params)
    }
    for name, leaf in flatten(params):
        if leaves[name].dtype != leaf.dtype:
            raise NotImplementedError(
                f"{name} is {leaf.dtype}, which JAX would store as {leaves[name].dtype}; cast it first"
            )
    tree = unflatten(leaves)
    path = pathlib.Path(path).absolute()
    check_space(path.parent, sum(leaf.nbytes for _, leaf in flatten(params)))
    # the folder around it: while it is written it has another name there
    with orbax_writes(path.parent), checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def abstract_component(path: str | os.PathLike) -> Params:
    """Shapes and dtypes of a saved component, nothing read."""
    _, checkpointer = _handler()
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: the checkpoint lacks its {path.name}; convert it again")
    try:
        with checkpointer:
            metadata: Any = checkpointer.metadata(path)
        if metadata.item_metadata is None:
            raise ValueError("its metadata can't be read")
        tree = metadata.item_metadata.tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole orbax directory ({_first_line(error)}); convert the checkpoint again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _check_leaves(path: pathlib.Path, got: dict[str, Any], expected: Params) -> None:
    wanted = dict(flatten(expected))
    for what, names in (("lacks", wanted.keys() - got.keys()), ("has an unknown", got.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{path} {what} parameter {min(names)!r} for this config; convert the checkpoint again")
    for name, leaf in wanted.items():
        if got[name].shape != leaf.shape:
            raise ValueError(
                f"{path}: parameter {name!r} has shape {list(got[name].shape)}, its config says {list(leaf.shape)}; "
                "convert the checkpoint again"
            )


def load_component(
    path: str | os.PathLike,
    *,
    expected: Params | None = None,
    dtype: Any | Callable[[str], Any] | None = None,
    shardings: Any | Callable[[str], Any] | None = None,
) -> Params:
    """Reads one component.

    Args:
      path: its orbax directory, such as `checkpoint / "dit"`.
      expected: `abstract_params(build)` of the model that will take it; names and shapes must agree, dtypes needn't.
      dtype: cast to this type while reading, or a function of the parameter's path ('blocks/self_attn/q/kernel');
        None, also from the function, keeps what was stored.
      shardings: a jax Sharding, or a function from path to Sharding: jax arrays, on any mesh. None: NumPy arrays.
    Raises: FileNotFoundError or ValueError, naming directory or parameter: missing, damaged or of another model.
    """
    path = pathlib.Path(path).absolute()
    abstract = dict(flatten(abstract_component(path)))
    if expected is not None:
        _check_leaves(path, abstract, expected)
    ocp, checkpointer = _handler(max(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in abstract.values()))
    restore_args = {}
    for name, leaf in abstract.items():
        wanted: Any = dtype(name) if callable(dtype) and not isinstance(dtype, type | np.dtype) else dtype
        kind = leaf.dtype if wanted is None else np.dtype(wanted)
        if shardings is None:
            restore_args[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=kind)
        else:
            sharding = shardings if isinstance(shardings, jax.sharding.Sharding) else shardings(name)
            restore_args[name] = ocp.ArrayRestoreArgs(sharding=sharding, dtype=kind, global_shape=leaf.shape)
    try:
        with checkpointer:
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=unflatten(restore_args)))
    except Exception as error:
        raise ValueError(f"{path} can't be read ({_first_line(error)}); convert the checkpoint again") from error


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what a tokenizer's folder has of a tokenizer's files, of links the content. Raises as `check_tokenizer`."""
    target.mkdir(parents=True)
    for name, real in check_tokenizer(source).items():
        shutil.copyfile(real, target / name)


def check_tokenizer(source: pathlib.Path) -> dict[str, pathlib.Path]:
    """What `copy_tokenizer` would copy of a folder: the file that is read, by name. To be called before hours of other work.

    Raises: ValueError for a link that leads out of the folder, but for those into a Hugging Face cache: whoever made a checkpoint
      must not choose which of a person's files goes on into the next. Also as `check_regular`.
    """
    files = {}
    for name in _TOKENIZER:
        file = source / name
        if not file.is_file():
            continue
        check_regular(file, MAX_JSON)
        real = file.resolve()
        if not (real.is_relative_to(source.resolve()) or _in_a_cache(real, source.resolve())):
            raise ValueError(f"{file} is a link to {real}, outside of its folder; put the file itself there")
        files[name] = real
    return files


def _in_a_cache(file: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether a file is one of a Hugging Face cache's blobs, which may lie on another disk than the snapshot that links to it."""
    blobs = [part.parent / "blobs" for part in folder.parents if part.name == "snapshots"]
    in_blobs = file.parent.name == "blobs" and file.parent.parent.name.startswith("models--")
    return in_blobs or any(file.parent == place.resolve() for place in blobs)


def save_checkpoint(
    path: str | os.PathLike,
    config: WanConfig,
    components: dict[str, Params],
    tokenizer_dir: str | os.PathLike | None = None,
    schedule: FPSSchedule | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a whole checkpoint from parameters in memory. Errors as `new_directory` and `save_component`.

    schedule: that it was trained with, kept beside it.
    """
    unknown = set(components) - set(COMPONENTS)
    if unknown:
        raise ValueError(f"components={sorted(components)}: {min(unknown)!r} is none of {', '.join(COMPONENTS)}")
    with new_directory(path, overwrite=overwrite, sources=() if tokenizer_dir is None else (tokenizer_dir,)) as fresh:
        if tokenizer_dir is not None:
            check_tokenizer(pathlib.Path(tokenizer_dir))
        for name, params in components.items():
            save_component(fresh / name, params)
        if tokenizer_dir is not None:
            copy_tokenizer(pathlib.Path(tokenizer_dir), fresh / "tokenizer")
        if schedule is not None:
            schedule.save(fresh / SCHEDULE)
        write_config(fresh, config, components=list(components))
