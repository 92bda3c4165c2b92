"""The contact sheet shows a clip's own frames, and below each what its latents decode to. The VAE is a stand-in here."""

import numpy as np
import pytest
from PIL import Image

from fps_train.precompute import check, encode
from fps_train.precompute.buckets import Size
from fps_train.precompute.run import Recipe, precompute
from tests.checkpoints import small_checkpoint
from tests.fps_train.clip_files import write

# Of frames 0, 4 and 8, which are those on the sheet of 9. None is near another, nor near another's opposite.
COLOURS = {
    "a": [(200, 40, 40), (40, 200, 40), (40, 40, 200)],
    "b": [(200, 120, 40), (40, 200, 120), (120, 40, 200)],
}
NEAR = 6  # of 255: 3 of the codec's colours (test_frames), 1 of bf16


def opposite(colour):
    return tuple(255 - level for level in colour)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data of two clips; their latents are the colours of every fourth frame."""
    folder = tmp_path_factory.mktemp("made")
    clips = folder / "clips"
    clips.mkdir()
    for name, colours in COLOURS.items():
        frames = np.full((9, 32, 48, 3), 128, np.uint8)
        frames[::4] = np.array(colours)[:, None, None]
        write(clips / f"{name}.mp4", frames)
        (clips / f"{name}.txt").write_text(f"Clip {name}.")

    def encoded(config, params, video, *, tiling):
        small = np.moveaxis(video[:, ::4, ::8, ::8], -1, 1)
        return np.pad(small, ((0, 0), (0, config.z_dim - 3), (0, 0), (0, 0), (0, 0)))

    def states(config, params, ids, mask, *, dtype):
        return np.zeros((*ids.shape, config.dit.text_dim), dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "encode", encoded)
        patch.setattr(encode, "text_states", states)
        recipe = Recipe(
            model=str(small_checkpoint()), videos=clips, captions=None, output=folder / "data", sizes=(Size(32, 48, 9),), exact=True
        )  # fmt: skip
        precompute(recipe, lambda _: None)
    return folder


@pytest.fixture
def sheet(made, tmp_path, monkeypatch):
    """Draws one. What latents decode to is the opposite of their colours, frame by frame."""

    def decoded(config, params, latents):
        of_frame = np.moveaxis(np.asarray(latents)[:, :3], 1, -1).repeat(4, axis=1)[:, :9]
        return -of_frame.repeat(8, axis=2).repeat(8, axis=3)

    monkeypatch.setattr(check, "decode", decoded)

    def draw() -> np.ndarray:
        check.contact_sheet(made / "data", str(small_checkpoint()), tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as image:
            return np.asarray(image.convert("RGB")).astype(int)

    return draw


def boxes(sheet: np.ndarray, colour: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """Top, left, bottom and right of what has a colour; None for nothing."""
    rows, columns = np.nonzero((np.abs(sheet - colour) <= NEAR).all(-1))
    return (int(rows.min()), int(columns.min()), int(rows.max()), int(columns.max())) if len(rows) else None


def test_a_contact_sheet_has_the_frames_of_each_clip_and_below_them_what_its_latents_decode_to(sheet):
    pixels = sheet()
    for colours in COLOURS.values():
        after = -1
        for colour in colours:
            shown, decoded = boxes(pixels, colour), boxes(pixels, opposite(colour))
            assert shown is not None
            assert decoded is not None
            for top, left, bottom, right in (shown, decoded):
                part = pixels[top : bottom + 1, left : right + 1]
                assert bottom - top > 100
                assert abs((right - left) / (bottom - top) - 48 / 32) < 0.05
                middle = part[2:-2, 2:-2]
                assert np.ptp(middle, axis=(0, 1)).max() == 0  # one picture of one colour, not several
            assert shown[2] < decoded[0] < shown[2] + (shown[2] - shown[0])  # the next row
            assert abs(shown[1] - decoded[1]) <= 2
            assert abs(shown[3] - decoded[3]) <= 2
            assert shown[1] > after  # in order of time
            after = shown[3]


def test_of_a_clip_that_has_changed_the_latents_are_shown_alone(sheet, made):
    path = made / "clips" / "b.mp4"
    before = path.read_bytes()
    write(path, np.full((9, 32, 48, 3), 128, np.uint8))
    try:
        pixels = sheet()
    finally:
        path.write_bytes(before)
    assert [boxes(pixels, colour) for colour in COLOURS["b"]] == [None] * 3
    assert all(boxes(pixels, opposite(colour)) for colour in COLOURS["b"])
    assert all(boxes(pixels, colour) for colour in COLOURS["a"])
