"""fps-drift: from files to a table, a record and a plot; what is refused in one line, with nothing left behind."""

import json
import os

import numpy as np
import pytest

from fps_jax.commands.drift import WRITTEN, main
from fps_jax.evaluation.drift import METRICS, vde
from fps_jax.media.video import save_video


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Noise that drifts: one gets darker, one goes from still to moving."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    noise = rng.random((15, 32, 48, 3)).astype(np.float32)
    save_video(noise * np.linspace(1, 0.5, 15, dtype=np.float32)[:, None, None, None], folder / "darker.mp4")
    moves = noise.copy()
    moves[:6] = 0.5
    save_video(moves, folder / "moves.mp4", crf=0)
    return folder


def test_two_videos_and_scores_of_another_tool(tmp_path, capsys, clips):
    from PIL import Image

    scores, out = tmp_path / "scores.json", tmp_path / "new" / "drift"
    scores.write_text(json.dumps({"darker.mp4": {"aesthetic": [0.5, 0.25, 0.5, 0.5, 1.0]}}))
    videos = (clips / "darker.mp4", clips / "moves.mp4")
    status, said, err = run(capsys, *videos, "--chunks", 5, "--scores", scores, "--output", out)
    assert status == 0, err
    record = json.loads((out / "drift.json").read_text())
    assert (record["chunks"], record["weights"]) == (5, "linear")
    darker, moves = (record["videos"][str(path)] for path in videos)
    assert (darker["frames"], darker["frames_per_chunk"]) == (15, 3)
    assert list(darker["metrics"]) == [*METRICS, "aesthetic"]
    assert list(moves["metrics"]) == list(METRICS)
    assert darker["metrics"]["aesthetic"] == {"vde": 4 * 0.5 + 1.0, "chunks": [0.5, 0.25, 0.5, 0.5, 1.0]}
    brightness = darker["metrics"]["brightness"]
    assert brightness["vde"] == vde(brightness["chunks"])
    assert all(a > b for a, b in zip(brightness["chunks"], brightness["chunks"][1:], strict=False))
    assert moves["metrics"]["motion"]["chunks"][0] == 0
    assert moves["metrics"]["motion"]["vde"] is None  # from nothing to something
    lines = said.splitlines()
    assert lines[0].split() == ["VDE", *METRICS, "aesthetic"]
    assert lines[1].split()[0] == "darker.mp4"
    assert float(lines[1].split()[-1]) == 3.0
    assert lines[2].split()[-1] == "-"
    assert "inf" in lines[2].split()
    assert lines[3].startswith("inf: the first chunk has nothing of this")
    assert {path.name for path in out.iterdir()} == WRITTEN
    with Image.open(out / "drift.png") as image:
        assert image.width == 1536


def test_an_earlier_measurement_is_replaced_and_nothing_else(tmp_path, capsys, clips):
    arguments = (clips / "darker.mp4", "--chunks", 3, "--weights", "log", "--output", tmp_path / "out")
    assert run(capsys, *arguments)[0] == 0
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "exists and is not empty" in err
    (tmp_path / "out" / "notes.txt").write_text("mine")
    status, _, err = run(capsys, *arguments, "--overwrite")
    assert status == 2
    assert "holds 'notes.txt', which fps-drift doesn't write" in err
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out" / "drift.json").write_text("old")
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    record = json.loads((tmp_path / "out" / "drift.json").read_text())
    chunks = record["videos"][str(clips / "darker.mp4")]["metrics"]["colour"]
    assert chunks["vde"] == vde(chunks["chunks"], "log")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "videos are missing"),
        (("nowhere.mp4",), "video='nowhere.mp4' doesn't exist"),
        (("text.mp4",), "text.mp4' can't be read as a video"),
        (("cut.mp4",), "cut.mp4' can't be read as a video"),
        (("pipe.mp4",), "can't be read as a video (pipe.mp4 is no regular file"),
        (("folder",), "folder is no regular file"),
        (("sound.wav",), "sound.wav' can't be read as a video (no video in it)"),
        (("darker.mp4", "darker.mp4"), "was given twice; give it once"),
        (("darker.mp4",), "has 15 frames; 10 chunks of 3 frames or more need 30: give a longer one, or fewer --chunks"),
        (("darker.mp4", "--chunks", 1), "chunks=1 is not in 2 to 1000"),
        (("darker.mp4", "--chunks", 1001), "chunks=1001 is not in 2 to 1000"),
        (("darker.mp4", "--weights", "none"), "--weights"),
        (("darker.mp4", "--scores", "nowhere.json"), "scores='nowhere.json' doesn't exist"),
        (("darker.mp4", "--scores", "text.mp4"), "scores='text.mp4': text.mp4 is not valid JSON"),
        (("darker.mp4", "--scores", "pipe.mp4"), "scores='pipe.mp4': pipe.mp4 is no regular file"),
        (("darker.mp4", "--scores", "nan.json", "--chunks", 2), "value 2 is nan, not a finite number"),
        (("darker.mp4", "--scores", "nan.json"), "'quality' has 2 values; give a list of 10"),
        (("darker.mp4", "--output", "text.mp4"), "destination text.mp4 is a file"),
        (("darker.mp4", "--output", "folder"), "destination folder exists and is not empty"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_left(tmp_path, capsys, monkeypatch, clips, arguments, message):
    import wave

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    content = (clips / "darker.mp4").read_bytes()
    (tmp_path / "darker.mp4").write_bytes(content)
    (tmp_path / "cut.mp4").write_bytes(content[:300])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    (tmp_path / "nan.json").write_text('{"darker.mp4": {"quality": [1, NaN]}}')
    os.mkfifo(tmp_path / "pipe.mp4")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1000))
    before = sorted(tmp_path.rglob("*"))
    status, said, err = run(capsys, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, len(errors), said) == (2, 1, "")
    assert message in errors[0]
    assert "defect" not in errors[0]
    assert sorted(tmp_path.rglob("*")) == before
