"""What is kept of a run's checkpoints, and what is said where one can't be written or read."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest

from fps_train.checkpoints import Checkpoints
from fps_train.config import CheckpointOptions, OptimizerOptions
from fps_train.loop import train
from fps_train.state import init_state
from tests.fps_train.sample_data import write_data

OPTIONS = OptimizerOptions(learning_rate=1e-3, warmup=0, ema=0.5)


@pytest.fixture(scope="module")
def state():
    return init_state({"kernel": jnp.ones((4, 4))}, OPTIONS, 10)


def save(folder, state, options, losses):
    with Checkpoints(folder, options) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(state._replace(step=jnp.int32(step)), {"step": step}, loss)
            checkpoints.wait()
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


@pytest.mark.parametrize(
    ("options", "losses", "kept"),
    [
        (CheckpointOptions(keep=2, best=0), {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3}, [3, 4]),
        (CheckpointOptions(keep=1, best=1), {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3}, [2, 4]),
        # One that no validation saw is never among the best.
        (CheckpointOptions(keep=1, best=2), {1: 0.5, 2: None, 3: 0.4, 4: None}, [1, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, state, options, losses, kept):
    assert save(tmp_path / "checkpoints", state, options, losses) == kept


def test_a_damaged_checkpoint_is_told_with_what_to_do(tmp_path, state):
    folder = tmp_path / "checkpoints"
    save(folder, state, CheckpointOptions(keep=2, best=0), {1: None, 2: None})
    shutil.rmtree(folder / "2" / "params")
    with (
        Checkpoints(folder, CheckpointOptions()) as checkpoints,
        pytest.raises(
            ValueError, match=r"checkpoint .*/2 can't be resumed \(.*\); remove it to resume from the one before"
        ),
    ):
        checkpoints.restore(state, 2)


@pytest.mark.parametrize(
    "said",
    [
        "UNKNOWN: Gloo all-reduce failed: Connection closed by peer",
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 80 bytes.",
    ],
)
def test_a_checkpoint_is_not_blamed_for_a_lost_peer_or_a_full_device(tmp_path, state, monkeypatch, said):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(said)

    with Checkpoints(tmp_path / "checkpoints", CheckpointOptions()) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        monkeypatch.setattr("fps_train.checkpoints.lost_peer", lambda error: "Gloo" in str(error))
        with pytest.raises(jax.errors.JaxRuntimeError):
            checkpoints.restore(state, 1)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("RESOURCE_EXHAUSTED: write failed: No space left on device", "no space left for a checkpoint; make room, then --resume"),
        ("PERMISSION_DENIED: Permission denied [13]", "can't be written"),
    ],
)  # fmt: skip
def test_a_disk_that_takes_nothing_is_told_in_one_line(tmp_path, state, monkeypatch, said, reason):
    folder = tmp_path / "checkpoints"
    save(folder, state, CheckpointOptions(), {1: None})

    def fail(*args, **kwargs):
        raise ValueError(f"{said}\nsecond line")

    with Checkpoints(folder, CheckpointOptions()) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(OSError, match=reason) as told:
            checkpoints.save(state, {"step": 2}, None)
        assert told.value.filename == str(folder)
        assert checkpoints.latest == 1


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(tmp_path, state, monkeypatch):
    folder = tmp_path / "checkpoints"
    save(folder, state, CheckpointOptions(), {1: None})
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10**6)  # type: ignore[attr-defined]
    with Checkpoints(folder, CheckpointOptions()) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        said = r"not enough disk space: needs [\d.]+ MB, 1\.0 MB are free; make room, then --resume"
        with pytest.raises(OSError, match=said) as told:
            checkpoints.save(state, {"step": 2}, None)
        assert told.value.filename == str(folder)
        assert checkpoints.latest == 1


@pytest.mark.slow
def test_a_run_in_bf16_of_two_sizes(options, tmp_path, capsys):
    """Two sizes by the three regimes of the default schedule: six gradients; and what a resumed run has to agree with."""
    from tests.fps_train.models import CONFIG

    sizes = {"64x64x5": 6, "64x96x5": 6}
    data = write_data(tmp_path / "data", sizes, text_len=CONFIG.text_len, text_dim=CONFIG.text_dim)
    own = dataclasses.replace(
        options, data=str(data), dtype="bfloat16", steps=3, accumulate=3, remat="attention", schedule=None,
        validation=dataclasses.replace(options.validation, every=0),
    )  # fmt: skip
    run = train(own)
    assert "compiling 7 programs: 6 gradients (regimes of 2 sizes of video) and the update\n" in capsys.readouterr().err
    errors = [
        json.loads(line)["error"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
    ]
    assert len(errors) == 3
    assert all(0.1 < value < 10 for seen in errors for value in seen.values())

    # Each of these is found before weights are read.
    record = json.loads((run / "run.json").read_bytes())
    for change, message in (
        ({"version": 0}, "is a run of version 0, this release continues"),
        ({"model_config": {}}, "was of another model"),
        ({"model_files": "x"}, "was of other weights"),
        ({"base_files": "x"}, "froze weights of '.*' that were others"),
    ):
        (run / "run.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            train(own, resume=True)


def test_weights_that_were_changed_in_place_are_others(tmp_path):
    from fps_train.run import _files

    (tmp_path / "dit").mkdir()
    file = tmp_path / "dit" / "weights"
    file.write_bytes(bytes(1_000_000))
    before = _files(tmp_path)
    assert _files(tmp_path) == before
    file.write_bytes(bytes(500_000) + b"\1" * 500_000)
    assert _files(tmp_path) != before


def test_a_start_from_another_architecture_is_refused(options, tmp_path, model):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_bytes())
    config["config"]["dit"]["num_layers"] = 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"init_from='.*' is of another architecture than"):
        train(dataclasses.replace(options, init_from=str(other)))
    assert not pathlib.Path(options.output).exists()
