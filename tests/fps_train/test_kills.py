"""Kills: what the folder of a run is at every instant at which it changes can be gone on from."""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.checkpoints.runs import is_run, read_run
from fps_train.checkpoints import Checkpoints
from fps_train.loop import train
from fps_train.metrics import read_metrics
from fps_train.run import check_new, check_resume, start_run
from fps_train.setup import prepare

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
_seen = {"change": None}  # who is told of changes to files; a hook of Python's can't be taken off again


@pytest.fixture(scope="module", autouse=True)
def hook():
    def told(event, args):
        if event in _CHANGES and _seen["change"] is not None:
            _seen["change"](args[0])

    sys.addaudithook(told)


@contextlib.contextmanager
def snapshots(folder: pathlib.Path, into: pathlib.Path):
    """Copies of `folder` as it is before each rename, removal and new directory in it: what a kill at that moment leaves."""
    taken, busy = [], []

    def change(path):
        if busy or not isinstance(path, str | os.PathLike) or not str(path).startswith(str(folder)):
            return
        busy.append(1)
        # Tensorstore's own threads write on: what goes while it is copied isn't there.
        with contextlib.suppress(shutil.Error):
            if folder.exists():
                taken.append(into / str(len(taken)))
                shutil.copytree(folder, taken[-1])
        busy.clear()

    _seen["change"] = change
    try:
        yield taken
    finally:
        _seen["change"] = None


def lines(folder):
    """The numbers of a run that don't depend on the machine."""
    return [(line["step"], line.get("loss"), line.get("grad_norm")) for line in read_metrics(folder / "metrics.jsonl")]


def test_a_kill_at_any_moment_loses_at_most_what_came_after_the_last_checkpoint(options, tmp_path, monkeypatch):
    own = dataclasses.replace(
        options, steps=3, validation=dataclasses.replace(options.validation, every=0),
        checkpoint=dataclasses.replace(options.checkpoint, every=1, keep=1),
    )  # fmt: skip
    states, save = {}, Checkpoints.save

    def seen_save(self, state, notes, validation):
        states[notes["step"]] = jax.tree.map(jnp.copy, state)
        save(self, state, notes, validation)

    monkeypatch.setattr(Checkpoints, "save", seen_save)
    with snapshots(pathlib.Path(own.output), tmp_path / "killed") as taken:
        train(own, show=False)
    monkeypatch.undo()

    before, begun, found = [], [], {}
    for folder in taken:
        if not is_run(folder):
            check_new(folder)  # raises where a new run isn't let in
            before.append(folder)
            continue
        latest = max(read_run(folder).steps(), default=0)
        assert latest >= max(found, default=0), "what was saved is lost"
        begun += [folder] if not latest and list(folder.glob("checkpoints/1.*/params*")) else []
        found.setdefault(latest, []).append(folder)
    assert len(before) >= 4
    assert set(found) == {0, 1, 2, 3}
    for step in (1, 2, 3):  # as soon as it has its name it is whole
        with Checkpoints(found[step][0] / "checkpoints", own.checkpoint) as checkpoints:
            assert checkpoints.latest == step
            restored = checkpoints.restore(states[step], step).state
        jax.tree.map(np.testing.assert_array_equal, restored, states[step])

    choose = random.Random(0).choice
    for folder, resume in ((choose(before), False), (choose(begun), True), (choose(found[1][2:-2]), True)):
        train(dataclasses.replace(own, output=str(folder)), resume=resume, show=False)
        assert lines(folder) == lines(pathlib.Path(own.output))
        for name, was in zip(("raw", "ema"), (states[3].params, states[3].ema), strict=True):
            jax.tree.map(np.testing.assert_array_equal, read_run(folder).trained(name), was)
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"3"}  # what was half-written is gone
        assert not list(folder.glob(".*"))


def test_a_start_that_was_cut_short_gives_way_to_nothing_but_a_start(options, tmp_path):
    """Its files are known by a mark and their names: whatever else lies there stays, and stops it."""
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / ".fps_train_starting").touch()
    for name in ("config.toml", "fps_schedule.json", ".config.0123abcd.partial.toml", ".run.0123abcd.partial.json"):
        (folder / name).touch()
    check_new(folder)
    for name in ("notes.toml", ".run.partial.json", "checkpoints", "run.json"):
        (folder / name).touch()
        with pytest.raises(FileExistsError, match="exists and is not empty; give another --output"):
            check_new(folder)
        (folder / name).unlink()
    (folder / ".fps_train_starting").unlink()
    with pytest.raises(FileExistsError, match="exists and is not empty"):  # a config that somebody wrote by hand
        check_new(folder)
    # Started anew without a schedule, it doesn't keep the one that it had
    (folder / ".fps_train_starting").touch()
    setup = prepare(dataclasses.replace(options, output=str(folder), attention="dense", schedule=None))
    start_run(folder, setup.options, setup.model, setup.parts, setup.schedule, setup.data.fingerprint)
    assert {path.name for path in folder.iterdir()} == {"config.toml", "run.json"}


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_same_weights_again(options, model, tmp_path):
    """Also where they aren't the model's."""
    setup = prepare(options)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    begun = dataclasses.replace(setup.options, init_from=str(other))
    record = (setup.model, setup.parts, setup.schedule, setup.data.fingerprint)
    start_run(setup.directory, begun, *record)
    for again in (begun, setup.options):  # --config RUN/config.toml says it, the command line needn't
        assert check_resume(setup.directory, again, *record) == str(other)
    (setup.directory / "checkpoints" / "3").mkdir(parents=True)
    assert check_resume(setup.directory, begun, *record) is None  # its own weights now
