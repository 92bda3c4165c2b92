"""fps-compare: that it measures the two videos that it says, shows them, and leaves nothing behind when something is wrong."""

import json

import av
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from fps_jax import WanPipeline
from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_jax.commands import compare
from fps_jax.media.video import save_video
from tests.checkpoints import T2V, assemble
from tests.reference import rel_l2

CALL = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 3, "seed": 5}
SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in CALL.items()] + ["--dtype", "float32"]


def run(*argv) -> int:
    with pytest.raises(SystemExit) as stop:
        compare.main([str(a) for a in argv])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A schedule whose windows leave much out: the tile grid of (3, 2, 4) tokens is (3, 1, 1)."""
    path = tmp_path_factory.mktemp("schedule") / "narrow.json"
    FPSSchedule(tile=(1, 2, 4), regimes=(Regime(until=1.0, scales_per_tile=1, window=(1, 1, 1)),)).save(path)
    return path


def test_it_measures_the_two_videos_that_the_pipeline_samples(tmp_path, capsys, narrow):
    out = tmp_path / "new" / "comparison"
    assert run(T2V, "--prompt", "A cat", "--schedule", narrow, "--output", out, *SMALL) == 0

    pipe = WanPipeline.from_pretrained(T2V, dtype="float32")
    settings = {"dense": {}, "fps": {"attention": "fps", "schedule": narrow}}
    latents = {name: pipe("A cat", output_type="latent", **CALL, **own) for name, own in settings.items()}
    videos = {name: pipe("A cat", **CALL, **own)[0] for name, own in settings.items()}
    record = json.loads((out / "quality.json").read_text())
    quality = record["quality"]
    assert quality["latents_relative_l2"] > 1e-3  # or there is nothing to compare
    assert quality["latents_relative_l2"] == pytest.approx(rel_l2(latents["fps"], latents["dense"]), abs=1e-6)
    pairs = zip(videos["dense"].astype(np.float64), videos["fps"].astype(np.float64), strict=True)
    want = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    assert quality["psnr"]["frames"] == pytest.approx(want, abs=1e-3)
    assert quality["psnr"]["mean"] == pytest.approx(np.mean(want), abs=1e-3)
    assert quality["psnr"]["worst"] == pytest.approx(min(want), abs=1e-3)
    assert quality["psnr"]["worst_frame"] == np.argmin(want) + 1
    assert len(quality["ssim"]["frames"]) == 9
    again = {}
    for name, video in videos.items():
        save_video(video, tmp_path / "again.mp4")
        again[name] = frames_of(tmp_path / "again.mp4")
    for name, other in (("dense", "fps"), ("fps", "dense")):
        written = frames_of(out / f"{name}.mp4").astype(float)
        # Each its own video, up to what one pixel rounded the other way makes of the encoder's choices.
        assert np.abs(written - again[name]).mean() < 0.1 * np.abs(written - again[other]).mean()

    assert record["schedule"] == FPSSchedule.load(narrow).resolve((3, 2, 4)).to_dict()
    assert record["settings"]["attention"] == "fps"
    assert record["settings"]["flow_shift"] == 3.0
    for seconds in (record["seconds"]["dense"], record["seconds"]["fps"]):
        assert 0 < seconds["denoising_step"] < seconds["sampling_first_call"]
    assert sorted(p.name for p in out.iterdir()) == [
        "dense.mp4", "fps.mp4", "quality.json", "quality.png", "side_by_side.mp4",
    ]  # fmt: skip
    assert frames_of(out / "side_by_side.mp4").shape == (9, 184, 968, 3)
    with Image.open(out / "quality.png") as image:
        assert image.size == (1280, 800)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["comparison"]

    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert f"PSNR {quality['psnr']['mean']:.2f} dB" in printed.out
    assert "side_by_side.mp4" in printed.out
    assert "window (1, 1, 1)" in printed.err


def test_another_setting_gives_its_name_and_replaces_only_a_comparison(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "fps.mp4").write_bytes(b"of an earlier comparison")
    arguments = (T2V, "--prompt", "A cat", "--attention", "fp8", "--output", out, *SMALL)
    assert run(*arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert run(*arguments, "--overwrite") == 2
    assert "holds 'notes.txt', which fps-compare doesn't write" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert run(*arguments, "--overwrite") == 0
    names = {p.name for p in out.iterdir()}
    assert names == {"dense.mp4", "fp8.mp4", "quality.json", "quality.png", "side_by_side.mp4"}
    assert names < compare.WRITTEN  # so that it can be replaced again
    regimes = json.loads((out / "quality.json").read_text())["schedule"]["regimes"]
    assert [(regime["window"], regime["density"]) for regime in regimes] == [(None, None)] * 3


def bad_cases(tmp_path) -> dict[str, tuple[list, str]]:
    FPSSchedule(grid=(21, 30, 52), regimes=(Regime(until=1.0),)).save(tmp_path / "other_grid.json")
    FPSSchedule(dense_layers=(7,), regimes=(Regime(until=1.0),)).save(tmp_path / "layer.json")
    FPSSchedule(tile=(1, 2, 64), regimes=(Regime(until=1.0),)).save(tmp_path / "tile.json")
    (tmp_path / "broken.json").write_text("{")
    np.save(tmp_path / "noise.npy", np.zeros((1, 16, 1, 4, 8), np.float32))
    return {
        "frames": (["--num-frames", "6"], "num_frames=6 is not 4k+1"),
        "rate": (["--fps", "0"], "is not a number in 1 to 1000"),
        "seed": (["--seed", "-1"], "seed=-1 is not in [0, 2**32)"),
        "guidance": (["--guidance-scale", "nan"], "guidance_scale=nan is not a finite number"),
        "dense": (["--attention", "dense"], "--attention"),
        "no schedule": (["--schedule", tmp_path / "none.json"], "none.json' doesn't exist"),
        "no json": (["--schedule", tmp_path / "broken.json"], "broken.json' is not JSON"),
        "grid": (["--schedule", tmp_path / "other_grid.json"], "schedule is for a grid of (21, 30, 52) tokens"),
        "tile": (["--schedule", tmp_path / "tile.json"], "tile=(1, 2, 64) is larger than the grid (3, 2, 4)"),
        "layer": (["--schedule", tmp_path / "layer.json"], "dense_layers=[7] names layer 7; the model has layers 0 to 2"),
        "image": (["--image", "cat.png"], "image was given, but this is a t2v model"),
        "noise": (["--latents", tmp_path / "noise.npy"], "latents has shape (1, 16, 1, 4, 8)"),
        "output": (["--output", T2V / "comparison"], "overlap; give a destination outside the source"),
    }  # fmt: skip


CASES = [
    "frames", "rate", "seed", "guidance", "dense", "no schedule", "no json", "grid", "tile", "layer", "image", "noise", "output",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_one_line_before_weights_are_read(tmp_path, monkeypatch, capsys, case):
    def loaded(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(WanPipeline, "from_pretrained", loaded)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    cases = bad_cases(inputs)
    assert set(cases) == set(CASES)
    argv, message = cases[case]
    assert run(T2V, "--prompt", "A cat", "--output", tmp_path / "out", *SMALL, *argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == [inputs]


def test_a_schedule_inside_the_output_folder_is_not_overwritten(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    FPSSchedule(regimes=(Regime(until=1.0),)).save(out / "quality.json")
    arguments = ["--schedule", out / "quality.json", "--output", out, "--overwrite"]
    assert run(T2V, "--prompt", "A cat", *SMALL, *arguments) == 2
    assert "overlap" in capsys.readouterr().err
    assert FPSSchedule.load(out / "quality.json").regimes == (Regime(until=1.0),)


def test_the_image_is_looked_at_before_weights_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(WanPipeline, "from_pretrained", None)
    model = assemble(tmp_path / "i2v", "i2v")
    (tmp_path / "frame.png").write_bytes(b"not a picture")
    for argv, message in (([], "image is missing"), (["--image", tmp_path / "frame.png"], "can't be read as an image")):
        assert run(model, "--prompt", "x", "--output", tmp_path / "out", *SMALL, *argv) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [FloatingPointError("NaN or inf at step 2 of 3"), KeyboardInterrupt()])
def test_a_run_that_fails_late_leaves_nothing(tmp_path, monkeypatch, capsys, error):
    original = WanPipeline.sample

    def second_fails(self, request, callback=None):
        if request.attention != "dense":
            raise error
        return original(self, request, callback)

    monkeypatch.setattr(WanPipeline, "sample", second_fails)
    status = run(T2V, "--prompt", "A cat", "--output", tmp_path / "a" / "b", *SMALL)
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
