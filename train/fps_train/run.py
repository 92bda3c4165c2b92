"""A run's folder: what a new one writes down, and what a resumed one has to agree with."""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from typing import Any

from fps_jax.attention.schedule import FPSSchedule
from fps_jax.checkpoints.format import SCHEDULE
from fps_jax.checkpoints.open import Model, open_model
from fps_jax.checkpoints.runs import FORMAT, VERSION, is_run, read_run
from fps_jax.files import is_unfinished, write_json
from fps_train.config import TrainConfig
from fps_train.state import Parts

_PAGE = 4096  # bytes
_SHARED_SECONDS = 60  # network file systems show new files late
_CONFIG, _RECORD = "config.toml", "run.json"
_STARTING = ".fps_train_starting"  # a file that is there before the first of a new run's files and until the last
# May differ between a run and its resumption: where things lie, how long it goes on, what is looked at, on what it runs.
_FREE = {"model", "data", "output", "steps", "remat", "mesh", "schedule", "checkpoint"}


def start_run(
    directory: pathlib.Path,
    options: TrainConfig,
    model: Model,
    parts: Parts,
    schedule: FPSSchedule | None,
    data: str,
) -> None:
    """Writes the folder of a new run. data: the fingerprint of its data. Raises as `check_new`.

    run.json comes last: without it the folder is no run, and a start that was killed before leaves it free for the next.
    """
    check_new(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _STARTING).touch()
    _clear(directory)
    # Where all weights are trained, none are anybody's base any more.
    base = options.init_from if options.init_from is not None and parts.freezes else options.model
    try:
        options.save(directory / _CONFIG)
        if schedule is not None:
            schedule.save(directory / SCHEDULE)
        write_json(_record(options, model, parts, schedule, data, base), directory / _RECORD)
    except BaseException:  # a full disk, say: nothing stays of it
        _clear(directory)
        (directory / _STARTING).unlink()
        raise
    (directory / _STARTING).unlink()


def _clear(directory: pathlib.Path) -> None:
    """Removes what a start that came to no end has written, but for its mark."""
    for left in directory.iterdir():
        if left.name != _STARTING:
            left.unlink()


def check_new(directory: pathlib.Path) -> None:
    """Raises FileExistsError where there is a run already, or other files than those of a start that was cut short."""
    if is_run(directory):
        raise FileExistsError(
            f"output={str(directory)!r} holds a run; --resume continues it, another --output starts anew"
        )
    if directory.exists() and (not directory.is_dir() or (any(directory.iterdir()) and not _was_starting(directory))):
        raise FileExistsError(f"output={str(directory)!r} exists and is not empty; give another --output")


def _was_starting(directory: pathlib.Path) -> bool:
    """Whether all that lies there is what `start_run` had written when it was killed."""
    names = {path.name for path in directory.iterdir()}
    ours = {_STARTING, _CONFIG, SCHEDULE}
    return _STARTING in names and all(
        name in ours or any(is_unfinished(name, of) for of in (_CONFIG, SCHEDULE, _RECORD)) for name in names
    )


