"""A run's checkpoints: written in the background by Orbax, whole or not at all, the newest and the best kept."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fps_jax.checkpoints.writes import orbax_writes, quiet_orbax
from fps_jax.files import check_space
from fps_jax.sampling.room import no_room
from fps_train.agreement import AGREED
from fps_train.config import CheckpointOptions
from fps_train.hosts import lost_peer
from fps_train.placement import put
from fps_train.state import TrainState

_FIX = "make room, then --resume"


@dataclass(frozen=True)
class Restored:
    """A state as it was saved, and what was noted with it."""

    state: TrainState
    notes: dict[str, Any]


class Checkpoints:
    """The folder RUN/checkpoints. Use it in a `with` block: its end waits for a save that is under way."""

    def __init__(self, directory: pathlib.Path, options: CheckpointOptions):
        ocp = quiet_orbax()
        from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

        self._ocp = ocp
        policies: list[Any] = [keep.LatestN(options.keep)]
        if options.best:
            # Sorted falling, the last are kept: those of the lowest loss.
            policies.append(
                keep.BestN(
                    get_metric_fn=lambda seen: seen["validation"],
                    reverse=True,
                    n=options.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self.directory = directory
        with self._writes():
            self._manager = ocp.CheckpointManager(
                directory.absolute(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep.AnyPreservationPolicy(policies),
                    cleanup_tmp_directories=True,  # of a process that was killed while it saved
                    enable_background_delete=False,
                ),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None and jax.process_count() > 1 and not issubclass(kind, AGREED):
            return  # this process is alone with its error: the others don't come to save anything with it
        try:
            self.wait()
        except OSError:
            if kind is None:  # else the first error is the one to hear of
                raise
        finally:
            with contextlib.suppress(Exception):
                self._manager.close()

    @contextlib.contextmanager
    def _writes(self) -> Iterator[None]:
        try:
            with orbax_writes(self.directory, f"no space left for a checkpoint; {_FIX}"):
                yield
        except OSError:
            if jax.process_count() == 1:  # of several, others may still write
                for half in self.directory.glob("*.orbax-checkpoint-tmp*"):  # it holds what little room there was
                    shutil.rmtree(half, ignore_errors=True)
            raise

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, notes: dict[str, Any], validation: float | None) -> None:
        """Starts to write a checkpoint; returns as soon as the state may change again.

        notes: JSON, kept beside it. validation: the loss by which the best are kept, None for none.
        Raises: OSError that names the folder where this save, or the one before it, has no room or can't be written.
        """
        ocp = self._ocp
        items: dict[str, Any] = {
            "params": ocp.args.PyTreeSave(state.params),  # pyright: ignore[reportCallIssue]
            "optimizer": ocp.args.PyTreeSave(_numbered(state.optimizer)),  # pyright: ignore[reportCallIssue]
            "meta": ocp.args.JsonSave(notes),  # pyright: ignore[reportCallIssue]
        }
        if state.ema is not None:
            items["ema"] = ocp.args.PyTreeSave(state.ema)  # pyright: ignore[reportCallIssue]
        self.wait()  # as orbax does: what the save before this one still holds, and what goes with its end, isn't counted
        if jax.process_count() == 1:  # several would each see another amount, and only some of them stop
            check_space(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state)), _FIX)
        with self._writes():
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(**items),
                metrics=None if validation is None else {"validation": validation},
            )

    def wait(self) -> None:
        """Until what was begun is on disk. Raises as `save`."""
        with self._writes():
            self._manager.wait_until_finished()

    def restore(self, like: TrainState, step: int) -> Restored:
        """The state of a checkpoint.

        Args:
          like: a state, or its shapes with shardings: what is restored has these shapes and lies so.
        Raises: ValueError where the checkpoint is damaged or is of another state.
        """
        ocp = self._ocp

        def tree(of):
            of = shapes(of)
            args = jax.tree.map(
                lambda a: ocp.ArrayRestoreArgs(sharding=a.sharding, global_shape=a.shape, dtype=a.dtype), of
            )
            return ocp.args.PyTreeRestore(item=of, restore_args=args)  # pyright: ignore[reportCallIssue]

        items: dict[str, Any] = {
            "params": tree(like.params),
            "optimizer": tree(_numbered(like.optimizer)),
            "meta": ocp.args.JsonRestore(),
        }
        if like.ema is not None:
            items["ema"] = tree(like.ema)
        try:
            got = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            if lost_peer(error) or no_room(error):  # nothing is wrong with the checkpoint
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise ValueError(
                f"checkpoint {self.directory / str(step)} can't be resumed ({first}); remove it to resume from the one before"
            ) from error
        leaves = [got["optimizer"][key] for key in sorted(got["optimizer"])]
        optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves)
        count = put(np.int32(step), like.step.sharding)
        state = TrainState(count, got["params"], optimizer, got["ema"] if like.ema is not None else None)
        return Restored(state, got["meta"])


def shapes(tree: Any) -> Any:
    """Shapes with shardings of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _numbered(tree: Any) -> dict[str, Any]:
    """Leaves by their number: Optax's own names and nesting may change with its versions, its order of leaves hasn't."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
