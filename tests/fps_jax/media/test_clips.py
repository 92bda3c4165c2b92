"""Clips for a stream to go on from: the frames at the wanted rate and size, the last of them, and files that are none.

What frame is on screen when, colours, rotation: tests/fps_train/precompute/test_frames.py.
"""

import logging
import os

import numpy as np
import pytest

from fps_jax.media import clips
from fps_jax.media.clips import read_clip
from fps_jax.media.video import save_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds at 10 frames a second, each of its own grey."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    greys = np.linspace(0.1, 0.9, 20, dtype=np.float32)
    save_video(np.broadcast_to(greys[:, None, None, None], (20, 48, 96, 3)), path, fps=10)
    return path


def greys(frames) -> np.ndarray:
    """Which of the clip's frames these are."""
    return np.rint((frames.mean((1, 2, 3)) / 255 - 0.1) * 19 / 0.8).astype(int)


def test_frames_are_at_the_rate_and_the_size(clip, caplog):
    with caplog.at_level(logging.WARNING, "fps_jax"):
        read_clip(clip, fps=10, height=32, width=64, last=1)
        assert not caplog.messages
        frames = read_clip(clip, fps=10, height=32, width=32)
    assert "video of 48 x 96 (height x width) loses 50% of its picture to the crop to 32 x 32" in caplog.text
    assert (frames.shape, frames.dtype) == ((20, 32, 32, 3), np.uint8)
    assert np.array_equal(greys(frames), np.arange(20))
    assert np.array_equal(greys(read_clip(clip, fps=20, height=32, width=32)), np.arange(40) // 2)
    assert np.array_equal(
        greys(read_clip(clip, fps=7.5, height=32, width=32)), np.floor(np.arange(15) / 7.5 * 10 + 1e-6)
    )


def test_the_last_frames_are_those_before_the_end(clip):
    whole = read_clip(clip, fps=16, height=32, width=48)
    for last in (1, 9, len(whole)):
        assert np.array_equal(read_clip(clip, fps=16, height=32, width=48, last=last), whole[-last:])


def test_a_timestamp_that_jumps_is_damage_not_hours_of_one_frame(tmp_path):
    import av

    with av.open(tmp_path / "jump.mkv", "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for pts in (0, 1, 2, 10 * 10**6):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="its timestamps jump by more than an hour"):
        read_clip(tmp_path / "jump.mkv", fps=10, height=32, width=32, last=5)


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4"])
def test_a_playlist_has_no_other_file_read(clip, tmp_path, name):
    target = tmp_path / "clip.mp4"
    target.write_bytes(clip.read_bytes())
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nclip.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / name).write_text(hls if name.endswith("m3u8") else "ffconcat version 1.0\nfile clip.mp4\n")
    with pytest.raises(ValueError, match=r"list\.\w+' can't be read as a video \(can't be read: a playlist, or"):
        read_clip(tmp_path / name, fps=10, height=32, width=48)


def test_what_is_no_clip_of_so_many_frames_is_told(clip, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"video='.*clip.mp4' has 20 frames at 10 a second, fewer than the 21 asked for"
    ):
        read_clip(clip, fps=10, height=32, width=48, last=21)
    with pytest.raises(ValueError, match=r"clip.mp4': 1026 frames are more than 1025; ask for fewer of the last"):
        read_clip(clip, fps=10, height=32, width=48, last=1026)
    monkeypatch.setattr(clips, "MOST_FRAMES", 19)
    with pytest.raises(ValueError, match="has more than 19 frames at 10 a second; say how many of the last to take"):
        read_clip(clip, fps=10, height=32, width=48)
    assert len(read_clip(clip, fps=10, height=32, width=48, last=19)) == 19
    with pytest.raises(FileNotFoundError, match=r"video='.*nowhere.mp4' doesn't exist"):
        read_clip(tmp_path / "nowhere.mp4", fps=10, height=32, width=48)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(
        ValueError, match=r"text.mp4' can't be read as a video \(can't be read: .*\); use an mp4 or webm"
    ):
        read_clip(tmp_path / "text.mp4", fps=10, height=32, width=48)
    os.mkfifo(tmp_path / "pipe.mp4")  # whose reader would wait for ever
    for path in (tmp_path / "pipe.mp4", tmp_path):
        with pytest.raises(ValueError, match=r"can't be read as a video .*is no regular file"):
            read_clip(path, fps=10, height=32, width=48)
