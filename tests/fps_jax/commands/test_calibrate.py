"""fps-calibrate: a schedule that the pipeline takes, and one line for what is wrong before the model is read."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fps_jax import FPSSchedule
from fps_jax.commands import calibrate, sample
from fps_jax.tuning import calibration
from tests.checkpoints import T2V

VIDEO = ["--height", "64", "--width", "96", "--num-frames", "9", "--num-inference-steps", "3", "--dtype", "float32"]


def run(capsys, *arguments, model=T2V) -> tuple[int, str]:
    densities = () if "--densities" in arguments else ("--densities", "0.3", "1.0")
    with pytest.raises(SystemExit) as stop:
        calibrate.main([str(model), *VIDEO, "--tile", "2", "2", "3", *densities, *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out + captured.err


def test_the_command_writes_a_schedule_that_the_pipeline_takes(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A cat walks in the snow.\n\nA red panda.\n")
    out = tmp_path / "s.json"
    code, said = run(capsys, "--prompts", prompts, "--output", out, "--error-budget", "0.5", "--preset", "dmd")
    assert code == 0, said
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "prompts.txt", "s.choice.png", "s.errors.json", "s.errors.png", "s.json",
    ]  # fmt: skip
    schedule = FPSSchedule.load(out)
    assert schedule.grid == (3, 4, 6)
    assert schedule.tile == (2, 2, 3)
    record = json.loads((tmp_path / "s.errors.json").read_text())
    assert record["settings"]["timesteps"] == [1000, 757, 522]
    assert {regime.until for regime in schedule.regimes} <= {0.72, 0.88, 1.0}  # where these steps are
    assert record["prompts"] == ["A cat walks in the snow.", "A red panda."]
    assert np.shape(record["errors"]) == (3, 3, len(record["candidates"]))
    assert "estimated by the cost formula" in said
    for picture in ("s.errors.png", "s.choice.png"):
        assert (tmp_path / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # Another budget from the same measurement, without the model.
    code, said = run(
        capsys, "--prompts", prompts, "--output", tmp_path / "dense.json", "--error-budget", "1e-6",
        "--reuse", tmp_path / "s.errors.json",
    )  # fmt: skip
    assert code == 0, said
    assert FPSSchedule.load(tmp_path / "dense.json").plans((3, 4, 6))[0].density == 1.0
    code, said = run(
        capsys, "--prompts", prompts, "--output", out, "--densities", "0.5", "--reuse", tmp_path / "s.errors.json"
    )
    assert code == 2
    assert "measured other candidates" in said


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """The tiny checkpoint with large keys that have much in common: K's rounding is then most of the error, and centring takes
    most of that off."""
    folder = shutil.copytree(T2V, tmp_path_factory.mktemp("biased") / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for layer in range(3):
        tensors[f"blocks.{layer}.attn1.to_k.bias"] += 8
        tensors[f"blocks.{layer}.attn1.norm_k.weight"] *= 8
    save_file(tensors, file)
    return folder


def test_keys_are_centred_where_that_was_asked_and_helps_and_sampling_does_so(biased, tmp_path, monkeypatch, capsys):
    (tmp_path / "one.txt").write_text("A cat walks in the snow.\n")
    common = ("--prompts", tmp_path / "one.txt", "--densities", "1.0", "--error-budget", "0.5")
    # As at real sizes: here what FP8 saves is less than rounding takes, and no candidate that rounds would be chosen.
    monkeypatch.setattr(calibration, "attention_cost", lambda plan: 0.5 if plan.quantize else 1.0)
    both = tmp_path / "both.json"
    code, said = run(capsys, *common, "--output", both, "--center-k", "both", model=biased)
    assert code == 0, said
    record = json.loads((tmp_path / "both.errors.json").read_text())
    errors = np.mean(record["errors"], axis=(0, 1))
    kinds = {(c["scales_per_tile"], c["center_k"]): e for c, e in zip(record["candidates"], errors, strict=True)}
    assert kinds.keys() == {(None, False), (1, False), (1, True)}
    assert kinds[1, True] < 0.7 * kinds[1, False]
    assert [(regime.scales_per_tile, regime.center_k) for regime in FPSSchedule.load(both).regimes] == [(1, True)]

    code, said = run(capsys, *common, "--output", tmp_path / "no.json", "--reuse", tmp_path / "both.errors.json")
    assert code == 2
    assert "measured other candidates; give the size, --tile, --densities and --center-k of that run" in said

    plain, latents = tmp_path / "plain.json", []
    plain.write_text(both.read_text().replace('"center_k": true', '"center_k": false'))
    for schedule in (both, plain):
        with pytest.raises(SystemExit) as stop:
            sample.main([
                str(biased), *VIDEO, "--prompt", "A cat.", "--guidance-scale", "1", "--schedule", str(schedule),
                "--output-type", "latent", "--output", str(schedule.with_suffix(".npy")),
            ])  # fmt: skip
        assert stop.value.code == 0, capsys.readouterr().err
        latents.append(np.load(schedule.with_suffix(".npy")))
    assert np.isfinite(latents[0]).all()
    assert (latents[0] != latents[1]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.txt"], "error: prompts='none.txt' doesn't exist; it is a text file with one prompt a line"),
        (["--prompts", "empty.txt"], "error: prompts='empty.txt' holds no prompt"),
        (["--prompts", "one.txt", "--output", "s.txt"], "error: output='s.txt' must end in .json"),
        (["--prompts", "one.txt", "--output", "nowhere/s.json"], "doesn't exist; make it first"),
        (["--prompts", "one.txt", "--error-budget", "-1"], "error: error_budget=-1.0 is not a positive number"),
        (["--prompts", "one.txt", "--densities", "3"], "error: density=3.0 is not a number in (0, 1]"),
        (["--prompts", "one.txt", "--tile", "9", "1", "1"], "error: tile=(9, 1, 1) is larger than the grid (3, 4, 6)"),
        (["--prompts", "one.txt", "--query-tiles", "0"], "error: query_tiles=0 is less than 1"),
        (["--prompts", "one.txt", "--reuse", "one.txt"], "error: reuse='one.txt' is no .errors.json that fps-calibrate wrote"),
        (["--prompts", "one.txt", "--num-frames", "10"], "error: num_frames=10 is not 4k+1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_the_model_is_read(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("A cat.\n")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("fps_jax.WanPipeline.from_pretrained", lambda *a, **k: pytest.fail("it was read"))
    code, said = run(capsys, *arguments)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_tuned_table_that_cannot_be_read_is_found_before_the_measurement(tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "one.txt"
    prompts.write_text("A cat.\n")
    monkeypatch.setenv("FPS_TUNED_TABLE", str(tmp_path / "none.json"))
    monkeypatch.setattr("fps_jax.WanPipeline.from_pretrained", lambda *a, **k: pytest.fail("it was read"))
    code, said = run(capsys, "--prompts", prompts, "--output", tmp_path / "s.json")
    assert code == 2
    assert "none.json' doesn't exist; run fps-tune to write it" in said


@pytest.mark.parametrize("settings", [{}, {"flow_shift": 3.0}, {"flow_shift": None, "solver": "lcm"}])
def test_levels_without_what_goes_with_them_are_no_earlier_run(settings, tmp_path):
    file = tmp_path / "s.errors.json"
    record = {"errors": [[[0.1]]], "candidates": [], "settings": {"sigmas": [1.0, 0.5], **settings}}
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"is no .errors.json that fps-calibrate wrote"):
        calibrate._read_errors(file, [])
