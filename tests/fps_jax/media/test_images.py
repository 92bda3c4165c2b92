"""Conditioning images in, CLIP pixels out (tests/data/bicubic.safetensors: torch's interpolate)."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from fps_jax.media.images import area_size, clip_pixels, image_count, image_size, load_image
from tests.reference import golden, rel_l2


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


@pytest.mark.parametrize("kind", ["path", "str", "pil", "uint8", "float32", "float64", "batch", "jax"])
def test_target_size_is_used_as_is(tmp_path, pixels, kind):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    unit = pixels.astype(np.float32) / 255
    given = {
        "path": tmp_path / "a.png",
        "str": str(tmp_path / "a.png"),
        "pil": Image.fromarray(pixels),
        "uint8": pixels,
        "float32": unit,
        "float64": pixels / 255,
        "batch": unit[None],
        "jax": jnp.asarray(unit),
    }[kind]
    out = load_image(given, 32, 48)
    assert (out.shape, out.dtype) == ((1, 32, 48, 3), np.float32)
    np.testing.assert_array_equal(out[0], unit)


def test_floats_are_never_rounded_to_8_bits():
    image = np.random.default_rng(1).random((32, 48, 3), np.float32)
    np.testing.assert_array_equal(load_image(image, 32, 48)[0], image)
    ramp = np.broadcast_to(np.linspace(0.5, 0.501, 96, dtype=np.float32)[None, :, None], (64, 96, 3))
    assert len(np.unique(load_image(ramp, 32, 48))) > 10  # resized, too: less than one 8-bit step, yet not flat


def test_a_batch_stays_a_batch():
    images = np.random.default_rng(2).random((3, 40, 40, 3), np.float32)
    out = load_image(images, 16, 32)
    assert out.shape == (3, 16, 32, 3)
    np.testing.assert_array_equal(out[1], load_image(images[1], 16, 32)[0])


@pytest.mark.parametrize("size", [(64, 96), (50, 50), (20, 96), (31, 17), (200, 48)])
def test_cover_and_crop_is_pillows_fit(size):
    """ImageOps.fit scales to cover and crops around the centre; on one float channel it is exactly what we want."""
    channel = np.random.default_rng(3).random(size, np.float32)
    want = np.asarray(ImageOps.fit(Image.fromarray(channel), (48, 32), Image.Resampling.LANCZOS))
    got = load_image(np.stack([channel, channel, 1 - channel], axis=-1), 32, 48)[0]
    np.testing.assert_allclose(got[..., 0], np.clip(want, 0, 1), atol=1e-5)
    np.testing.assert_array_equal(got[..., 0], got[..., 1])
    assert got.min() >= 0
    assert got.max() <= 1  # Lanczos overshoots; the range is kept


def test_the_crop_keeps_the_middle():
    image = np.zeros((32, 144, 3), np.float32)
    image[:, 48:96] = 1
    np.testing.assert_array_equal(load_image(image, 32, 48)[0], np.ones((32, 48, 3), np.float32))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK", "1"])
def test_other_pil_modes_become_rgb(pixels, mode):
    image = Image.fromarray(pixels).convert(mode)
    want = np.asarray(image.convert("RGB"), np.float32) / 255
    np.testing.assert_array_equal(load_image(image, 32, 48)[0], want)


# What each orientation's first row and column are, of the upright picture (TIFF 6.0, tag 274).
UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),  # as a phone held upright writes it
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: np.rot90,
    0: lambda x: x,  # no orientation: as it is
    9: lambda x: x,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(tmp_path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    want = UPRIGHT[orientation](pixels)
    assert image_size(tmp_path / "a.png") == want.shape[:2]
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", *want.shape[:2])[0], want / np.float32(255))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"last_image='no/such.png' doesn't exist; check the path"):
        load_image("no/such.png", 32, 48, name="last_image")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_unreadable_file(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(
        OSError, match=r"image='.*a.png' can't be read as an image .*; use a PNG, JPEG or WebP"
    ) as caught:
        load_image(tmp_path / "a.png", 32, 48)
    assert "\n" not in str(caught.value)


def test_truncated_file(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(OSError, match="can't be read as an image"):
        load_image(tmp_path / "b.png", 32, 48)


def test_a_folder_is_not_an_image(tmp_path):
    with pytest.raises(OSError, match="can't be read as an image"):
        load_image(tmp_path, 32, 48)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((32, 48), np.uint8), r"image has shape \(32, 48\); it must be"),
        (np.zeros((3, 32, 48), np.float32), r"channels last"),
        (np.zeros((32, 48, 4), np.uint8), r"must be \[H, W, 3\]"),
        (np.zeros((0, 48, 3), np.float32), r"must be \[H, W, 3\]"),
        (np.zeros((1, 1, 32, 48, 3), np.float32), r"must be \[H, W, 3\]"),
        (np.zeros((32, 48, 3), np.int32), "dtype int32; pass uint8"),
        (np.full((32, 48, 3), 255.0), r"values in \[255, 255\]; floats must be in \[0, 1\]"),
        (np.full((32, 48, 3), -0.5), r"values in \[-0.5, -0.5\]"),
        (np.full((32, 48, 3), np.nan), r"values in \[nan, nan\]; floats must be in \[0, 1\] and finite"),
        (np.full((32, 48, 3), np.inf), r"values in \[inf, inf\]"),
        (3, "image is a int; pass a path, a PIL image, an array, or a list of them"),
        ([], "image is an empty list; pass one image for all prompts, or one for each"),
        ([[np.zeros((32, 48, 3), np.uint8)]], r"image\[0\] is a list in a list"),
        ([np.zeros((2, 32, 48, 3), np.uint8)], r"image\[0\] has 2 images; in a list, give one"),
        ([np.zeros((32, 48, 3), np.uint8), 3], r"image\[1\] is a int; pass a path"),
        (Image.new("I", (48, 32)), "PIL mode 'I', whose range is unknown; convert it to RGB"),
        (Image.new("F", (48, 32)), "PIL mode 'F'"),
    ],
)
def test_wrong_input(x, message):
    with pytest.raises(ValueError, match=message):
        load_image(x, 32, 48)


def test_one_nan_is_enough():
    image = np.full((32, 48, 3), 0.5, np.float32)
    image[3, 4, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        load_image(image, 32, 48)


@pytest.mark.parametrize("name", ["down", "up", "same", "wide"])
def test_clip_pixels_are_torchs_bicubic(name):
    case = golden("bicubic")
    out = clip_pixels(case[f"{name}.in"].astype(np.float32), size=28)
    assert out.dtype == np.float32
    assert rel_l2(out, case[f"{name}.out"]) <= 1e-5
    np.testing.assert_allclose(out, case[f"{name}.out"], atol=1e-5)


def test_clip_pixels_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"image of shape \(32, 48, 3\) with size=224: pass \[B, H, W, 3\]"):
        clip_pixels(np.zeros((32, 48, 3), np.float32))


def test_a_list_of_images_is_a_batch_of_them_each_scaled_for_itself(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    other = np.random.default_rng(4).random((20, 50, 3), np.float32)
    out = load_image([tmp_path / "a.png", Image.fromarray(pixels[::-1]), other], 32, 48)
    assert out.shape == (3, 32, 48, 3)
    for i, one in enumerate((pixels, pixels[::-1], other)):
        np.testing.assert_array_equal(out[i], load_image(one, 32, 48)[0])
    assert [image_count(x) for x in (other, other[None], [other, other], "a.png", np.stack([other] * 5))] == [
        1,
        1,
        2,
        1,
        5,
    ]


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True})])
def test_an_image_with_a_damaged_exif_block_has_its_pixels(tmp_path, pixels, name, options):
    """eXIf is an ancillary chunk in the PNG specification: the picture is whole without it."""
    Image.fromarray(pixels).save(tmp_path / name, exif=b"Exif\0\0garbage", **options)
    np.testing.assert_array_equal(load_image(tmp_path / name, 32, 48)[0], pixels / np.float32(255))
    assert image_size(tmp_path / name) == (32, 48)


def test_pixels_are_counted_before_any_is_decoded(tmp_path):
    """One bit a pixel, 13000 x 13000: some 20 kilobytes of file, gigabytes as floats."""
    import tracemalloc

    Image.new("1", (13000, 13000)).save(tmp_path / "a.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "b.png")  # beyond Pillow's own limit
    for name in ("a.png", "b.png"):
        tracemalloc.start()
        with pytest.raises(ValueError, match=rf"image='.*{name}' has .* pixels, more than 67,108,864; scale it down"):
            load_image(tmp_path / name, 32, 48)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


def test_a_format_that_runs_another_program_is_not_opened(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(OSError, match=r"a.png' can't be read as an image .*; use a PNG, JPEG or WebP"):
        load_image(tmp_path / "a.png", 32, 48)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match=r"a.png' can't be read as an image \(it is no regular file\)"):
        load_image(tmp_path / "a.png", 32, 48)


def test_a_large_crop_is_told_with_the_size_that_avoids_it(pixels, caplog):
    portrait = np.zeros((192, 96, 3), np.uint8)
    load_image(portrait, 96, 160, tell_crop=True)  # 96 x 57.6 of 96 x 192 remain
    told = "image of 192 x 96 (height x width) loses 70% of its picture to the crop to 96 x 160; height=160 width=80"
    assert told in caplog.text
    caplog.clear()
    load_image(portrait, 160, 80, tell_crop=True)
    load_image(np.zeros((34, 48, 3), np.uint8), 32, 48, tell_crop=True)  # 6% are lost
    assert not caplog.text


@pytest.mark.parametrize(
    ("size", "area", "want"),
    [((480, 832), (480, 832), (480, 832)), ((832, 480), (480, 832), (832, 480)), ((1000, 1000), (480, 832), (624, 624)),
     ((720, 1280), (480, 832), (464, 832)), ((3, 3000), (480, 832), (16, 19968))],
)  # fmt: skip
def test_a_size_of_the_images_aspect_is_the_official_codes(size, area, want):
    """wan/image2video.py: round(sqrt(max_area * aspect) // 8 // 2 * 2) latents of 8 pixels, and so the columns."""
    most, aspect = area[0] * area[1], size[0] / size[1]
    assert area_size(*size, most) == want
    official = tuple(round(np.sqrt(side) // 8 // 2 * 2) * 8 for side in (most * aspect, most / aspect))
    assert official == want or (size, official) == ((480, 832), (464, 832))  # there 480 squared has a root below 480


def test_the_size_of_an_image_is_as_it_is_seen(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == (48, 32)
    assert image_size([pixels, pixels[:16]]) == (32, 48)
