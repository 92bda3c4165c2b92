"""Conditioning images: from what a user has to float arrays at the video's size, and on to CLIP's pixels."""

import contextlib
import logging
import math
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

log = logging.getLogger("fps_jax")

# What is decoded. Pillow knows many more, among them EPS, which it hands to another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 2**26  # 8192 x 8192: one bit a pixel in a file of kilobytes is twelve bytes a pixel as floats
_CROP = 0.1  # a share of the picture that isn't lost without a word
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_image(
    x: Any, height: int, width: int, name: str = "image", *, tell_crop: bool = False
) -> Float[np.ndarray, "B H W 3"]:
    """An image, or a batch of them, at the video's size.

    Args:
      x: a path, a PIL image (any 8-bit mode; EXIF rotation applied, transparency dropped), a uint8 array `[H, W, 3]` or
        `[B, H, W, 3]`, or a float array of these shapes in [0, 1], which is never rounded to 8 bits; or a list of single images.
      height, width: pixels. An image of this size is used as it is; another is scaled to cover it (Lanczos with
        antialiasing, in float) and cropped around its centre.
      name: the argument's name, for error messages.
      tell_crop: log a crop by which more than a tenth of the picture is lost.
    Returns: float32 in [0, 1]; B is 1 for a single image.
    Raises: OSError for a file that can't be read as an image; ValueError for a wrong type, shape, dtype or value, or a file of
      more than `MAX_PIXELS`.
    """
    if isinstance(x, list | tuple):
        return np.concatenate(
            [_one(item, height, width, f"{name}[{i}]", tell_crop) for i, item in enumerate(_listed(x, name))]
        )
    if isinstance(x, str | os.PathLike):
        x = _read(Path(x), name)
    if _is_pil(x):
        x = _from_pil(x, name)
    image = _from_array(x, name)
    if image.shape[1:3] == (height, width):
        return image
    if tell_crop:
        log_crop(image.shape[1], image.shape[2], height, width, name)
    return np.stack([_cover(frame, height, width) for frame in image])


def image_count(x: Any, name: str = "image") -> int:
    """How many images `load_image` makes of this, as far as that is known without reading a file; it checks no more."""
    if isinstance(x, list | tuple):
        return len(_listed(x, name))
    return len(x) if getattr(x, "ndim", 0) == 4 else 1


def image_size(x: Any, name: str = "image") -> tuple[int, int]:
    """Height and width in pixels, of the first of several; of a file its header alone is read. Raises as `load_image`."""
    if isinstance(x, list | tuple):
        return image_size(_listed(x, name)[0], f"{name}[0]")
    if isinstance(x, str | os.PathLike):
        with _opened(Path(x), name) as image:
            return _upright_size(image)
    if _is_pil(x):
        return _upright_size(x)
    return _from_array(x, name).shape[1:3]


