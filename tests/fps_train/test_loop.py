"""Runs: exact resumption, whatever stopped them; what they write; the guard against NaN."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fps_jax.checkpoints.format import save_checkpoint
from fps_jax.checkpoints.open import open_model, open_run
from fps_jax.checkpoints.runs import read_run
from fps_jax.models.dit import build_dit
from fps_jax.models.params import flatten, init_params, unflatten
from fps_train import loop
from fps_train.agreement import Stopped
from fps_train.batches import Batches
from fps_train.config import LoraOptions, TrainConfig
from fps_train.loop import train
from fps_train.metrics import Metrics, read_metrics
from fps_train.programs import Programs
from fps_train.run import check_resume, start_run
from fps_train.setup import prepare
from tests.fps_train.conftest import WAN
from tests.fps_train.models import CONFIG
from tests.fps_train.sample_data import write_data

ROOT = pathlib.Path(__file__).parents[2]


def lines(run, since=0):
    """What the numbers of a run are, without how long they took."""
    timing = {"seconds", "tokens_per_second", "mfu"}
    found = [
        {k: v for k, v in line.items() if k not in timing} for line in read_metrics(pathlib.Path(run) / "metrics.jsonl")
    ]
    return [line for line in found if line["step"] > since]


def assert_same_weights(run, other):
    for which in ("raw", "ema"):
        mine, theirs = (dict(flatten(read_run(pathlib.Path(r)).trained(which))) for r in (run, other))
        assert mine.keys() == theirs.keys()
        for path, value in mine.items():
            np.testing.assert_array_equal(value, theirs[path], err_msg=f"{which} {path}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Filled by `uninterrupted`: one run for all tests of this file."""
    return {"folder": tmp_path_factory.mktemp("whole")}


@pytest.fixture
def uninterrupted(whole, options):
    if "run" not in whole:
        began = time.monotonic()
        with contextlib.redirect_stderr(io.StringIO()) as told:
            whole["run"] = train(dataclasses.replace(options, output=str(whole["folder"] / "run")))
        whole |= {"told": told.getvalue().splitlines(), "seconds": time.monotonic() - began}
    return whole["run"]


def test_a_run_says_how_many_programs_it_compiles_and_how_long_each_took_before_its_first_step(uninterrupted, whole):
    """One size of video in two regimes."""
    told = whole["told"]
    first = next(
        i for i, line in enumerate(told) if line.startswith("step 0, validation") or "step 1 of 6: loss" in line
    )
    compiled = [line for line in told[:first] if "compil" in line or " of 3: " in line]
    assert compiled[0] == (
        "compiling 3 programs: 2 gradients (regimes of 1 size of video) and the update; validation's when it first runs"
    )
    took = [re.fullmatch(r"  (\d) of 3: (\d+) s", line) for line in compiled[1:]]
    assert [match and match[1] for match in took] == ["1", "2", "3"]
    assert sum(int(match[2]) for match in took if match) <= whole["seconds"] + 1.5  # each is rounded


def test_a_run_writes_what_it_is_and_what_it_saw(uninterrupted, options):
    seen = lines(uninterrupted, since=-1)
    steps = [line for line in seen if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        errors = list(line["error"].values())
        assert set(line["error"]) <= {"regime0", "regime1"}
        # Unweighted: the loss is the mean of errors, but for the order of sums.
        assert min(errors) * (1 - 1e-6) <= line["loss"] <= max(errors) * (1 + 1e-6)
        assert line["learning_rate"] == pytest.approx(1e-3)
    checked = [line for line in seen if "validation" in line]
    assert [line["step"] for line in checked] == [0, 3, 6]
    for line in checked[1:]:
        raw = line["validation"]["raw"]
        assert set(raw) == set(line["validation"]["ema"]) == {"regime0", "regime1", "mean"}
        assert min(raw["regime0"], raw["regime1"]) <= raw["mean"] <= max(raw["regime0"], raw["regime1"])
    assert checked[-1]["validation"]["raw"]["mean"] < checked[0]["validation"]["raw"]["mean"]
    written = TrainConfig.load(uninterrupted / "config.toml")
    here = {"output": str(uninterrupted), "schedule": written.schedule}  # the folder of another test
    assert written == dataclasses.replace(options, **here)
    assert read_run(uninterrupted).steps() == [3, 6]
    assert list((uninterrupted / "tensorboard").iterdir())


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(uninterrupted, options):
    train(dataclasses.replace(options, steps=3))
    train(options, resume=True)
    assert lines(options.output) == lines(uninterrupted)
    assert_same_weights(options.output, uninterrupted)


def test_a_run_goes_on_on_another_mesh_with_the_same_samples(uninterrupted, options):
    """Four devices, then two others: the losses of one device. On four a video is sampled too."""
    on_four = dataclasses.replace(
        options, mesh="fsdp=2,context=2", validation=dataclasses.replace(options.validation, videos=1, steps=1)
    )
    train(dataclasses.replace(on_four, steps=3), show=False)
    assert {p.name for p in (pathlib.Path(options.output) / "validation").iterdir()} == {"dense", "step_00000003"}
    train(dataclasses.replace(options, mesh="data=2"), resume=True, show=False)
    mine, theirs = lines(options.output), lines(uninterrupted)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for got, want in zip(mine, theirs, strict=True):
        if "loss" in got:
            np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-4)


