"""metrics.jsonl: a line a step, none twice, none that is no JSON."""

import json
import sys
import types

from fps_train.metrics import Metrics, read_metrics


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
