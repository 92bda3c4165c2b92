"""Clips in memory: which stretches there are, of which frames, and the bound."""

import numpy as np
import pytest
from PIL import Image

from fps_train.precompute.buckets import Size
from fps_train.precompute.clips import find_clips
from fps_train.precompute.memory import load_stretches
from tests.fps_train.clip_files import numbered, numbers, write

FRAME = 16 * 16 * 3  # bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    write(path / "a.mp4", numbered(11))
    write(path / "b.mp4", numbered(10)[::2].repeat(2, axis=0), fps=32)  # 5 frames at 16 a second: 0, 2, 4, 6, 8
    write(path / "short.mp4", numbered(3))
    Image.fromarray(numbered(2)[1]).save(path / "still.png")
    return path


def load(folder, num_frames, frames_allowed=1000, **other):
    return load_stretches(folder, None, Size(16, 16, num_frames), max_bytes=frames_allowed * FRAME, **other)


def test_stretches_are_consecutive_frames_of_one_clip(folder):
    said = []
    read = load(folder, 5, tell=said.append)
    a = [list(range(i, i + 5)) for i in range(7)]
    b = [0, 2, 4, 6, 8]
    assert [numbers(clip) for clip in read.read(read.starts)] == [*a, b]
    assert [numbers(clip) for clip in read.read(read.apart)] == [a[0], a[5], b]
    assert read.pixels.dtype == np.uint8
    assert said == [
        "dropped:\n       2  shorter than 5 frames at 16 fps: short.mp4 (3), still.png (1)",
        "2 clips, 8 stretches of 16x16x5: 1.14e-05 GiB in memory",
    ]


def test_with_one_frame_every_frame_is_an_image(folder):
    read = load(folder, 1)
    assert numbers(read.read(read.starts)[:, 0]) == [*range(11), 0, 2, 4, 6, 8, 0, 1, 2, 1]
    np.testing.assert_array_equal(read.starts, read.apart)


def test_the_bound_is_exact(folder):
    assert len(load(folder, 1, frames_allowed=20).pixels) == 20
    with pytest.raises(ValueError, match=r"4 of 4 clips at 16 x 16 take more than the .* GiB .*--max-gib"):
        load(folder, 1, frames_allowed=19)
    with pytest.raises(ValueError, match="1 of 4 clips"):
        load(folder, 1, frames_allowed=10)
    with pytest.raises(ValueError, match="one clip of 16x16x5 takes more than the"):
        load(folder, 5, frames_allowed=4)


def test_what_is_no_video_is_said_and_nothing_left_is_an_error(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"no clip is left of 1: x\.mp4: can't be read"):
        load(tmp_path, 1)


def test_clips_need_no_caption_and_a_table_chooses(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, numbered(2))
    assert [clip.source for clip in find_clips(tmp_path, captioned=False)[0]] == ["a.mp4", "b.mp4"]
    table = tmp_path / "t.csv"
    table.write_text("video,text\nb.mp4,\n")
    assert [clip.source for clip in find_clips(None, table, captioned=False)[0]] == ["b.mp4"]
    assert not find_clips(None, table)[0]
