"""fps-sample: what it writes, and one line on stderr with exit status 2 for anything wrong."""

import io
import json
import re
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from fps_convert.synthetic import tiny_config
from fps_jax.causal import CausalConfig
from fps_jax.checkpoints.format import write_config
from fps_jax.commands import info, sample
from fps_jax.config import WanConfig
from tests.checkpoints import T2V, TINY, assemble
from tests.lora_spellings import CASES

SMALL = ["--height", "32", "--width", "48", "--num-frames", "5", "--num-inference-steps", "2", "--dtype", "float32"]


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        sample.main([str(a) for a in argv])
    return stop.value.code


def test_sample_writes_a_video_and_its_settings(tmp_path, capsys):
    import av

    out = tmp_path / "cat.mp4"
    assert run(T2V, "--prompt", "A cat", "--output", out, *SMALL, "--seed", "3", "--fps", "8") == 0
    with av.open(str(out)) as container:
        frames = list(container.decode(video=0))
        assert (len(frames), frames[0].width, frames[0].height) == (5, 48, 32)
        assert container.streams.video[0].average_rate == 8
    record = json.loads((tmp_path / "cat.mp4.json").read_text())
    assert record["settings"]["seed"] == 3
    assert record["settings"]["flow_shift"] == 3.0  # the checkpoint's own, filled in
    assert record["settings"]["negative_prompt"].startswith("色调艳丽")
    assert set(record["versions"]) == {"fps_jax", "jax", "python"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat.mp4", "cat.mp4.json"]
    assert "wrote" in capsys.readouterr().err


def test_a_causal_checkpoint_is_refused_before_its_weights_are_read(tmp_path, capsys):
    """It has none, so nobody read them."""
    (tmp_path / "causal").mkdir()
    write_config(tmp_path / "causal", WanConfig(dit=TINY, causal=CausalConfig()))
    assert run(tmp_path / "causal", "--prompt", "A cat", "--output", tmp_path / "cat.mp4") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: this checkpoint makes video block after block (block diffusion)")
    assert "use fps-stream (CausalPipeline)" in err
    assert err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["causal"]


def test_sample_latents_in_and_out(tmp_path):
    noise = np.random.default_rng(0).normal(size=(1, 16, 2, 4, 6)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    out = tmp_path / "latents.npy"
    arguments = ["--prompt", "A cat", "--latents", tmp_path / "noise.npy", "--output", out, "--output-type", "latent"]
    assert run(T2V, *arguments, *SMALL) == 0
    assert np.load(out).shape == noise.shape


def test_a_profile_says_where_the_time_goes_and_changes_nothing(tmp_path, capsys, monkeypatch):
    """Stages make up the whole but for what no stage has, here at most a third: the reading of configs, of a run of a second."""
    from fps_jax.sampling import denoise, pipeline

    plain, out, profile = tmp_path / "plain.npy", tmp_path / "out.npy", tmp_path / "profile"
    arguments = ["--prompt", "A cat", "--output-type", "latent", *SMALL]
    assert run(T2V, *arguments, "--output", plain) == 0
    programs = denoise._denoise._cache_size()
    encode = pipeline.text_states

    def slow(*args, **kwargs):
        time.sleep(0.5)
        return encode(*args, **kwargs)

    monkeypatch.setattr(pipeline, "text_states", slow)
    assert run(T2V, *arguments, "--output", out, "--profile", profile) == 0
    assert "wrote" in capsys.readouterr().err
    assert out.read_bytes() == plain.read_bytes()
    assert denoise._denoise._cache_size() == programs
    record = json.loads((profile / "profile.json").read_text())
    stages = record["stages"]
    assert list(stages) == ["load", "prepare", "encode text", "denoise", "write"]
    assert stages["encode text"]["calls"] == 2
    assert stages["encode text"]["seconds"] >= 1
    assert stages["denoise"]["compile_seconds"] == 0  # the program is that of the first run
    seconds = sum(one["seconds"] for one in stages.values())
    assert 2 / 3 * record["seconds"] < seconds <= record["seconds"] + 1e-5
    (denoised,) = [span for span in record["spans"] if span["stage"] == "denoise"]
    assert [done for done, *_ in denoised["steps"]] == [1, 2]
    page = (profile / "profile.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in [*stages, "other"])
    (trace,) = profile.rglob("*.xplane.pb")
    assert b"denoise" in trace.read_bytes()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("full", "destination full exists and is not empty"),
        ("full/mine", "destination full/mine is a file"),
        ("runs", "profile='runs' is where 'runs/out.npy' is written; give a folder of its own"),
        ("runs/out.npy", "is where 'runs/out.npy' is written"),
    ],
)
def test_a_profile_s_folder_is_its_own(tmp_path, monkeypatch, capsys, folder, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "runs").mkdir()
    before = sorted(tmp_path.rglob("*"))
    argv = ["--prompt", "A cat", "--output-type", "latent", "--output", "runs/out.npy", "--profile", folder]
    assert run("nowhere", *argv) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if message in line and line.startswith("error: ")]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dmd_checkpoint_takes_its_preset_says_so_and_the_record_repeats_it(tmp_path, capsys):
    from fps_jax.commands.options import read_request, run_record

    model = shutil.copytree(T2V, tmp_path / "FastWan")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    words = "preset dmd: solver lcm, timesteps 1000 757 522, flow shift 8, guidance 1"
    out = tmp_path / "a.npy"
    size = ["--height", "32", "--width", "48", "--num-frames", "5", "--dtype", "float32", "--output-type", "latent"]
    assert run(model, "--prompt", "A cat", "--output", out, *size) == 0
    assert f"this checkpoint is sampled by {words}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        info.main([str(model)])
    assert f"sampled by {words}" in capsys.readouterr().out

    settings = json.loads((tmp_path / "a.npy.json").read_text())["settings"]
    want = {"preset": "dmd", "solver": "lcm", "num_inference_steps": 3, "guidance_scale": 1.0, "flow_shift": 8.0}
    assert {name: settings[name] for name in want} == want
    assert (settings["timesteps"], settings["sigmas"], settings["sigma_grid"]) == ([1000, 757, 522], None, None)
    settings |= {"output": out, "timesteps": (1000.0, 757.0, 522.0), "lora": ()}
    again = sample.Sample(**settings)
    other = SimpleNamespace(config=tiny_config("t2v"), schedule=None)  # another preset, another shift
    assert run_record(again, read_request(again), other)["settings"] == settings | {"output": str(out)}

    # the same by hand, on the checkpoint that says nothing
    levels = ["--solver", "lcm", "--timesteps", "1000", "757", "522", "--flow-shift", "8", "--guidance-scale", "1"]
    assert run(T2V, "--prompt", "A cat", "--output", tmp_path / "b.npy", *size, *levels) == 0
    assert "sampled by" not in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), np.load(out))


