"""docs/training.md followed: its five commands, as they stand there, on a tiny model and tiny clips."""

import importlib
import pathlib
import shlex
import tomllib

import numpy as np
import pytest

from fps_jax.media.video import save_video
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


def commands() -> list[list[str]]:
    page = (ROOT / "docs" / "training.md").read_text()
    block = page.split("in five commands")[1].split("```sh\n")[1].split("```")[0]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line]


@pytest.mark.slow
def test_the_five_commands_lead_from_clips_to_torch_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
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
        module, _, function = entries[name].partition(":")
        with pytest.raises(SystemExit) as stop:
            getattr(importlib.import_module(module), function)([*arguments, *SMALLER[name].split()])
        assert stop.value.code == 0, (name, capsys.readouterr().err)
    assert {p.name for p in tmp_path.iterdir()} >= {"data", "run", "cat.mp4", "Wan2.1-T2V-1.3B-fps"}
    assert pathlib.Path("run/checkpoints/2").is_dir()
    assert (
        pathlib.Path("Wan2.1-T2V-1.3B-fps/fps_schedule.json").read_bytes()
        == pathlib.Path("run/fps_schedule.json").read_bytes()
    )
    assert '"attention": "fps"' in pathlib.Path("cat.mp4.json").read_text()  # by the schedule that it was trained with
