"""fps-train: options from a preset, a file and the command line; what it says before it works; errors in one line."""

import subprocess
import sys

import jax
import pytest

from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_train.commands import train as command
from tests.fps_train.models import params
from tests.fps_train.sample_data import write_data


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        command.main([str(a) for a in argv])
    return stop.value.code


@pytest.fixture
def trained(monkeypatch):
    """What `train` would be called with."""
    import fps_train.loop

    calls = []

    def record(options, *, resume):
        calls.append((options, resume))
        return options.output

    monkeypatch.setattr(fps_train.loop, "train", record)
    return calls


def test_a_preset_gives_defaults_and_options_win(trained):
    assert run("m", "--data", "d", "--output", "o", "--preset", "lora", "--lora.rank", 4, "--lora.alpha", 8) == 0
    assert run("m", "--data", "d", "--output", "o") == 0
    (lora, *_), (paper, *_) = trained
    assert (lora.lora.rank, lora.lora.alpha, lora.optimizer.learning_rate, lora.model) == (4, 8.0, 1e-4, "m")
    assert (paper.lora.rank, paper.optimizer.learning_rate) == (0, 5e-6)


def test_a_run_s_own_file_repeats_it(trained, tmp_path):
    run("m", "--data", "d", "--output", "o", "--seed", 5, "--init-from", "other")
    trained[0][0].save(tmp_path / "config.toml")
    assert run(f"--config={tmp_path / 'config.toml'}", "--resume", "--steps", 7) == 0
    options, resume = trained[1]
    assert (options.model, options.seed, options.steps, resume, options.init_from) == ("m", 5, 7, True, "other")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["m", "--preset", "best"], "preset='best' is none of paper, lora, scratch"),
        (["m", "--preset", "lora", "--config", "x.toml"], "both give defaults; choose one"),
        (["m", "--config"], "--config needs a value (see fps-train --help)"),
        (["m", "--config", "nowhere.toml"], "config='nowhere.toml' doesn't exist"),
        (["m", "--learning-rate", "1"], "(see fps-train --help)"),
        (["m", "--steps", "many"], "(see fps-train --help)"),
        (["--data", "d", "--output", "o"], "MODEL is missing; give it, or a --config that has it"),
        (["m", "--output", "o"], "--data is missing"),
        (["m", "--data", "d"], "--output is missing"),
        (["nowhere", "--data", "d", "--output", "o"], "checkpoint 'nowhere' doesn't exist"),
    ],
)
def test_errors_are_one_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was written


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(model, data, capsys, tmp_path):
    mesh = ("--mesh", "data=2,context=4", "--batch-size", 2)
    assert run(model, "--data", data, "--output", tmp_path / "run", "--validation.samples", 2, *mesh, "--dry-run") == 0
    said = capsys.readouterr().out
    for part in (
        f"t2v, {sum(leaf.size for leaf in jax.tree.leaves(params())):,} parameters; its weights will be trained in bfloat16",
        "8 samples, 2 of them held out",
        "noise levels: wan, training shift 2, sampling shift 5",
        "tokens (2, 4, 4)",
        "regime0: progress 0 to 0.25, ",
        "programs to compile: ",
        "devices: 8 (data 2, context 4)",
    ):
        assert part in said
    assert list(tmp_path.iterdir()) == []


def test_videos_of_several_sizes_share_one_schedule(model, tmp_path, capsys):
    both = write_data(tmp_path / "both", {"64x64x5": 3, "32x64x9": 3}, text_len=5, text_dim=12)
    call = (model, "--data", both, "--output", tmp_path / "run", "--validation.samples", 1, "--dry-run")
    assert run(*call) == 0
    said = capsys.readouterr().out
    assert "tokens (2, 4, 4)" in said
    assert "tokens (3, 2, 4)" in said
    assert said.count("FP8 with 1 scale a tile") >= 4
    schedule = tmp_path / "one.json"
    FPSSchedule(grid=(2, 4, 4), regimes=(Regime(until=1.0, scales_per_tile=1),)).save(schedule)
    assert run(*call, "--schedule", schedule) == 2
    assert (
        "the data has videos of 2 sizes; take grid and tile out of it (null), or train one size"
        in capsys.readouterr().err
    )


def test_data_of_another_model_is_refused(model, data, tmp_path, capsys):
    other = write_data(tmp_path / "wide", {"64x64x5": 2}, text_len=5, text_dim=20)
    call = ("--output", tmp_path / "run", "--validation.samples", 0)
    assert run(model, "--data", other, *call) == 2
    assert (
        "have text states of width 20, the model takes 12; run fps-precompute with this model"
        in capsys.readouterr().err
    )
    assert run(model, "--data", data, "--schedule", tmp_path / "none.json", *call) == 2
    assert "none.json' doesn't exist; fps-calibrate makes one" in capsys.readouterr().err
    assert run(model, "--data", data, "--validation.samples", 8, *call[:2]) == 2
    assert "leaves none of 8 samples to train on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_comes_without_jax():
    code = """
import sys
from fps_train.commands.train import main
try:
    main(["--help"])
except SystemExit:
    assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in (
        "--preset",
        "--optimizer.learning-rate",
        "--lora.rank",
        "--validation.every",
        "--checkpoint.keep",
        "--flow.shift",
    ):
        assert word in done.stdout
