"""Videos are read back with the decoder, not trusted."""

import logging
import os
import subprocess
import sys

import av
import av.codec
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fps_jax.media.mp4 import index_first
from fps_jax.media.video import contact_sheet, save_video, video_to_uint8


@pytest.fixture
def video():
    """Smooth, so that 4:2:0 loses little; saturated colours, so that a wrong colour matrix shows."""
    y, x = np.mgrid[0:64, 0:96].astype(np.float32)
    return np.stack([np.stack([x / 95, y / 63, np.full_like(x, i / 8)], axis=-1) for i in range(9)])


def _decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return stream.codec_context.name, float(stream.average_rate), np.stack(frames) / np.float32(255)


@pytest.mark.parametrize("suffix", [".mp4", ".MP4", ".mov", ".mkv"])
def test_decoded_frames_are_the_frames(tmp_path, video, suffix):
    path = tmp_path / f"out{suffix}"
    save_video(video, path)
    codec, fps, frames = _decode(path)
    assert (codec, fps, frames.shape) == ("h264", 16, (9, 64, 96, 3))
    # crf 18 and 8 bits: measured 0.007; BT.601 read as BT.709 or the other way round gives 0.029
    assert np.abs(frames - video).mean() < 0.01
    assert os.listdir(tmp_path) == [path.name]


def test_colours_are_tagged_bt709(tmp_path, video):
    save_video(video, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.pix_fmt == "yuv420p"


@pytest.mark.parametrize("fps", [8, 23.976, np.float32(23.976), 30])
def test_frame_rate(tmp_path, video, fps):
    save_video(video, tmp_path / "out.mp4", fps=fps)
    assert _decode(tmp_path / "out.mp4")[1] == pytest.approx(fps, rel=1e-3)


def test_crf_trades_size_for_error(tmp_path):
    noise = np.random.default_rng(0).random((5, 64, 96, 3), np.float32)
    sizes = []
    for crf in (0, 18, 45):
        save_video(noise, tmp_path / "out.mp4", crf=crf)
        sizes.append((tmp_path / "out.mp4").stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


def test_without_libx264_it_says_so(tmp_path, video, monkeypatch, caplog):
    monkeypatch.setattr(av.codec, "codecs_available", av.codec.codecs_available - {"libx264"})
    with caplog.at_level(logging.WARNING, "fps_jax"):
        save_video(video, tmp_path / "out.mp4")
    assert "no libx264" in caplog.text
    codec, _, frames = _decode(tmp_path / "out.mp4")
    assert codec == "mpeg4"
    assert np.abs(frames - video).mean() < 0.02


def test_an_existing_file_is_replaced_whole(tmp_path, video):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"what was there before")
    with pytest.raises(ValueError, match="NaN or inf"):
        save_video(np.where(video > 0.99, np.nan, video), path)
    assert path.read_bytes() == b"what was there before"
    save_video(video, path)
    assert _decode(path)[2].shape == video.shape


@pytest.mark.parametrize("write", [save_video, contact_sheet])
def test_folder_that_does_not_exist(tmp_path, video, write):
    path = tmp_path / "none" / ("out.mp4" if write is save_video else "out.png")
    with pytest.raises(OSError, match=r"can't write '.*none/out.*': No such file or directory") as caught:
        write(video, path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_way(tmp_path, video):
    (tmp_path / "out.mp4").mkdir()
    with pytest.raises(OSError, match=r"can't write '.*out.mp4': Is a directory"):
        save_video(video, tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_full_disk_leaves_nothing(tmp_path):
    """A limit on file sizes stands in for a full disk: both fail inside write."""
    (tmp_path / "out.mp4").write_bytes(b"before")
    code = (
        "import resource, sys, numpy as np; from fps_jax.media.video import save_video\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "video = np.random.default_rng(0).random((5, 64, 96, 3), np.float32)\n"
        "try: save_video(video, sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out.mp4")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "can't write" in done.stdout
    assert "File too large; choose another path or make room" in done.stdout
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "out.avi"}, "'out.avi' must end in one of .mp4, .mov, .mkv"),
        ({"path": "out"}, "must end in one of"),
        ({"fps": 0}, "fps=0 is not a number in 1 to 1000"),
        ({"fps": float("nan")}, "fps=nan is not a number in 1 to 1000"),
        ({"fps": "16 a second"}, "fps='16 a second' is not a number"),
        ({"crf": 52}, r"crf=52 must be in 0 \(lossless\) to 51"),
        ({"video": np.zeros((2, 15, 16, 3), np.uint8)}, "has 15x16 pixels; H.264 needs even sizes"),
        ({"video": np.zeros((2, 2, 16, 16, 3), np.uint8)}, r"one sample of a batch: video\[0\]"),
        ({"video": np.zeros((2, 3, 16, 16), np.uint8)}, r"it must be \[F, H, W, 3\]"),
        ({"video": np.zeros((0, 16, 16, 3), np.uint8)}, r"it must be \[F, H, W, 3\]"),
        ({"video": np.zeros((2, 16, 16, 3), np.int64)}, "dtype int64; pass uint8 or floats"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_video(**{"video": np.zeros((2, 16, 16, 3), np.uint8), "path": "out.mp4"} | arguments)
    assert os.listdir(tmp_path) == []


def test_uint8_rounds_and_clips():
    values = np.array([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0, 1.2], np.float32)
    video = np.broadcast_to(values[:, None, None, None], (7, 2, 2, 3))
    assert video_to_uint8(video)[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_uint8_takes_any_float_and_a_batch_of_one(dtype):
    video = np.full((1, 2, 4, 4, 3), 0.5, dtype)
    out = video_to_uint8(jnp.asarray(video) if dtype is jnp.bfloat16 else video)
    assert (out.shape, out.dtype, out.max()) == ((2, 4, 4, 3), np.uint8, 128)


def test_uint8_is_returned_as_it_is():
    video = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    assert video_to_uint8(video) is video


def test_contact_sheet_runs_from_first_to_last(tmp_path):
    video = np.stack([np.full((16, 24, 3), i * 10, np.uint8) for i in range(17)])
    contact_sheet(video, tmp_path / "sheet.png", columns=3, num_frames=5)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (32, 72, 3)
    assert sheet[8, 12::24, 0].tolist() == [0, 40, 80]
    assert sheet[24, 12::24, 0].tolist() == [120, 160, 0]


def test_contact_sheet_of_a_large_short_video(tmp_path):
    contact_sheet(np.zeros((2, 480, 832, 3), np.float32), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (640, 185)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"path": "a.jpg"}, "must end in .png"), ({"columns": 0}, "columns=0"), ({"num_frames": 0}, "num_frames=0")],
)
def test_contact_sheet_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(**{"video": np.zeros((1, 4, 4, 3), np.uint8), "path": "a.png"} | arguments)


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_the_index_comes_before_the_pictures(tmp_path, video, suffix):
    """So that a player on the network needn't read to the end first. That its offsets are right is read back above."""
    path = tmp_path / f"out{suffix}"
    save_video(video, path)
    content = path.read_bytes()
    names, at = [], 0
    while at < len(content):
        names.append(content[at + 4 : at + 8])
        at += int.from_bytes(content[at : at + 4], "big")
    assert at == len(content)
    assert names.index(b"moov") < names.index(b"mdat")
    assert index_first(content) == content


def test_one_frame_as_a_png_is_exact(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (1, 15, 33, 3), np.uint8)
    save_video(frame, tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), frame[0])
    with pytest.raises(ValueError, match=r"a.png' is a picture, and the video has 2 frames; use .mp4"):
        save_video(np.concatenate([frame, frame]), tmp_path / "a.png")
