"""Bad arguments, destinations and disks: one line, exit status 2, nothing lost and nothing half-written."""

import errno
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import fps_convert.cli
import fps_jax
from fps_convert import open_checkpoint, to_flax, to_torch
from fps_convert.formats import array_files
from fps_jax.checkpoints.format import is_checkpoint
from tests.fps_convert.failing import fails, snapshot
from tests.fps_convert.tensors import read_all, rewrite

DIT = "diffusion_pytorch_model.safetensors"


def test_wrong_arguments(capsys, pristine, tmp_path):
    assert "to-flax, to-torch" in fails(capsys)
    assert "src" in fails(capsys, "to-flax").lower()
    assert "int8" in fails(capsys, "to-flax", pristine("official"), tmp_path / "out", "--dtype", "int8")
    assert "layout" in fails(capsys, "to-torch", pristine("official"), tmp_path / "out")
    assert "--sharpen" in fails(capsys, "to-flax", "a", "b", "--sharpen")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="dtype='int8' is none of bfloat16, float16, float32"):
        to_flax("a", "b", dtype="int8")
    with pytest.raises(ValueError, match="layout='comfy' is none of official, diffusers"):
        to_torch("a", "b", layout="comfy")  # type: ignore[arg-type]


def test_destinations_that_cant_be(capsys, source, tmp_path):
    path = source("official")
    (tmp_path / "file").write_text("kept")
    before = snapshot(tmp_path)
    assert "overlap" in fails(capsys, "to-flax", path, path)
    assert "overlap" in fails(capsys, "to-flax", path, path / "inner")
    assert "overlap" in fails(capsys, "to-flax", path, path.parent, "--overwrite")
    assert "is a file" in fails(capsys, "to-flax", path, tmp_path / "file")
    assert "can't be written" in fails(capsys, "to-flax", path, tmp_path / "file" / "under")
    assert "can't be written" in fails(capsys, "to-flax", path, "/proc/nowhere/out")
    assert snapshot(tmp_path) == before


def test_an_existing_destination_needs_overwrite_and_is_lost_only_to_a_whole_one(capsys, source, tmp_path):
    path, out = source("official"), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    assert "--overwrite" in fails(capsys, "to-flax", path, out)
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    rewrite(broken / DIT, lambda t: t.pop("head.head.bias"))
    before = snapshot(tmp_path)
    fails(capsys, "to-flax", broken, out, "--overwrite")
    assert snapshot(tmp_path) == before
    to_flax(path, out, overwrite=True)
    assert not (out / "precious").exists()
    assert is_checkpoint(out)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "broken", "out"}


def test_an_empty_destination_and_missing_parents_are_fine(pristine, tmp_path):
    (tmp_path / "out").mkdir()
    to_flax(pristine("official"), tmp_path / "out")
    to_flax(pristine("official"), tmp_path / "a" / "b" / "out")
    assert is_checkpoint(tmp_path / "out")
    assert is_checkpoint(tmp_path / "a" / "b" / "out")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device", "x"), KeyboardInterrupt()])
def test_a_failure_halfway_leaves_nothing(capsys, pristine, tmp_path, monkeypatch, error):
    old = tmp_path / "out"
    to_flax(pristine("official"), old)
    before = snapshot(tmp_path)
    written, write = [], array_files.write_at

    def stop(*args):
        written.append(args)
        if len(written) == 40:
            raise error
        write(*args)

    monkeypatch.setattr(array_files, "write_at", stop)
    with pytest.raises(SystemExit) as status:
        fps_convert.cli.main(["to-flax", str(pristine("official")), str(old), "--overwrite"])
    assert len(written) >= 40
    assert status.value.code == (2 if isinstance(error, OSError) else 130)
    assert capsys.readouterr().err in ("error: x: No space left on device\n", "error: interrupted\n")
    assert snapshot(tmp_path) == before


def test_a_full_disk_on_the_way_back_leaves_nothing(capsys, pristine, tmp_path, monkeypatch):
    from fps_convert.formats import writers

    to_flax(pristine("official"), tmp_path / "ours")
    before = snapshot(tmp_path)

    def stop(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writers, "write_at", stop)
    for layout in ("official", "diffusers"):
        message = fails(capsys, "to-torch", tmp_path / "ours", tmp_path / "back", "--layout", layout)
        assert "No space left on device" in message
        assert snapshot(tmp_path) == before


def test_too_little_space_is_told_before_the_work(capsys, pristine, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = fails(capsys, "to-flax", pristine("official"), tmp_path / "out")
    assert "not enough disk space: needs 18.2 MB, 1.0 MB are free; make room, or choose another path" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["official", "comfyui"])
