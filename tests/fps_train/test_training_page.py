"""docs/training.md followed: its five commands, as they stand there, on a tiny model and tiny clips."""

import importlib
import pathlib
import shlex
import tomllib

import jax
import numpy as np
import pytest

from fps_jax.checkpoints.format import save_checkpoint
from fps_jax.checkpoints.open import open_model
from fps_jax.config import DiTConfig, VAEConfig, WanConfig
from fps_jax.media.video import save_video
from fps_jax.models.init import init_vae_for_training
from tests.checkpoints import T2V

ROOT = pathlib.Path(__file__).parents[2]
SIZE = "--height 32 --width 48 --num-frames 5"
# What makes them small; everything else is the page's.
SMALLER = {
    "fps-precompute": SIZE,
    "fps-train": "--steps 2 --accumulate 2 --dtype float32 --validation.every 2 --validation.samples 1 --validation.videos 1 "
    "--validation.steps 2",
    "fps-sample": f"{SIZE} --num-inference-steps 2 --guidance-scale 1 --dtype float32",
    "fps-convert": "",
}


def run_command(name: str, arguments: list[str]) -> int | str | None:
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = entries[name].partition(":")
    with pytest.raises(SystemExit) as stop:
        getattr(importlib.import_module(module), function)(arguments)
    return stop.value.code


def commands() -> list[list[str]]:
    page = (ROOT / "docs" / "training.md").read_text()
    block = page.split("in five commands")[1].split("```sh\n")[1].split("```")[0]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line]


@pytest.mark.slow
def test_the_five_commands_lead_from_clips_to_torch_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("Wan2.1-T2V-1.3B").symlink_to(T2V)
    pathlib.Path("clips").mkdir()
    for i in range(3):
        frames = np.full((5, 32, 48, 3), 60 * i, np.uint8)
        frames[:, :, 8 * i : 8 * i + 16] = 255
        save_video(frames, f"clips/{i}.mp4", fps=16)
        pathlib.Path(f"clips/{i}.txt").write_text(f"a bar at {i}")
    lines = commands()
    assert [line[0] for line in lines] == ["fps-precompute", "fps-train", "fps-train", "fps-sample", "fps-convert"]
    for name, *arguments in lines:
        assert run_command(name, [*arguments, *SMALLER[name].split()]) == 0, (name, capsys.readouterr().err)
    assert {p.name for p in tmp_path.iterdir()} >= {"data", "run", "cat.mp4", "Wan2.1-T2V-1.3B-fps"}
    assert pathlib.Path("run/checkpoints/2").is_dir()
    assert (
        pathlib.Path("Wan2.1-T2V-1.3B-fps/fps_schedule.json").read_bytes()
        == pathlib.Path("run/fps_schedule.json").read_bytes()
    )
    assert '"attention": "fps"' in pathlib.Path("cat.mp4.json").read_text()  # by the schedule that it was trained with


@pytest.mark.slow
def test_a_model_is_built_around_a_vae_of_ones_own(tmp_path, monkeypatch, capsys):
    """The page's lines around a VAE as fps-train-vae writes it; `fps-precompute` and `fps-train` then take the model."""
    monkeypatch.chdir(tmp_path)
    vae = VAEConfig(base_dim=4, z_dim=3, num_res_blocks=1, latents_mean=(0.5,) * 3, latents_std=(2.0,) * 3)
    alone = WanConfig(
        dit=DiTConfig(task="t2v", dim=16, mlp_dim=16, num_heads=1, num_layers=1, in_channels=3, out_channels=3), vae=vae
    )
    save_checkpoint("vae_video/checkpoint", alone, {"vae": init_vae_for_training(vae, jax.random.key(0))})
    pathlib.Path("Wan2.1-T2V-1.3B").symlink_to(T2V)
    pathlib.Path("clips").mkdir()
    for level in (60, 200):
        save_video(np.full((5, 32, 32, 3), level, np.uint8), f"clips/{level}.mp4", fps=16)
        pathlib.Path(f"clips/{level}.txt").write_text(f"nothing moves at {level}")
    section = (ROOT / "docs" / "training.md").read_text().split("## A VAE of your own")[1]
    exec(section.split("```python\n")[1].split("```")[0], {})
    assert open_model("small").config.vae == vae
    shell = section.split("From there")[1].split("```sh\n")[1].split("```")[0].splitlines()
    smaller = {
        "fps-precompute": "--height 32 --width 32 --num-frames 5",
        "fps-train": "--validation.samples 1 --dry-run",
    }
    for name, *arguments in map(shlex.split, shell):
        assert run_command(name, [*arguments, *smaller[name].split()]) == 0, (name, capsys.readouterr().err)
