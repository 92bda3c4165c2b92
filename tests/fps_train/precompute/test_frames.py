"""Which frames of a clip are taken, by what the decoder gives; upright, of the right shape and colours."""

import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from fps_jax.media import clips
from fps_train.precompute import frames
from fps_train.precompute.clips import ClipError
from fps_train.precompute.frames import probe, read_frames
from tests.fps_train.clip_files import numbered, numbers, write


def read(path, count, height=32, width=48, fps=16):
    return read_frames(path, is_image=path.suffix == ".png", fps=fps, num_frames=count, height=height, width=width)


def look(path, limit=81, fps=16):
    return probe(path, is_image=path.suffix == ".png", fps=fps, limit=limit)


# Matroska rounds 62.5 ms to 62 or 63: a clip of the data's own rate must not lose or repeat a frame for that.
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_clip_of_the_same_rate_keeps_every_frame(tmp_path, name):
    path = write(tmp_path / name, numbered(33))
    assert look(path) == (33, 33, False, 32, 48)
    assert numbers(read(path, 33)) == list(range(33))


@pytest.mark.parametrize("rate", [8, 24, 25, Fraction(30000, 1001), 60])
def test_another_rate_shows_what_is_on_screen(tmp_path, rate):
    path = write(tmp_path / "clip.mp4", numbered(36), fps=rate)
    # the last frame that is due up to 2 ms after the instant (clips.py says why), until the last one's time is over
    instants = [Fraction(j, 16) + Fraction(2, 1000) for j in range(100)]
    want = [int(t * rate) for t in instants if t < 36 / Fraction(rate)]
    assert look(path).frames == len(want)
    assert numbers(read(path, len(want))) == want


def test_a_variable_rate_goes_by_timestamps(tmp_path):
    rng = np.random.default_rng(0)
    times = np.cumsum([0, *rng.integers(15, 300, 29)])  # ms
    path = write(tmp_path / "clip.mkv", numbered(30), times=[Fraction(int(t), 1000) for t in times])
    instants = [1000 * j / 16 for j in range(int(times[-1] * 16 / 1000))]
    want = [int(np.flatnonzero(times <= t + 2)[-1]) for t in instants]
    assert len(set(want)) < len(want)  # some are held, and some left out
    assert sorted(set(want)) != list(range(30))
    assert numbers(read(path, len(want))) == want


def test_no_more_is_decoded_than_can_matter(tmp_path):
    path = write(tmp_path / "clip.mp4", numbered(40))
    seen = look(path, limit=9)
    assert (seen.frames, seen.longer) == (9, True)
    assert seen.decoded <= 11
    assert not look(path, limit=40).longer


def test_decoded_frames_count_not_what_the_container_says(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), np.uint8)
    content = write(tmp_path / "clip.mkv", noise).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(content[: len(content) // 2])
    with av.open(str(cut)) as container:
        assert container.duration == pytest.approx(2.5e6, rel=0.1)  # microseconds: it still says 40 frames
    seen = look(cut)
    assert 15 <= seen.frames <= 21  # frames of noise are about equally large
    assert seen.frames == seen.decoded


def test_a_hole_in_a_clip_is_noticed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), np.uint8)
    path = write(tmp_path / "clip.mkv", noise)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(ClipError, match="damaged") as error:
        look(path)
    assert error.value.detail.startswith("at frame")


@pytest.mark.parametrize(("rotation", "corner"), [(90, (1, 0)), (-90, (0, 1)), (180, (1, 1))])
def test_phone_videos_stand_upright(tmp_path, rotation, corner):
    """Turned counter-clockwise by the display matrix's angle: the top left corner goes to `corner` (down, right)."""
    pixels = np.zeros((5, 32, 64, 3), np.uint8)
    pixels[:, :16, :32] = 255
    path = write(tmp_path / "clip.mp4", pixels, rotation=rotation)
    height, width = (64, 32) if abs(rotation) == 90 else (32, 64)
    assert look(path)[3:] == (height, width)
    out = read(path, 5, height, width)[0].astype(int).mean(-1)
    quarters = out.reshape(2, height // 2, 2, width // 2).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner
    assert quarters.max() > 250
    assert np.sort(quarters.ravel())[2] < 5


def test_pixels_that_are_not_square_are_shown_as_wide_as_they_are(tmp_path):
    pixels = np.zeros((5, 32, 32, 3), np.uint8)
    pixels[:, :, 8:24] = 255
    path = write(tmp_path / "clip.mp4", pixels, pixel_aspect=Fraction(2))
    assert look(path)[3:] == (32, 64)
    out = read(path, 5, 32, 64)[0, 16, :, 0]
    assert out[:14].max() < 40  # nothing is cropped: a quarter of the width is black at each side
    assert out[20:44].min() > 215
    assert out[50:].max() < 40


def test_a_clip_covers_the_size_and_is_cropped_around_its_centre(tmp_path):
    pixels = np.zeros((5, 32, 96, 3), np.uint8)
    pixels[:, :, 32:64] = 200
    out = read(write(tmp_path / "clip.mp4", pixels), 5, 64, 64)  # the middle third, twice as large
    assert out.shape == (5, 64, 64, 3)
    assert np.abs(out[:, :, 4:60].astype(int) - 200).max() <= 4


@pytest.mark.parametrize(("size", "matrix"), [((32, 48), "ITU601"), ((720, 64), "ITU709")])
def test_colours_of_untagged_clips_are_read_as_players_do(tmp_path, size, matrix):
    from av.video.reformatter import Colorspace

    colour = np.array([200, 60, 30], np.uint8)
    with av.open(str(tmp_path / "clip.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=16, options={"crf": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (*size, 3)).copy(), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=getattr(Colorspace, matrix))
            frame.colorspace = 2  # unspecified
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    out = read(tmp_path / "clip.mp4", 5, 32, 32)
    assert np.abs(out.astype(int) - colour).max() <= 3  # the other matrix is off by 20


def test_an_image_is_one_frame(tmp_path):
    Image.fromarray(numbered(1, 64, 96)[0]).save(tmp_path / "picture.png")
    assert look(tmp_path / "picture.png") == (1, 1, False, 64, 96)
    assert (read(tmp_path / "picture.png", 1) == 10).all()


def test_reasons(tmp_path, monkeypatch):
    def reason(path):
        with pytest.raises(ClipError) as error:
            look(path)
        return str(error.value)

    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.png").write_text("not an image")
    assert reason(tmp_path / "text.mp4") == reason(tmp_path / "text.png") == "can't be read"
    good = write(tmp_path / "good.mp4", numbered(9))
    Image.fromarray(numbered(1)[0]).save(tmp_path / "good.png")
    with pytest.raises(ClipError, match="it changed since it was looked at"):
        read(good, 13)
    with av.open(str(tmp_path / "sound.mp4"), "w") as output:
        stream = output.add_stream("aac", rate=8000)
        output.mux(stream.encode(_silence()))
        output.mux(stream.encode())
    assert reason(tmp_path / "sound.mp4") == "no video in it"
    fast = write(tmp_path / "fast.mkv", numbered(20), times=[Fraction(0)] * 20)
    monkeypatch.setattr(clips, "_MOST_RATE", 0)
    assert reason(fast).startswith("over 0 frames a second")
    for module in (clips, frames):
        monkeypatch.setattr(module, "MOST_PIXELS", 1000)
    assert reason(good) == reason(tmp_path / "good.png") == "larger than 8192 x 8192 pixels"
    shutil.rmtree(tmp_path)


def _silence():
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    return frame
