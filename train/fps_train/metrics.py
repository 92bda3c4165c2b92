"""What is seen of a run: RUN/metrics.jsonl, TensorBoard's files, Weights & Biases where that is installed and logged in."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

from fps_jax.files import append_bytes, write_bytes

_BOARD_SECONDS = 120  # between flushes of TensorBoard's file
_FIX = "make room, then --resume"


class Metrics:
    """Writes a line a step. Numbers that aren't finite are written as null.

    Lines of steps after `start` (all, if that is 0) are dropped first: a run that resumes does those steps again.
    """

    def __init__(self, directory: pathlib.Path, start: int, config: dict[str, Any]):
        self.path = directory / "metrics.jsonl"
        self._keep_until(start)
        self._board = _Board(directory / "tensorboard", start)
        self._wandb = _wandb_run(directory, config)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._board.close()
        except OSError:
            if kind is None:  # else the first error is the one to hear of
                raise
        finally:
            if self._wandb is not None:
                self._wandb.finish()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """values: numbers, or dicts of them: {'loss': .1, 'error': {'regime0': .2}}.

        Raises: OSError that names the file where the disk is full; the line is there whole, or nothing of it.
        """
        append_bytes(self.path, json.dumps({"step": step, **_finite(values)}).encode() + b"\n", _FIX)
        flat = {k: v for k, v in _flat(values).items() if isinstance(v, int | float)}
        self._board.write(step, flat)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line cut short by a kill
                if step and json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_bytes(self.path, "".join(kept).encode())


class _Board:
    """TensorBoard's file, written in the thread that calls.

    SummaryWriter of tensorboardX has a thread of its own: a full disk ends it with a traceback, and whoever writes next waits for
    it forever.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter

        messages: Any = event_pb2  # protobuf makes its names when it is imported
        self._event, self._flushed = messages.Event, time.monotonic()
        folder.mkdir(exist_ok=True)
        self.path = (
            folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        )  # as TensorBoard looks for it
        with _names(self.path):
            self._records = RecordWriter(str(self.path))
            self._add(file_version="brain.Event:2")
            if start:  # what earlier files have of later steps isn't shown
                self._add(step=start + 1, session_log=messages.SessionLog(status=messages.SessionLog.START))
            self._records.flush()

    def write(self, step: int, values: dict[str, int | float]) -> None:
        """Raises OSError that names the file where the disk is full."""
        from tensorboardX.summary import scalar

        with _names(self.path):
            for name, value in values.items():
                self._add(step=step, summary=scalar(name, value))
            if time.monotonic() - self._flushed > _BOARD_SECONDS:
                self._records.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Raises OSError as `write`."""
        with _names(self.path):
            self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


@contextlib.contextmanager
def _names(path: pathlib.Path) -> Iterator[None]:
    """An OSError of the block, has the path and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {_FIX}", str(path)) from error


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def _wandb_run(directory: pathlib.Path, config: dict[str, Any]) -> Any:
    """A W&B run, where the package is there and the environment doesn't say no. WANDB_MODE and the like are W&B's own."""
    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")):
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    kept = directory / "wandb_id"  # of this folder alone: two runs may have the same name
    if not kept.exists():
        write_bytes(kept, secrets.token_hex(8).encode())
    return wandb.init(dir=str(directory), name=directory.name, config=config, resume="allow", id=kept.read_text())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