def check_resume(
    directory: pathlib.Path, options: TrainConfig, model: Model, parts: Parts, schedule: FPSSchedule | None, data: str
) -> str | None:
    """The checkpoint that the run's frozen weights are of, or all it starts from while it has none of its own; None for the model.

    Raises: ValueError, naming the first difference, where a run was of another model, data, schedule or setting.
    """
    if not is_run(directory):
        raise FileNotFoundError(f"output={str(directory)!r} holds no run to resume; leave --resume out to start one")
    before = json.loads((directory / _RECORD).read_bytes())
    if before.get("version") != VERSION:
        raise ValueError(f"{directory} is a run of version {before.get('version')!r}, this release continues {VERSION}")
    # By what the run says of itself, which is the same for all processes; where the model lies may not be.
    base = None if before.get("base") == before.get("model") else before["base"]
    now = json.loads(json.dumps(_record(options, model, parts, schedule, data, base or options.model)))
    for name, what in (
        ("model_config", "was of another model"),
        ("model_files", "was of other weights"),
        ("base_files", f"froze weights of {before.get('base')!r} that were others"),
        ("data", "was of other data"),
        ("schedule", "had another schedule"),
        ("lora", "had other adapters"),
    ):
        if before.get(name) != now[name]:
            raise ValueError(
                f"the run in {str(directory)!r} {what} than this call; resume it with its own (--config "
                f"{directory / _CONFIG} --resume), or start anew with --init-from and another --output"
            )
    was = TrainConfig.load(directory / _CONFIG)
    for field in dataclasses.fields(TrainConfig):
        old, new = getattr(was, field.name), getattr(options, field.name)
        if field.name == "init_from" and new is None:  # its own weights are continued, whatever they began as
            continue
        if field.name == "validation":  # but for the samples that it keeps from training
            old, new = (dataclasses.replace(options.validation, samples=one.samples) for one in (old, new))
        elif field.name in _FREE:
            continue
        if old != new:
            name, old, new = _difference(field.name, old, new)
            raise ValueError(
                f"{name}={new!r}, but the run in {str(directory)!r} has {old!r}; resume it with that, or start anew with "
                "--init-from and another --output"
            )
    if options.steps != was.steps and options.optimizer.schedule != "constant":
        raise ValueError(
            f"steps={options.steps}, but the run has {was.steps}, over which its learning rate falls "
            f"({was.optimizer.schedule}); resume it with that"
        )
    return base or (None if read_run(directory).steps() else was.init_from)


def run_facts(
    options: TrainConfig, model: Model, parts: Parts, schedule: FPSSchedule | None, data: str
) -> dict[str, Any]:
    """What of a run's record the processes of a run have to have alike; the places where they find it may differ."""
    base = options.init_from if options.init_from is not None else options.model
    found = _record(options, model, parts, schedule, data, base)
    return {
        "the data (its fingerprint)": found["data"],
        "the model (a hash of its files)": found["model_files"],
        "whether init_from is given": options.init_from is not None,
        "the weights to start from (a hash of their files)": found["base_files"],
        "the schedule": found["schedule"],
    }


def see_run(directory: pathlib.Path) -> None:
    """Waits until the folder that process 0 has begun is seen here too. Raises FileNotFoundError where it never is."""
    until = time.monotonic() + _SHARED_SECONDS
    while not is_run(directory):
        if time.monotonic() > until:
            raise FileNotFoundError(
                f"output={str(directory)!r}: the run that process 0 began is not seen from here; "
                "give a folder that all hosts share"
            )
        time.sleep(0.5)


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    if not dataclasses.is_dataclass(old):
        return name, old, new
    inner = next(f.name for f in dataclasses.fields(old) if getattr(old, f.name) != getattr(new, f.name))
    return f"{name}.{inner}", getattr(old, inner), getattr(new, inner)


def _record(
    options: TrainConfig, model: Model, parts: Parts, schedule: FPSSchedule | None, data: str, base: str
) -> dict[str, Any]:
    name, base = _anywhere(options.model), _anywhere(base)
    lora = None if parts.lora is None else dataclasses.asdict(parts.lora)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": name,
        "model_config": model.config.to_dict(),
        "model_files": _files(model.directory),
        "base": base,
        "base_files": _files((model if base == name else open_model(base)).directory),
        "data": data,
        "schedule": None if schedule is None else schedule.to_dict(),
        "lora": lora,
    }


def _anywhere(checkpoint: str) -> str:
    """A local checkpoint's path from any folder; a repository's name as it is."""
    path = pathlib.Path(checkpoint).expanduser()
    return str(path.resolve()) if path.exists() else checkpoint


def _files(directory: pathlib.Path) -> str:
    """A hash of a checkpoint's files: names, sizes and a few pages of each. Tells other weights at no cost, not every change."""
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            path = pathlib.Path(folder) / name
            found.append((os.path.relpath(path, directory), path.stat().st_size, _pages(path)))
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16]


def _pages(path: pathlib.Path) -> str:
    """Of a file's beginning, three places between and its end."""
    size = path.stat().st_size
    seen = hashlib.sha256()
    with path.open("rb") as file:
        for quarter in range(5):
            file.seek(max(0, (size - _PAGE) * quarter // 4))
            seen.update(file.read(_PAGE))
    return seen.hexdigest()[:16]
