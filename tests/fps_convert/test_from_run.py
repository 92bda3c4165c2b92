"""A run of fps-train to torch files: its weights or their average, its LoRA merged or apart, its schedule beside them."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from fps_convert.cli import main
from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_jax.checkpoints.format import save_component
from fps_jax.checkpoints.open import open_model
from fps_jax.models.lora import LoRAConfig, init_lora, merge_lora
from fps_jax.models.params import flatten, unflatten
from tests.checkpoints import T2V, TINY, tiny_dit

SCHEDULE = FPSSchedule(regimes=(Regime(until=1.0, scales_per_tile=1, density=0.5),))


def write_run(folder: pathlib.Path, model, items, lora=None, base=None) -> pathlib.Path:
    """What fps-train leaves: `items` are the newest checkpoint's components."""
    record = {"format": "fps_train", "version": 1, "model": str(model), "base": str(base or model)}
    record["lora"] = lora and dataclasses.asdict(lora)
    step = folder / "checkpoints" / "5"
    step.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    SCHEDULE.save(folder / "fps_schedule.json")
    for name, params in items.items():
        save_component(step / name, params)
    return folder


def scaled(factor):
    return jax.tree.map(lambda a: np.asarray(a) * np.float32(factor), tiny_dit())


def dit_of(path):
    return dict(flatten(jax.device_get(open_model(path).load("dit", np.float32))))


def convert(*argv):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return stop.value.code


@pytest.mark.parametrize(("option", "factor"), [((), 3), (("--weights", "ema"), 3), (("--weights", "raw"), 2)])
def test_weights_and_schedule_come_out_as_they_were_trained(option, factor, tmp_path):
    run = write_run(tmp_path / "run", T2V, {"params": scaled(2), "ema": scaled(3)})
    assert convert("to-torch", run, tmp_path / "out", "--layout", "official", *option) == 0
    got, expected = dit_of(tmp_path / "out"), dict(flatten(scaled(factor)))
    for path, value in expected.items():  # the model is float32, as what is trained
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    assert open_model(tmp_path / "out").schedule == SCHEDULE
    vae = [dict(flatten(open_model(p).load("vae", np.float32))) for p in (T2V, tmp_path / "out")]
    for path, value in vae[0].items():
        np.testing.assert_array_equal(value, vae[1][path])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.audit.json", "run"]


def test_a_run_on_a_run_and_on_our_format(tmp_path):
    ours = tmp_path / "ours"
    assert convert("to-flax", T2V, ours) == 0
    first = write_run(tmp_path / "first", ours, {"params": scaled(2)})
    mlp = unflatten({path: leaf for path, leaf in flatten(scaled(5)) if "/mlp/" in path})
    second = write_run(tmp_path / "second", first, {"params": mlp})  # trained a part
    assert convert("to-torch", second, tmp_path / "out", "--layout", "diffusers") == 0
    got = dit_of(tmp_path / "out")
    for path, value in flatten(tiny_dit()):
        np.testing.assert_array_equal(got[path], value * (5 if "/mlp/" in path else 2), err_msg=path)
    for path, value in dit_of(second).items():
        np.testing.assert_array_equal(got[path], value)


@pytest.mark.parametrize("dense", [False, True])
def test_the_schedule_of_the_model_gives_way_to_the_run_s(dense, tmp_path):
    shutil.copytree(T2V, tmp_path / "model")
    FPSSchedule(regimes=(Regime(until=1.0),)).save(tmp_path / "model" / "fps_schedule.json")
    run = write_run(tmp_path / "run", tmp_path / "model", {"params": scaled(2)})
    if dense:
        (run / "fps_schedule.json").unlink()
    assert convert("to-torch", run, tmp_path / "out", "--layout", "diffusers") == 0
    assert open_model(tmp_path / "out").schedule == (None if dense else SCHEDULE)


def test_what_was_frozen_is_of_the_checkpoint_that_the_run_started_from(tmp_path):
    other = write_run(tmp_path / "other", T2V, {"params": scaled(7)})
    mlp = unflatten({path: leaf for path, leaf in flatten(scaled(5)) if "/mlp/" in path})
    run = write_run(tmp_path / "run", T2V, {"params": mlp}, base=other)
    assert convert("to-torch", run, tmp_path / "out", "--layout", "diffusers") == 0
    for got in (dit_of(run), dit_of(tmp_path / "out")):
        for path, value in flatten(tiny_dit()):
            np.testing.assert_array_equal(got[path], value * (5 if "/mlp/" in path else 7), err_msg=path)


def test_a_lora_comes_out_merged_or_apart(tmp_path):
    lora = LoRAConfig(rank=2, alpha=6.0, targets=("blocks/self_attn/[qk]",))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(np.float32), init_lora(TINY, lora, jax.random.key(0))
    )
    run = write_run(tmp_path / "run", T2V, {"params": adapters}, lora)
    assert convert("to-torch", run, tmp_path / "out", "--layout", "diffusers") == 0
    merged = dict(flatten(merge_lora(tiny_dit(), adapters, lora)))
    for path, value in dit_of(tmp_path / "out").items():
        # Float32 sums of values up to 16
        np.testing.assert_allclose(value, merged[path], rtol=1e-6, atol=4e-6, err_msg=path)
    assert convert("to-torch", run, tmp_path / "apart", "--lora", "apart") == 0
    assert sorted(p.name for p in (tmp_path / "apart").iterdir()) == ["fps_schedule.json", "lora.safetensors"]
    assert convert("to-flax", T2V, tmp_path / "again", "--lora", tmp_path / "apart" / "lora.safetensors") == 0
    out = dit_of(tmp_path / "out")
    for path, value in dit_of(tmp_path / "again").items():
        np.testing.assert_allclose(value, out[path], rtol=1e-6, atol=4e-6, err_msg=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--layout", "official", "--weights", "ema"),
            "keeps no moving average (optimizer.ema = 0); take the raw weights",
        ),
        (("--lora", "apart"), "trains weights, not adapters; leave --lora out"),
        (("--lora", "apart", "--layout", "official"), "a file that all layouts share; leave it out"),
        ((), "--layout is missing; whose file names and keys to write: one of 'official', 'diffusers', 'comfyui'"),
    ],
)
def test_what_a_run_doesn_t_have_is_said_in_one_line(options, message, tmp_path, capsys):
    run = write_run(tmp_path / "run", T2V, {"params": scaled(2)})
    assert convert("to-torch", run, tmp_path / "out", *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_without_a_checkpoint_or_of_a_lost_model_is_told(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(
        json.dumps({"format": "fps_train", "version": 1, "model": "x", "base": "x", "lora": None})
    )
    assert convert("to-torch", tmp_path / "run", tmp_path / "out", "--layout", "official") == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    run = write_run(tmp_path / "second", tmp_path / "gone", {"params": scaled(2)})
    assert convert("to-torch", run, tmp_path / "out", "--layout", "official") == 2
    assert "gone' doesn't exist" in capsys.readouterr().err
    assert convert("to-torch", T2V, tmp_path / "out", "--layout", "official", "--weights", "ema") == 2
    assert "is no run of fps-train; leave it out" in capsys.readouterr().err