def test_a_vae_of_its_own_isnt_written_where_it_couldnt_be_read_again(capsys, tmp_path, layout):
    """The package's demo model: 6 latent channels, with statistics that only diffusers' config.json holds."""
    demo = pathlib.Path(fps_jax.__file__).parent / "demo_models" / "dense"
    to_flax(demo, tmp_path / "ours")
    before = snapshot(tmp_path)
    message = fails(capsys, "to-torch", tmp_path / "ours", tmp_path / "back", "--layout", layout)
    names = "z_dim, num_res_blocks, latents_mean, latents_std"
    assert (
        f"this model's VAE has {names} of its own, and {layout} files have no place for that; give --layout diffusers"
        in message
    )
    assert snapshot(tmp_path) == before


def test_damage_to_our_own_format(capsys, pristine, tmp_path):
    ours = tmp_path / "ours"
    to_flax(pristine("official"), ours)

    def back() -> str:
        return fails(capsys, "to-torch", ours, tmp_path / "back", "--layout", "official")

    assert "doesn't exist" in fails(capsys, "to-torch", tmp_path / "no", tmp_path / "back", "--layout", "official")
    message = fails(capsys, "to-torch", pristine("official"), tmp_path / "back", "--layout", "official")
    assert "is not a checkpoint of this project" in message
    whole = (ours / "config.json").read_text()
    (ours / "config.json").write_text(whole[:100])
    assert "config.json is not valid JSON" in back()
    edit = json.loads(whole)
    (ours / "config.json").write_text(json.dumps(edit | {"version": 99}))
    assert "format version 99" in back()
    (ours / "config.json").write_text(json.dumps(edit | {"components": ["dit"]}))
    assert "has no vae" in back()
    changed = json.loads(whole)
    changed["config"]["dit"]["mlp_dim"] = 65
    (ours / "config.json").write_text(json.dumps(changed))
    assert "'blocks/mlp/up/kernel' has shape [2, 48, 64], its config says [2, 48, 65]" in back()
    (ours / "config.json").write_text(whole)
    chunk = next((ours / "dit" / "blocks.modulation").glob("[0-9]*"))
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-4])
    assert f"{chunk} has {len(data) - 4} bytes" in back()
    chunk.unlink()
    assert f"{chunk} is missing" in back()
    chunk.write_bytes(data)
    shutil.rmtree(ours / "vae")
    assert "vae is missing" in back()
    assert {p.name for p in tmp_path.iterdir()} == {"ours"}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["--base", "", "out"], "base"), (["--base", "src", "--dit", "", "out"], "dit"), (["--base", "src", ""], "DST")],
)
def test_an_empty_name_is_not_the_working_directory(arguments, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        fps_convert.cli.main(["to-flax", *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {name}='' is empty; give a path\n"


def test_the_command_in_a_process_of_its_own(source, tmp_path):
    """One line on stderr and status 2 without --debug, the traceback too with it; and it works."""
    path = source("official")

    def run(*argv):
        command = [sys.executable, "-m", "fps_convert.cli", *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2])
        # What a busy machine is told while it waits.
        done.stderr = re.sub(
            r"^(starting|at work|converting)( \.\.\.|: \d+%) \d+ s\n", "", done.stderr, flags=re.MULTILINE
        )
        return done

    bad = run("to-flax", tmp_path / "nowhere", tmp_path / "out")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == f"error: {tmp_path}/nowhere doesn't exist; give a Wan2.1 directory, official or diffusers\n"
    debug = run("to-flax", tmp_path / "nowhere", tmp_path / "out", "--debug")
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(bad.stderr)
    good = run("to-flax", path, tmp_path / "out")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("t2v model, official layout: dit, vae, text_encoder\n")
    assert good.stdout.endswith(f"report: {tmp_path}/out/audit.json\n")
    back = run("to-torch", tmp_path / "out", tmp_path / "back", "--layout", "official")
    assert (back.returncode, back.stderr) == (0, "")
    assert read_all(tmp_path / "back") == read_all(path)
    assert (tmp_path / "back.audit.json").is_file()


def test_arguments_are_parsed_without_jax():
    code = "import sys, fps_convert, fps_convert.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2]).returncode == 0


def test_open_checkpoint_reads_no_weights(pristine):
    source = open_checkpoint(pristine("official", "i2v"))
    assert source.layout == "official"
    assert source.components == ("dit", "vae", "text_encoder", "image_encoder")
    assert (source.tokenizer_dir / "tokenizer.json").is_file()