def area_size(height: float, width: float, area: int, multiple: int = 16) -> tuple[int, int]:
    """The size that keeps the aspect of a picture at an area of pixels, both sides rounded down to a multiple.

    Source: wan/image2video.py (`max_area`).
    """
    aspect = height / width
    # A billionth more: the root of what should be 480 squared is 479.99999999999994, which would lose 16 rows.
    rows, columns = (math.sqrt(side) * (1 + 1e-9) for side in (area * aspect, area / aspect))
    return max(1, int(rows // multiple)) * multiple, max(1, int(columns // multiple)) * multiple


def _one(x: Any, height: int, width: int, name: str, tell_crop: bool) -> Float[np.ndarray, "1 H W 3"]:
    if isinstance(x, list | tuple):
        raise ValueError(f"{name} is a list in a list; give one image for each prompt")
    image = load_image(x, height, width, name, tell_crop=tell_crop)
    if len(image) != 1:
        raise ValueError(f"{name} has {len(image)} images; in a list, give one image for each prompt")
    return image


def _listed(x: Sequence[Any], name: str) -> Sequence[Any]:
    if not len(x):
        raise ValueError(f"{name} is an empty list; pass one image for all prompts, or one for each")
    return x


def _is_pil(x: Any) -> bool:
    return hasattr(x, "convert") and hasattr(x, "mode")


def log_crop(height: float, width: float, to_height: int, to_width: int, name: str) -> None:
    """Logs how much of a picture is lost to the crop, where that is more than a tenth, and which size would keep it."""
    left, top, right, bottom = cover_box(height, width, to_height, to_width)
    lost = 1 - (right - left) * (bottom - top) / (height * width)
    if lost > _CROP:
        rows, columns = area_size(height, width, to_height * to_width)
        log.warning(
            "%s of %d x %d (height x width) loses %d%% of its picture to the crop to %d x %d; height=%d width=%d "
            "(size='area') keeps its aspect",
            name, height, width, round(100 * lost), to_height, to_width, rows, columns,
        )  # fmt: skip


@contextlib.contextmanager
def _opened(path: Path, name: str):
    """A PIL image whose header alone was read: a regular file of a known format, not too large."""
    from PIL import Image

    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}={str(path)!r} doesn't exist; check the path") from None
    if not stat.S_ISREG(mode):
        raise OSError(
            f"{name}={str(path)!r} can't be read as an image (it is no regular file); use a PNG, JPEG or WebP"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(path, name, f"{image.width} x {image.height} pixels")
            yield image
    except Image.DecompressionBombError:
        raise _too_large(path, name, "hundreds of millions of pixels") from None
    except _TooLargeError:
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error and others
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(f"{name}={str(path)!r} can't be read as an image ({reason}); use a PNG, JPEG or WebP") from error


class _TooLargeError(ValueError):
    pass


def _too_large(path: Path, name: str, size: str) -> _TooLargeError:
    return _TooLargeError(
        f"{name}={str(path)!r} has {size}, more than {MAX_PIXELS:,}; scale it down to about the video's size"
    )


def _read(path: Path, name: str) -> Any:
    with _opened(path, name) as image:
        image.load()
        return image


def _upright_size(image: Any) -> tuple[int, int]:
    """Height and width as the EXIF rotation has them."""
    turned = _orientation(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def _orientation(image: Any) -> int:
    """EXIF's, 1 for upright; 1 also where the block is damaged: the pixels are whole without it."""
    from PIL import ExifTags

    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # SyntaxError, struct.error, whatever the damage leads to
        return 1
    return value if value in _UPRIGHT else 1


# What turns a picture upright, by EXIF's orientation (TIFF 6.0, tag 274). Not `ImageOps.exif_transpose`, which also writes the
# block anew and fails on one that can be read but not written.
_UPRIGHT = {
    1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def _from_pil(image: Any, name: str) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has PIL mode {image.mode!r}, whose range is unknown; convert it to RGB")
    turn = _UPRIGHT[_orientation(image)]
    if turn is not None:
        image = image.transpose(Image.Transpose[turn])
    return np.asarray(image.convert("RGB"))


def _from_array(x: Any, name: str) -> np.ndarray:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise ValueError(f"{name} is a {type(x).__name__}; pass a path, a PIL image, an array, or a list of them")
    array = np.asarray(x)
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; it must be [H, W, 3] or [B, H, W, 3], channels last")
    if array.dtype == np.uint8:
        image = array.astype(np.float32) / 255
    elif jnp.issubdtype(array.dtype, jnp.floating):
        image = array.astype(np.float32)
        if not (image.min() >= 0 and image.max() <= 1):  # written so that NaN is refused, too
            raise ValueError(
                f"{name} has values in [{image.min():.4g}, {image.max():.4g}]; floats must be in [0, 1] and finite"
                " (divide 0..255 by 255; map -1..1 by x / 2 + 0.5)"
            )
    else:
        raise ValueError(f"{name} has dtype {array.dtype}; pass uint8 in 0..255 or floats in [0, 1]")
    return image if image.ndim == 4 else image[None]


def cover_box(
    height: float, width: float, to_height: int, to_width: int, *, pixel_aspect: float = 1.0
) -> tuple[float, float, float, float]:
    """The part of a picture that is left when it covers another size and is cropped around its centre.

    Args:
      height, width: pixels of the picture.
      to_height, to_width: pixels of the size that it has to cover.
      pixel_aspect: how wide a pixel of the picture is on the screen, in its heights.
    Returns: left, top, right, bottom in pixels of the picture: fractional, so that it is resampled in one go, nothing rounded.
    """
    scale = max(to_height / height, to_width / (width * pixel_aspect))
    crop_h, crop_w = to_height / scale, to_width / scale / pixel_aspect
    top, left = (height - crop_h) / 2, (width - crop_w) / 2
    # rounding must not push the box out of the image
    return max(left, 0), max(top, 0), min(left + crop_w, width), min(top + crop_h, height)


def _cover(image: Float[np.ndarray, "H W 3"], height: int, width: int) -> Float[np.ndarray, "h w 3"]:
    from PIL import Image

    box = cover_box(image.shape[0], image.shape[1], height, width)
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.LANCZOS, box=box))
        for channel in np.ascontiguousarray(image.transpose(2, 0, 1))
    ]
    return np.clip(np.stack(channels, axis=-1), 0, 1)


def _bicubic_matrix(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Interpolation along an axis: Keys' kernel with a = -0.75, half-pixel centres, edges repeated, no antialiasing."""
    # The position in float32, as torch has it: at 1280 pixels float64 differs by 1e-4 of a pixel.
    scale = np.float32(source) / np.float32(target)
    position = scale * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    first = np.floor(position)
    offset = (position - first).astype(np.float64)
    matrix = np.zeros((target, source))
    a = -0.75
    for tap in (-1, 0, 1, 2):
        distance = np.abs(offset - tap)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        column = np.clip(first.astype(int) + tap, 0, source - 1)
        np.add.at(matrix, (np.arange(target), column), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def clip_pixels(image: Float[np.ndarray, "B H W 3"], size: int = 224) -> Float[np.ndarray, "B P P 3"]:
    """Pixels for the image tower: squeezed to size x size and normalised with CLIP's mean and deviation.

    As the official code does it: torch's bicubic `interpolate` of the whole frame, with neither crop nor antialiasing.
    diffusers' CLIPImageProcessor instead scales the shorter side, antialiased, and crops the middle; we follow the code
    that the models were released with.

    Args:
      image: float in [0, 1], any size, as from `load_image`.
      size: P, 224 for ViT-H/14.
    Returns: float32, normalised; bicubic overshoot is kept.
    Source: wan/modules/clip.py (CLIPModel.visual).
    """
    if size < 1 or image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(f"image of shape {image.shape} with size={size}: pass [B, H, W, 3] and a positive size")
    rows, columns = _bicubic_matrix(image.shape[1], size), _bicubic_matrix(image.shape[2], size)
    image = np.einsum("yh,bhwc->bywc", rows, np.asarray(image, np.float32), optimize=True)
    image = np.einsum("xw,bywc->byxc", columns, image, optimize=True)
    return (image - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
