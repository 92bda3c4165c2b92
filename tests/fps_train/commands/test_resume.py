"""fps-train --resume at the command: what a run doesn't go on with is one line and status 2, and the run is as it was."""

import contextlib
import gc
import io
import json
import pathlib
import shutil
import warnings
from typing import NamedTuple

import pytest

from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_jax.sizes import Shape3
from fps_train.checkpoints import Checkpoints
from fps_train.commands import train as command
from fps_train.metrics import Metrics, read_metrics
from fps_train.run import start_run
from tests.fps_train.models import CONFIG
from tests.fps_train.sample_data import write_data
from tests.full_disk import full_beyond


def write_schedule(path: pathlib.Path, window: Shape3) -> pathlib.Path:
    regimes = (Regime(until=1.0, scales_per_tile=1, window=window),)
    FPSSchedule(grid=(2, 4, 4), tile=(1, 2, 4), regimes=regimes).save(path)
    return path


class Said(NamedTuple):
    status: int
    lines: list[str]  # of stderr


class Ran(NamedTuple):
    """A run whose disk was full when its second step was to be saved."""

    folder: pathlib.Path
    said: Said


def run(*argv) -> Said:
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        command.main([str(a) for a in argv])
    assert isinstance(stop.value.code, int)
    return Said(stop.value.code, err.getvalue().splitlines())


def content(folder: pathlib.Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def start(model, data, tmp_path_factory) -> list:
    """Two steps, each saved."""
    schedule = write_schedule(tmp_path_factory.mktemp("schedule") / "schedule.json", (1, 2, 1))
    return [
        model, "--data", data, "--schedule", schedule, "--sampling-shift", 3, "--steps", 2, "--checkpoint.every", 1,
        "--dtype", "float32", "--remat", "none", "--validation.every", 0, "--validation.samples", 0,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ran(start, tmp_path_factory) -> Ran:
    folder = tmp_path_factory.mktemp("ran") / "run"
    save = Checkpoints.save

    def filled(self, state, notes, validation):
        if notes["step"] == 1:
            save(self, state, notes, validation)
            self.wait()
            return
        with full_beyond(2000):  # the kernel refuses what is larger to whoever writes it
            save(self, state, notes, validation)
            self.wait()

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Of writes that never began as others had failed: a command says nothing of them (fps_jax.checkpoints.writes).
        warnings.filterwarnings("ignore", r"coroutine '\w*serialize.* was never awaited", RuntimeWarning)
        patch.setattr(Checkpoints, "save", filled)
        said = run(*start, "--output", folder)
        gc.collect()
        return Ran(folder, said)


@pytest.fixture
def mine(ran, tmp_path) -> pathlib.Path:
    """A copy of it."""
    return shutil.copytree(ran.folder, tmp_path / "run")


def resume(mine, *changes) -> Said:
    return run("--config", mine / "config.toml", "--output", mine, "--resume", *changes)


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_one_before(ran):
    assert ran.said.status == 2
    assert [line for line in ran.said.lines if "error" in line.lower()] == ran.said.lines[-1:]
    folder = ran.folder / "checkpoints"
    assert ran.said.lines[-1] == f"error: {folder}: no space left for a checkpoint; make room, then --resume"
    assert [path.name for path in folder.iterdir()] == ["1"]
    assert [line["step"] for line in read_metrics(ran.folder / "metrics.jsonl")] == [1, 2]


def with_config(tmp_path, model, change):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_bytes())
    change(config)
    (other / "config.json").write_text(json.dumps(config))
    return [other]


def other_model(mine, tmp_path, model):
    return with_config(tmp_path, model, lambda config: config["config"]["dit"].update(num_layers=1))


def model_of_another_version(mine, tmp_path, model):
    return with_config(tmp_path, model, lambda config: config.update(version=99))


def other_weights(mine, tmp_path, model):
    other = shutil.copytree(model, tmp_path / "other")
    largest = max(other.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    return [other]


def other_schedule(mine, tmp_path, model):
    return ["--schedule", write_schedule(tmp_path / "other.json", (2, 1, 1))]


def other_data(mine, tmp_path, model):
    return ["--data", write_data(tmp_path / "d", {"64x64x5": 5}, text_len=CONFIG.text_len, text_dim=CONFIG.text_dim)]


def other_version(mine, tmp_path, model):
    record = json.loads((mine / "run.json").read_bytes())
    (mine / "run.json").write_text(json.dumps(record | {"version": 0}))
    return []


def without_moments(mine, tmp_path, model):
    shutil.rmtree(mine / "checkpoints" / "1" / "optimizer")
    return []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_model, "was of another model than this call"),
        (model_of_another_version, "version 99"),
        (other_weights, "was of other weights than this call; resume it with its own (--config"),
        (other_schedule, "had another schedule than this call; resume it with its own (--config"),
        (other_data, "was of other data than this call; resume it with its own (--config"),
        (lambda *_: ["--sampling-shift", 7], "sampling_shift=7.0, but the run in '{mine}' has 3.0; resume it with that"),
        (lambda *_: ["--flow.shift", 7], "flow.shift=7.0, but the run in '{mine}' has 2.0; resume it with that"),
        (lambda *_: ["--batch-size", 2], "batch_size=2, but the run in '{mine}' has 1; resume it with that"),
        (lambda *_: ["--lora.rank", 2], "had other adapters than this call; resume it with its own (--config"),
        (other_version, "{mine} is a run of version 0, this release continues 1"),
        (without_moments, "checkpoint {mine}/checkpoints/1 can't be resumed ("),
    ],
)  # fmt: skip
def test_a_run_that_can_t_go_on_is_told_in_one_line_and_stays_as_it_is(mine, tmp_path, model, change, message):
    changes = change(mine, tmp_path, model)
    before = content(mine)
    status, lines = resume(mine, *changes)
    assert status == 2, lines
    (line,) = lines
    assert line.startswith("error: ")
    assert message.format(mine=mine) in line
    assert content(mine) == before


