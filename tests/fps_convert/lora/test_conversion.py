"""LoRAs merged while a checkpoint is converted: in float32 before the cast, on the command line as in Python."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fps_convert import cli, open_checkpoint, to_flax
from fps_jax.checkpoints.format import load_component
from fps_jax.models.params import flatten
from tests.checkpoints import T2V
from tests.lora_spellings import CASES, draw


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for case in ("ours", "partial", "image"):
        save_file({key: np.asarray(value) for key, value in CASES[case][0].items()}, folder / f"{case}.safetensors")
    return folder


def run(*argv) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    return stop.value.code


def test_the_command_merges_several_before_it_casts(files, tmp_path, capsys):
    loras = [f"{files / 'ours.safetensors'}:0.5", files / "partial.safetensors"]
    assert run("to-flax", T2V, tmp_path / "out", "--dtype", "bfloat16", "--lora", *loras) == 0
    assert "LoRA ours.safetensors: 90 of 90 tensors change 30 parameters" in capsys.readouterr().out
    base = dict(flatten(open_checkpoint(T2V).load("dit")))
    got = dict(flatten(load_component(tmp_path / "out" / "dit")))
    delta = (draw("blocks.2.ffn.2.B", 64, 4).astype(np.float64) @ draw("blocks.2.ffn.2.A", 4, 128)).T
    path = "blocks/mlp/down/kernel"
    want = base[path][2].astype(np.float64) + (0.5 * 1.5 + 1) * delta
    assert (
        got[path][2] != want.astype(jnp.bfloat16)
    ).mean() < 1e-3  # a float32 sum that falls to the other side of a tie
    for name, leaf in got.items():
        same = np.array_equal(leaf, base[name].astype(jnp.bfloat16))
        assert same == (not name.startswith("blocks/") or not name.endswith("kernel")), name
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [(lora["used"], lora["scale"]) for lora in audit["loras"]] == [(90, 0.5), (12, 1.0)]
    manifest = json.loads((tmp_path / "out" / "config.json").read_text())
    assert manifest["loras"][1] == {"file": str(files / "partial.safetensors"), "scale": 1.0}


def test_loading_merges_as_saving_does(files, tmp_path):
    to_flax(T2V, tmp_path / "out", loras=[(files / "partial.safetensors", 2.0)])
    from fps_convert.lora.read import open_lora
    from fps_jax.checkpoints.lora import Scaled

    source = open_checkpoint(T2V)
    source.loras = [Scaled(open_lora(files / "partial.safetensors", source.config), 2.0)]
    saved = dict(flatten(load_component(tmp_path / "out" / "dit")))
    for path, leaf in flatten(source.load("dit")):
        np.testing.assert_array_equal(leaf, saved[path])


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("image.safetensors", "error: .*image.safetensors has 'diffusion_model.blocks.0.cross_attn.k_img"),
        ("none.safetensors", "none.safetensors' doesn't exist"),
        ("ours.safetensors:x", "is not FILE or FILE:SCALE"),
    ],
)
def test_a_wrong_lora_is_one_line_and_writes_nothing(files, tmp_path, capsys, lora, message):
    import re

    assert run("to-flax", T2V, tmp_path / "out", "--lora", files / lora) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert list(tmp_path.iterdir()) == []
