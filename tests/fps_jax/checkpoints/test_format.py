"""Checkpoints on disk: written whole or not at all, read back in any dtype and placement, damage named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fps_convert.synthetic import tiny_config
from fps_jax.checkpoints.format import (
    abstract_component,
    check_tokenizer,
    copy_tokenizer,
    empty_aligned,
    is_checkpoint,
    load_component,
    read_config,
    save_checkpoint,
    save_component,
)
from fps_jax.errors import one_line, run_cli
from fps_jax.models.params import flatten


def params():
    rng = np.random.default_rng(0)
    return {
        "blocks": {"kernel": rng.standard_normal((3, 4, 8), np.float32).astype(ml_dtypes.bfloat16)},
        "norm": {"scale": rng.standard_normal(8, np.float32)},
    }


@pytest.fixture
def saved(tmp_path):
    save_component(tmp_path / "dit", params())
    return tmp_path / "dit"


def test_numpy_in_numpy_out(saved):
    got, want = dict(flatten(load_component(saved))), dict(flatten(params()))
    assert got.keys() == want.keys()
    for path in want:
        assert isinstance(got[path], np.ndarray)
        assert got[path].dtype == want[path].dtype
        np.testing.assert_array_equal(got[path], want[path])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract_component(saved)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params()
    )


def test_jax_arrays_are_saved_too(tmp_path):
    save_component(tmp_path / "dit", jax.tree.map(jnp.asarray, params()))
    np.testing.assert_array_equal(load_component(tmp_path / "dit")["norm"]["scale"], params()["norm"]["scale"])


def test_dtype_casts_while_reading(saved):
    got = load_component(saved, dtype=lambda path: np.float32 if path == "blocks/kernel" else None)
    assert got["blocks"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(got["blocks"]["kernel"], params()["blocks"]["kernel"].astype(np.float32))
    got = load_component(saved, dtype="bfloat16")
    assert got["norm"]["scale"].dtype == ml_dtypes.bfloat16


def test_shardings_put_arrays_on_a_mesh(saved):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    last = jax.sharding.NamedSharding(mesh, jax.P(None, None, "x"))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    got = load_component(saved, shardings=lambda path: last if path == "blocks/kernel" else whole)
    kernel = got["blocks"]["kernel"]
    assert kernel.sharding == last
    assert kernel.addressable_shards[0].data.shape == (3, 4, 1)
    np.testing.assert_array_equal(kernel, params()["blocks"]["kernel"])
    assert load_component(saved, shardings=whole)["norm"]["scale"].sharding == whole


def test_a_component_of_another_model_is_named(saved):
    assert load_component(saved, expected=params()).keys() == params().keys()
    more = params() | {"head": np.zeros(3)}
    with pytest.raises(ValueError, match=r"dit lacks parameter 'head' for this config"):
        load_component(saved, expected=more)
    with pytest.raises(ValueError, match=r"dit has an unknown parameter 'norm/scale'"):
        load_component(saved, expected={"blocks": params()["blocks"]})
    other = params() | {"norm": {"scale": np.zeros(9)}}
    with pytest.raises(ValueError, match=r"parameter 'norm/scale' has shape \[8\], its config says \[9\]"):
        load_component(saved, expected=other)


def test_damage_is_named(saved):
    with pytest.raises(FileNotFoundError, match="vae is missing"):
        load_component(saved.parent / "vae")
    chunk = next((saved / "blocks.kernel").glob("[0-9]*"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(ValueError, match="dit can't be read"):
        load_component(saved)
    (saved / "_METADATA").unlink()
    with pytest.raises(ValueError, match="dit is not a whole orbax directory"):
        load_component(saved)


def test_float64_is_not_silently_narrowed(tmp_path):
    with pytest.raises(NotImplementedError, match="x is float64, which JAX would store as float32"):
        save_component(tmp_path / "c", {"x": np.zeros(3)})


def test_aligned_buffers_are_taken_over_without_a_copy():
    buffer = empty_aligned((5, 7), ml_dtypes.bfloat16)
    assert buffer.ctypes.data % 64 == 0
    assert buffer.shape == (5, 7)
    alias = jax.device_put(buffer, jax.local_devices(backend="cpu")[0], may_alias=True)
    assert alias.unsafe_buffer_pointer() == buffer.ctypes.data


def test_a_whole_checkpoint(tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    config = dataclasses.replace(tiny_config("i2v"), flow_shift=4.0)
    save_checkpoint(tmp_path / "out", config, {"dit": params()}, tmp_path / "tok")
    assert is_checkpoint(tmp_path / "out")
    assert read_config(tmp_path / "out") == config
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save_checkpoint(tmp_path / "out", config, {"dit": params()})
    save_checkpoint(tmp_path / "out", config, {"dit": params()}, overwrite=True)
    assert not (tmp_path / "out" / "tokenizer").exists()
    with pytest.raises(ValueError, match="'unet' is none of dit, vae"):
        save_checkpoint(tmp_path / "other", config, {"unet": params()})
    assert {path.name for path in tmp_path.iterdir()} == {"tok", "out"}


def test_a_tokenizer_may_link_into_a_hugging_face_cache_and_nowhere_else(tmp_path):
    model, disk, mine = tmp_path / "hub" / "models--a--b", tmp_path / "disk", tmp_path / "mine"
    snapshot = model / "snapshots" / "0" / "tokenizer"
    for folder in (snapshot, disk, mine, model / "blobs"):
        folder.mkdir(parents=True)
    (model / "blobs" / "1f").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../../blobs/1f")
    (mine / "tokenizer.json").symlink_to(snapshot / "tokenizer.json")  # a folder made by hand of a cache's files
    for number, folder in enumerate((snapshot, mine)):
        copy_tokenizer(folder, tmp_path / f"copy{number}")
        assert not (tmp_path / f"copy{number}" / "tokenizer.json").is_symlink()
    (disk / "1f").write_text("{}")
    (model / "blobs" / "1f").unlink()
    (model / "blobs").rmdir()
    (model / "blobs").symlink_to(disk)  # the cache's large files are on another disk
    assert check_tokenizer(snapshot) == {"tokenizer.json": disk / "1f"}
    (snapshot / "spiece.model").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("mine")
    with pytest.raises(ValueError, match=r"spiece.model is a link to .*secret, outside of its folder"):
        save_checkpoint(tmp_path / "out", tiny_config("t2v"), {"dit": {"no": "parameters"}}, snapshot)


def test_config_json_that_cant_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="doesn't exist"):
        read_config(tmp_path / "no")
    assert not is_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="is not a checkpoint of this project"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)
    manifest = {"format": "fps_jax", "version": 1, "config": tiny_config().to_dict() | {"depth": 1}}
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="doesn't describe a Wan model"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\n  lines"), 2, "error: two lines\n"),
        (OSError(28, "No space left on device", "/a/b"), 2, "error: /a/b: No space left on device\n"),
        (FileNotFoundError("plain"), 2, "error: plain\n"),
        (KeyError("x"), 2, "error: 'x' (KeyError: a defect; --debug shows where)\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (SystemExit(0), 0, ""),
        (None, 0, ""),
    ],
)
def test_command_lines_end_in_one_line(capsys, error, status, line):
    def main(_):
        if error is not None:
            raise error

    assert run_cli(main, []) == status
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback_and_is_not_an_argument(capsys):
    seen = []

    def main(argv):
        seen.append(argv)
        raise ValueError("bad")

    assert run_cli(main, ["--a", "--debug", "b"]) == 2
    assert seen == [["--a", "b"]]
    captured = capsys.readouterr().err
    assert captured.startswith("Traceback")
    assert captured.endswith("error: bad\n")
    assert one_line(ValueError()) == "ValueError"