def test_a_lora_is_merged_at_its_scale_and_reported(tmp_path, capsys):
    from fps_jax import WanPipeline

    file = tmp_path / "style.safetensors"
    save_file({key: np.asarray(value) for key, value in CASES["ours"][0].items()}, file)
    out = tmp_path / "latents.npy"
    arguments = ["--prompt", "A cat", "--output", out, "--output-type", "latent", "--lora", f"{file}:0.5"]
    assert run(T2V, *arguments, *SMALL) == 0
    assert (
        "LoRA style.safetensors: 90 of 90 tensors change 30 parameters (rank 4, alpha / rank 1.5"
        in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "latents.npy.json").read_text())["settings"]["lora"] == [f"{file}:0.5"]
    pipe = WanPipeline.from_pretrained(T2V, dtype="float32")
    options = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    assert not np.array_equal(pipe("A cat", **options), np.load(out))
    pipe.load_lora(file, 0.5)
    np.testing.assert_array_equal(pipe("A cat", **options), np.load(out))


def test_a_lora_of_another_model_is_told_before_the_weights_are_read(tmp_path, capsys, monkeypatch):
    from fps_jax import WanPipeline

    save_file({key: np.asarray(value) for key, value in CASES["image"][0].items()}, tmp_path / "image.safetensors")
    monkeypatch.setattr(WanPipeline, "from_pretrained", None)
    argv = ["--prompt", "x", "--output", tmp_path / "a.mp4", "--lora", tmp_path / "image.safetensors", *SMALL]
    assert run(T2V, *argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "it's a LoRA for an image model, this is a t2v model" in err


BAD = [
    (["--prompt", "x", "--num-frames", "6"], "num_frames=6 is not 4k+1"),
    (["--prompt", "x", "--height", "40"], "height=40 is not a positive multiple of 16"),
    (
        ["--prompt", "x", "--lora", "a", "--lora", "b"],
        "--lora was given twice; give it once, several values after each other",
    ),
    (["--prompt", "x", "--sigmas", "1", "--sigmas", "0.5"], "--sigmas was given twice; give it once"),
    (["--prompt", "x", "--num-inference-steps", "0"], "num_inference_steps=0 is less than 1"),
    (["--prompt", "x", "--sigmas", "1", "0.5", "0"], "sigmas=[1, 0.5, 0]: 0 is not in (0, 1]; leave it out"),
    (
        ["--prompt", "x", "--preset", "dmd", "--num-inference-steps", "4"],
        "preset='dmd' has timesteps of its own, 3 of them",
    ),
    (["--prompt", "x", "--solver", "dpm++", "--sigma-grid", "diffusers"], "use one of unipc/wan"),
    (
        ["--prompt", "x", "--solver", "heun"],
        "error: invalid choice 'heun' for argument '--solver'. Expected one of ('None', 'dpm++', 'euler', 'lcm', 'unipc').",
    ),
    (["--prompt", "x", "--nope", "3"], "error: Unrecognized options: --nope, 3 (see fps-sample --help)"),
    ([], "error: Missing from fps-sample: --prompt STR"),
    (["--prompt", "x", "--output", "no/such/folder/a.mp4"], "doesn't exist; make it first"),
    (["--prompt", "x", "--output", "a.gif"], "must end in .mp4"),
    (
        ["--prompt", "x", "--output", "a.png"],
        "output='a.png' is a picture, and num_frames=81; use .mp4, or --num-frames 1",
    ),
    (
        ["--prompt", "x", "--output", "a" * 240 + ".mp4"],
        "... is 12 bytes too long for a file's name; choose a shorter one",
    ),
    (["--prompt", "x", "--output", "caf\udce9.mp4"], "output='caf\\udce9.mp4.json' is not valid text (UTF-8)"),
    (["--prompt", "caf\udce9"], "prompt='caf\\udce9' is not valid text (UTF-8); write it in UTF-8"),
    (["--prompt", "x", "--sample_steps", "4"], "error: --sample_steps: use --num-inference-steps; "),
    (["--prompt", "x", "--offload_model", "True"], "error: --offload_model: leave it out: the text encoder is on"),
    (
        ["--prompt", "x", "--unet_name", "a"],
        "error: Unrecognized options: --unet_name",
    ),  # none of its options stands for it
    (["--prompt", "x", "--size", "832*480"], "error: --size 832*480: use --height 480 --width 832; invalid choice"),
    (["--prompt", "x", "--steps", "4", "--steps-per-unit", "4"], "error: --steps: use --num-inference-steps; "),
    (["--prompt", "x", "--to-nowhere", "4"], "error: Unrecognized options: --to-nowhere"),
    (
        ["--prompt", "x", "--num-inference-steps", "1000000000"],
        "is above 1,000, the number of noise levels in training",
    ),
    (["--prompt", "x", "--latents", "missing.npy"], "latents='missing.npy' doesn't exist"),
    (["--prompt", "x", "--latents", "noise.bin"], "is not a .npy file"),
    (["--prompt", "x", "--lora", "missing.safetensors:0.5"], "lora='missing.safetensors' doesn't exist"),
    (["--prompt", "x", "--lora", "a.safetensors:half"], "lora='a.safetensors:half' is not FILE or FILE:SCALE"),
    (["--prompt", "x", "--image", "missing.png"], "image was given, but this is a t2v model"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_arguments_give_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert run(T2V, *argv) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept_unless_overwrite_is_given(tmp_path, capsys, caplog):
    out = tmp_path / "a.npy"
    small = [*SMALL[:-4], "--num-inference-steps", "1", *SMALL[-2:], "--output", out, "--output-type", "latent"]
    (tmp_path / "a.npy.json").write_text("mine")
    assert run(T2V, "--prompt", "x", *small) == 2
    assert "a.npy.json' exists; give another --output, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "a.npy.json").read_text() == "mine"
    assert run(T2V, "--prompt", "word " * 2000, *small, "--overwrite") == 0
    assert json.loads((tmp_path / "a.npy.json").read_text())["settings"]["prompt"].startswith("word")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npy.json"]
    assert re.search(
        r"prompt 'word word .*'... has \d+ tokens more than the 512 that the model reads: its end is cut", caplog.text
    )


def test_one_frame_is_a_picture(tmp_path):
    from PIL import Image

    out = tmp_path / "a.png"
    options = [
        "--height",
        "16",
        "--width",
        "32",
        "--num-frames",
        "1",
        "--num-inference-steps",
        "1",
        "--dtype",
        "float32",
    ]
    assert run(T2V, "--prompt", "x", *options, "--output", out) == 0
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == ("PNG", (32, 16))


def test_the_version_is_said(capsys):
    from fps_jax import __version__

    assert run("--version") == 0
    assert capsys.readouterr().out == f"fps-jax {__version__}\n"


@pytest.mark.parametrize("asked", ["", "1"])
def test_no_color_is_heeded_on_a_terminal(monkeypatch, asked):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("NO_COLOR", asked)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    assert run("--help") == 0
    assert ("\x1b" in screen.getvalue()) == (not asked)


@pytest.mark.parametrize("taken", ["a.mp4", "a.mp4.json"])
def test_a_folder_in_place_of_an_output_is_told_before_the_work(tmp_path, capsys, taken):
    (tmp_path / taken).mkdir()
    assert run(T2V, "--prompt", "x", "--output", tmp_path / "a.mp4", *SMALL) == 2
    assert f"{taken}' is a folder; name a file" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [taken]


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert run(tmp_path / "nowhere", "--prompt", "x", "--output", tmp_path / "a.mp4", "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "doesn't exist; pass a directory" in err


def test_a_pickled_array_is_refused_and_not_run(tmp_path, capsys):
    np.save(tmp_path / "noise.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert run(T2V, "--prompt", "x", "--latents", tmp_path / "noise.npy") == 2
    assert "is not a readable .npy array" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = assemble(tmp_path / "i2v", "i2v")
    (tmp_path / "frame.png").write_bytes(b"not a picture")
    assert run(model, "--prompt", "x", "--image", "frame.png", *SMALL) == 2
    assert "frame.png" in capsys.readouterr().err