def test_a_stop_signal_saves_the_step_and_resuming_loses_nothing(uninterrupted, options, monkeypatch):
    write = Metrics.write

    def stop_at_two(self, step, values):
        write(self, step, values)
        if step == 2 and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Metrics, "write", stop_at_two)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by signal 15 after step 3, which is saved; --resume goes on from there"):
        train(dataclasses.replace(options, checkpoint=dataclasses.replace(options.checkpoint, every=100)))
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert read_run(pathlib.Path(options.output)).steps() == [3]
    train(options, resume=True)
    got = [line for line in lines(options.output) if "loss" in line]
    assert got == [line for line in lines(uninterrupted) if "loss" in line]
    assert_same_weights(options.output, uninterrupted)


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(uninterrupted, options, tmp_path):
    """The process kills itself while the checkpoint of step 6 is being written."""
    options.save(tmp_path / "config.toml")
    code = """
import os, signal, sys
from fps_train import checkpoints, loop
from fps_train.config import TrainConfig
save = checkpoints.Checkpoints.save
def killed(self, state, notes, validation):
    save(self, state, notes, validation)
    if notes["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    self.wait()
checkpoints.Checkpoints.save = killed
loop.train(TrainConfig.load(sys.argv[1]))
"""
    paths = os.pathsep.join(str(ROOT / p) for p in ("", "train", "convert"))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config.toml")],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = pathlib.Path(options.output)
    assert read_run(run).steps() == [3]
    assert len(list((run / "checkpoints").iterdir())) > 1, "the kill came before the save began"
    train(options, resume=True)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["3", "6"]  # what was half-written is gone
    assert lines(run, since=3) == lines(uninterrupted, since=3)
    assert_same_weights(run, uninterrupted)


def test_a_nan_stops_the_run_and_names_where_it_arose(options, monkeypatch):
    at = Batches.at

    def poisoned(self, i):
        batch = at(self, i)
        if i == 8:  # the first microbatch of step 5
            batch.latents[0, 0, 0, 0, 0] = np.nan
        return batch

    monkeypatch.setattr(Batches, "at", poisoned)
    message = "NaN or inf at step 5 in the forward, first in the embeddings; step 3 is saved, the weights are as before"
    with pytest.raises(FloatingPointError, match=message):
        train(options)
    assert read_run(pathlib.Path(options.output)).steps() == [3]
    assert [line["step"] for line in lines(options.output) if "loss" in line] == [1, 2, 3, 4]


def test_a_nan_in_the_gradient_of_a_step_that_saves_leaves_the_checkpoint_before(uninterrupted, options, monkeypatch):
    """Loss and forward are finite. With one checkpoint kept, a save would have removed the one that is good."""
    own = dataclasses.replace(options, checkpoint=dataclasses.replace(options.checkpoint, keep=1))
    gradient, calls = Programs.gradient, []

    def poisoned(self, *args):
        sums, micro = gradient(self, *args)
        calls.append(micro)
        if len(calls) == 12:  # the second microbatch of step 6
            leaves = dict(flatten(sums))
            leaves["blocks/mlp/up/kernel"] = leaves["blocks/mlp/up/kernel"].at[1, 2, 3].set(np.nan)
            sums = unflatten(leaves)
        return sums, micro

    monkeypatch.setattr(Programs, "gradient", poisoned)
    message = (
        "NaN or inf at step 6 in the gradient of blocks/mlp/up/kernel, layer 1; step 3 is saved, the weights are as"
    )
    with pytest.raises(FloatingPointError, match=message):
        train(own)
    monkeypatch.undo()
    run = pathlib.Path(own.output)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["3"]
    assert max(line["step"] for line in lines(run)) == 5  # nor is anything seen or validated of it
    train(own, resume=True)
    assert lines(run, since=3) == lines(uninterrupted, since=3)
    assert_same_weights(run, uninterrupted)


