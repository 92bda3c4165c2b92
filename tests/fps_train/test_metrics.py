"""metrics.jsonl: a line a step, none twice, none that is no JSON; and what TensorBoard reads beside it."""

import errno
import json
import struct
import sys
import types
from typing import Any

import pytest
from tensorboardX.proto import event_pb2 as messages

from fps_train.metrics import Metrics, read_metrics
from tests.full_disk import full_beyond

EVENTS: Any = messages  # protobuf makes its names when it is imported


def test_a_run_that_goes_on_drops_lines_of_steps_that_it_does_again(tmp_path):
    with Metrics(tmp_path, 0, {}) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"loss": 1.0 / step, "error": {"regime0": float("nan")}})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')  # a kill in the middle of a line
    with Metrics(tmp_path, 3, {}) as metrics:
        metrics.write(4, {"loss": 0.5})
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[3]["loss"] == 0.5
    assert lines[0]["error"] == {"regime0": None}  # JSON has no NaN
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_two_runs_of_one_name_are_two_and_a_resumed_one_is_itself(tmp_path, monkeypatch):
    begun = []
    wandb = types.SimpleNamespace(
        init=lambda **given: begun.append(given) or types.SimpleNamespace(finish=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for folder, start in (("a", 0), ("a", 3), ("b", 0)):
        (tmp_path / folder / "run").mkdir(parents=True, exist_ok=True)
        with Metrics(tmp_path / folder / "run", start, {"seed": 1}):
            pass
    first, resumed, other = (given["id"] for given in begun)
    assert first == resumed != other
    assert {given["name"] for given in begun} == {"run"}


def events(path):
    """Of a file of TensorBoard's: records of a length, its checksum, that many bytes and theirs."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(EVENTS.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_tensorboard_has_the_same_numbers_and_forgets_steps_that_are_done_again(tmp_path):
    for name, start in (("a", 0), ("b", 3)):
        (tmp_path / name).mkdir()
        with Metrics(tmp_path / name, start, {}) as metrics:
            metrics.write(4, {"loss": 0.5, "error": {"regime0": 0.25}, "videos": "a name"})
        (file,) = (tmp_path / name / "tensorboard").iterdir()
        version, *again, loss, error = events(file)
        assert version.file_version == "brain.Event:2"
        assert [e.step for e in again if e.session_log.status == EVENTS.SessionLog.START] == ([4] if start else [])
        for event, tag, value in ((loss, "loss", 0.5), (error, "error/regime0", 0.25)):
            assert (event.step, event.summary.value[0].tag, event.summary.value[0].simple_value) == (4, tag, value)


def test_a_full_disk_leaves_whole_lines_and_is_told_with_the_file(tmp_path):
    path, line = tmp_path / "metrics.jsonl", {"loss": 1.0, "note": "x" * 10_000}
    with Metrics(tmp_path, 0, {}) as metrics:
        metrics.write(1, line)
        before = path.read_bytes()
        with full_beyond(len(before) + 100), pytest.raises(OSError, match="make room, then --resume") as told:
            metrics.write(2, line)
    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == before  # not the 100 bytes that there was room for


def test_a_disk_that_fills_with_tensorboard_s_file_is_told_as_well(tmp_path):
    """By the call that wrote: of a thread that died of it nothing would be heard, but the next write would wait forever."""
    numbers = {f"number{i}": 1.0 for i in range(1000)}
    raises, full = pytest.raises(OSError, match="make room, then --resume"), full_beyond(len(json.dumps(numbers)) + 100)
    with raises as told, Metrics(tmp_path, 0, {}) as metrics, full:
        metrics.write(1, numbers)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert told.value.filename == str(file)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {"step": 1, **numbers}