def test_what_isn_t_there_isn_t_made_by_resuming_it(start, tmp_path):
    status, (line,) = run(*start, "--output", tmp_path / "none", "--resume")
    assert status == 2
    assert line.endswith("none' holds no run to resume; leave --resume out to start one")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_with_the_config_begins_no_run(start, tmp_path, monkeypatch):
    def filled(*facts):
        with full_beyond(100):
            start_run(*facts)

    monkeypatch.setattr("fps_train.loop.start_run", filled)
    status, lines = run(*start, "--output", tmp_path / "run")
    assert status == 2
    assert [line for line in lines if "error" in line.lower()] == lines[-1:]
    assert lines[-1].startswith(f"error: can't write '{tmp_path}/run/config.toml': File too large; ")
    assert not list(tmp_path.rglob("*.*"))


def test_a_disk_that_fills_with_the_metrics_costs_no_more_than_the_step(mine, monkeypatch):
    write, before = Metrics.write, content(mine)

    def filled(self, step, values):
        with full_beyond(self.path.stat().st_size + 20):
            write(self, step, values)

    monkeypatch.setattr(Metrics, "write", filled)
    status, lines = resume(mine)
    assert status == 2
    assert [line for line in lines if "error" in line.lower()] == lines[-1:]
    assert lines[-1] == f"error: {mine}/metrics.jsonl: File too large; make room, then --resume"
    whole, after = before["metrics.jsonl"], content(mine)
    assert whole is not None
    assert after["metrics.jsonl"] == whole.splitlines(keepends=True)[0]  # of the step that is saved
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= {
        "metrics.jsonl", *(name for name in after if name.startswith("tensorboard/")),
    }  # fmt: skip

    monkeypatch.undo()
    assert resume(mine).status == 0
    first, second = (json.loads(line) for line in whole.splitlines())
    again = read_metrics(mine / "metrics.jsonl")
    assert [line["loss"] for line in again] == [first["loss"], second["loss"]]  # bit for bit, on a CPU
    assert sorted(path.name for path in (mine / "checkpoints").iterdir()) == ["1", "2"]