def test_a_run_is_a_checkpoint_with_the_average_of_its_weights(uninterrupted, model):
    opened = open_model(uninterrupted)
    assert opened.layout == "run"
    assert opened.schedule is not None
    assert opened.schedule.tile == (1, 2, 4)
    dit = dict(flatten(jax.device_get(opened.load("dit", np.float32))))
    raw = dict(flatten(jax.device_get(open_run(uninterrupted, "raw").load("dit", np.float32))))
    base = dict(flatten(jax.device_get(open_model(model).load("dit", np.float32))))
    run = read_run(uninterrupted)
    for path, value in flatten(run.trained("ema")):
        np.testing.assert_array_equal(dit[path], value)
        assert base[path].shape == value.shape
    assert any((raw[path] != dit[path]).any() for path in dit)
    assert any((base[path] != dit[path]).any() for path in dit)
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 4; it has 3, 6"):
        run.trained(step=4)


def test_a_lora_run_leaves_the_base_alone_and_opens_merged(options, model):
    own = dataclasses.replace(
        options, steps=2, accumulate=1, lora=LoraOptions(rank=2, alpha=4.0, targets=("blocks/self_attn/q",)),
        optimizer=dataclasses.replace(options.optimizer, ema=0.0), attention="dense", schedule=None,
    )  # fmt: skip
    run = train(own)
    trained = dict(flatten(read_run(run).trained()))
    assert set(trained) == {"blocks/self_attn/q/lora_a", "blocks/self_attn/q/lora_b"}
    opened = open_model(run)
    assert opened.schedule is None
    dit = dict(flatten(jax.device_get(opened.load("dit", np.float32))))
    base = dict(flatten(jax.device_get(open_model(model).load("dit", np.float32))))
    changed = [path for path in base if (dit[path] != base[path]).any()]
    assert changed == ["blocks/self_attn/q/kernel"]
    product = 2.0 * np.einsum(
        "lir,lro->lio", trained["blocks/self_attn/q/lora_a"], trained["blocks/self_attn/q/lora_b"]
    )
    np.testing.assert_allclose(dit[changed[0]] - base[changed[0]], product, atol=1e-6)
    with pytest.raises(ValueError, match="keeps no moving average"):
        open_run(run, "ema")


def test_what_a_lora_froze_is_what_it_started_from_after_a_stop_too(uninterrupted, options):
    """`--init-from` names weights that aren't the model's, and a run's folder has them in no checkpoint of its own."""
    own = dataclasses.replace(
        options, steps=2, accumulate=1, lora=LoraOptions(rank=2, targets=("self_attn/q",)), attention="dense", schedule=None,
        optimizer=dataclasses.replace(options.optimizer, ema=0.0), validation=dataclasses.replace(options.validation, every=1),
        checkpoint=dataclasses.replace(options.checkpoint, every=1),
    )  # fmt: skip
    whole = train(dataclasses.replace(own, init_from=str(uninterrupted)))
    stopped = dataclasses.replace(own, output=f"{own.output}_stopped")
    train(dataclasses.replace(stopped, steps=1, init_from=str(uninterrupted)))
    train(stopped, resume=True)
    assert lines(stopped.output, since=-1) == lines(whole, since=-1)
    assert TrainConfig.load(whole / "config.toml").init_from == str(uninterrupted)  # so that --config repeats it
    started, got = (
        dict(flatten(jax.device_get(open_model(r).load("dit", np.float32)))) for r in (uninterrupted, whole)
    )
    assert [path for path in got if (got[path] != started[path]).any()] == ["blocks/self_attn/q/kernel"]


@pytest.mark.parametrize("mesh", ["", "fsdp=2"])
def test_a_teacher_keeps_the_weights_that_the_run_starts_from(options, mesh):
    """All its share on a teacher of those very weights: nothing to learn at first, then what one step moved."""
    own = dataclasses.replace(
        options, steps=2, accumulate=1, attention="dense", schedule=None, teacher_weight=1.0, text_dropout=0.0, mesh=mesh,
        validation=dataclasses.replace(options.validation, every=0),
        optimizer=dataclasses.replace(options.optimizer, weight_decay=1.0),
    )  # fmt: skip
    first, second = (line["loss"] for line in lines(train(own)))
    assert first <= 1e-9
    assert second > 1e-6


