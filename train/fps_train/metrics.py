"""What is seen of a run: RUN/metrics.jsonl, TensorBoard's files, Weights & Biases where that is installed and logged in."""

import contextlib
import json
import os
import pathlib
import secrets
from typing import Any

from fps_jax.files import write_bytes


class Metrics:
    """Writes a line a step. Numbers that aren't finite are written as null.

    Lines of steps after `start` (all, if that is 0) are dropped first: a run that resumes does those steps again.
    """

    def __init__(self, directory: pathlib.Path, start: int, config: dict[str, Any]):
        self.path = directory / "metrics.jsonl"
        self._keep_until(start)
        self._file = self.path.open("a", encoding="utf-8")
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1 if start else None)
        self._wandb = _wandb_run(directory, config)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """values: numbers, or dicts of them: {'loss': .1, 'error': {'regime0': .2}}."""
        self._file.write(json.dumps({"step": step, **_finite(values)}) + "\n")
        self._file.flush()
        flat = {k: v for k, v in _flat(values).items() if isinstance(v, int | float)}
        for name, value in flat.items():
            self._board.add_scalar(name, value, step)
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
