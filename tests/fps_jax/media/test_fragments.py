"""An mp4 that is written while it is made: at every moment what is there plays, and at the end all of it."""

import io

import av
import numpy as np
import pytest

from fps_jax.media.fragments import fragmented_mp4


def clip(frames: int) -> np.ndarray:
    """Frames whose brightness tells their number."""
    shades = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 8
    return np.broadcast_to(shades, (frames, 32, 48, 3)).copy()


def brightness(content: bytes) -> list[float]:
    with av.open(io.BytesIO(content)) as container:
        return [float(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]


def test_a_file_plays_while_it_is_written(tmp_path):
    path, frames = tmp_path / "out.mp4", clip(21)
    with fragmented_mp4(path) as writer:
        writer.push(frames[:9])
        so_far = brightness(path.read_bytes())
        assert len(so_far) >= 8, "the last frame waits for the next"
        writer.push(frames[9:])
        with pytest.raises(ValueError, match="frames have 16x48 pixels; this video has 32x48"):
            writer.push(frames[:, :16])
    whole = brightness(path.read_bytes())
    assert len(whole) == 21
    np.testing.assert_allclose(whole, frames.mean((1, 2, 3)), atol=2)  # 4:2:0, 8 bits, crf 18
    np.testing.assert_allclose(so_far, whole[: len(so_far)], atol=0)


def test_what_was_written_stays_when_the_work_is_broken_off(tmp_path):
    path = tmp_path / "out.mp4"

    def broken_off():
        with fragmented_mp4(path, fps=24) as writer:
            writer.push(clip(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert len(brightness(path.read_bytes())) == 5
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 24


def test_a_file_is_opened_when_its_first_frames_are_there(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"an earlier video")
    with fragmented_mp4(path):
        pass
    assert path.read_bytes() == b"an earlier video"
    with fragmented_mp4(path) as writer:
        writer.push(clip(2))
    assert len(brightness(path.read_bytes())) == 2


def test_bad_files_are_refused(tmp_path):
    for arguments, message in (
        ({"path": tmp_path / "a.mkv"}, "must end in .mp4"),
        ({"path": tmp_path / "a.mp4", "fps": 0}, "fps=0 is not a number in 1 to 1000"),
        ({"path": tmp_path / "a.mp4", "crf": 60}, "crf=60 must be in 0"),
    ):
        with pytest.raises(ValueError, match=message), fragmented_mp4(**arguments):
            pass
    with pytest.raises(FileNotFoundError), fragmented_mp4(tmp_path / "nowhere" / "a.mp4"):
        pass