def test_a_model_that_reads_images_trains_on_what_its_data_hold(options, tmp_path):
    config = dataclasses.replace(CONFIG, task="i2v", in_channels=12, image_dim=3)
    params = jax.jit(functools.partial(init_params, build_dit(config)))(jax.random.key(0))
    save_checkpoint(tmp_path / "i2v", dataclasses.replace(WAN, dit=config), {"dit": jax.device_get(params)})
    data = write_data(tmp_path / "data", {"64x64x5": 4}, task="i2v", text_len=CONFIG.text_len, text_dim=CONFIG.text_dim)
    own = dataclasses.replace(
        options, model=str(tmp_path / "i2v"), data=str(data), steps=1, accumulate=1, attention="dense", schedule=None,
        validation=dataclasses.replace(options.validation, every=1, samples=1),
    )  # fmt: skip
    before, after = (line["validation"] for line in lines(train(own), since=-1) if "validation" in line)
    assert after["raw"]["mean"] != before["raw"]["mean"]
    trained = dict(flatten(read_run(pathlib.Path(own.output)).trained("raw")))
    moved = [path for path, value in flatten(jax.device_get(params)) if (value != trained[path]).any()]
    assert {"image_embedding", "patch_embedding"} <= {path.split("/")[0] for path in moved}
    with pytest.raises(ValueError, match="are for i2v, the model is t2v; run fps-precompute with this model"):
        train(dataclasses.replace(own, model=options.model, output=f"{own.output}_t2v"))


def test_a_folder_is_never_overwritten(uninterrupted, options, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run; --resume continues it, another --output starts anew"):
        train(dataclasses.replace(options, output=str(uninterrupted)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        train(dataclasses.replace(options, output=str(tmp_path / "mine")))


def test_a_run_that_is_complete_says_so(uninterrupted, options, capsys):
    again = dataclasses.replace(options, output=str(uninterrupted))
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert train(again, resume=True) == uninterrupted
    assert "has all 6 steps already; give more --steps to go on" in capsys.readouterr().err
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_run_of_a_model_that_lies_elsewhere_now_goes_on(options, model, tmp_path):
    """As on another host, or after it was moved: weights are known by their files, and there are none to start from but its own."""
    before = tmp_path / "before"
    shutil.copytree(model, before)
    setup = prepare(dataclasses.replace(options, model=str(before)))
    start_run(setup.directory, setup.options, setup.model, setup.parts, setup.schedule, setup.data.fingerprint)
    shutil.rmtree(before)
    now = prepare(options)
    assert check_resume(now.directory, options, now.model, now.parts, now.schedule, now.data.fingerprint) is None


def test_another_method_or_data_is_no_resumption(uninterrupted, options, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "start", lambda *_: pytest.fail("weights were read before the check"))
    other = write_data(tmp_path / "other", {"64x64x5": 5}, text_len=CONFIG.text_len, text_dim=CONFIG.text_dim)
    own = dataclasses.replace(options, output=str(uninterrupted))
    schedule = json.loads(pathlib.Path(str(options.schedule)).read_text())
    schedule["regimes"][0]["window"] = [2, 2, 1]
    (tmp_path / "other.json").write_text(json.dumps(schedule))
    cases = [
        ({"data": str(other)}, "was of other data than this call; resume it with its own"),
        ({"schedule": str(tmp_path / "other.json")}, "had another schedule than this call"),
        ({"attention": "sparse"}, "had another schedule than this call"),
        ({"lora": LoraOptions(rank=2)}, "had other adapters than this call"),
        ({"seed": 1}, "seed=1, but the run in .* has 0; resume it with that, or start anew with --init-from"),
        ({"flow": dataclasses.replace(options.flow, shift=3.0)}, "flow.shift=3.0, but the run in .* has 1.0"),
        # Other samples held out are other samples trained on.
        (
            {"validation": dataclasses.replace(options.validation, samples=1)},
            "validation.samples=1, but the run in .* has",
        ),
        ({"init_from": "x"}, "init_from='x', but the run in .* has None; resume it with that, or start anew"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(own, **change), resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        train(options, resume=True)
    with pytest.raises(ValueError, match="init_from='x' was given with from_scratch"):
        dataclasses.replace(own, from_scratch=True, init_from="x")
