"""Conditioning images: from what a user has to float arrays at the video's size, and on to CLIP's pixels."""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_image(x: Any, height: int, width: int, name: str = "image") -> Float[np.ndarray, "B H W 3"]:
    """An image, or a batch of them, at the video's size.

    Args:
      x: a path, a PIL image (any 8-bit mode; EXIF rotation applied, transparency dropped), a uint8 array `[H, W, 3]` or
        `[B, H, W, 3]`, or a float array of these shapes in [0, 1], which is never rounded to 8 bits.
      height, width: pixels. An image of this size is used as it is; another is scaled to cover it (Lanczos with
        antialiasing, in float) and cropped around its centre.
      name: the argument's name, for error messages.
    Returns: float32 in [0, 1]; B is 1 for a single image.
    Raises: OSError for a file that can't be read as an image; ValueError for a wrong type, shape, dtype or value.
    """
    if isinstance(x, str | os.PathLike):
        x = _read(Path(x), name)
    if hasattr(x, "convert") and hasattr(x, "mode"):  # a PIL image
        x = _from_pil(x, name)
    image = _from_array(x, name)
    if image.shape[1:3] == (height, width):
        return image
    return np.stack([_cover(frame, height, width) for frame in image])


def _read(path: Path, name: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}={str(path)!r} doesn't exist; check the path") from None
    except Exception as error:  # decoders raise SyntaxError, struct.error and others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{name}={str(path)!r} can't be read as an image ({reason}); use a PNG, JPEG or WebP") from error


def _from_pil(image: Any, name: str) -> np.ndarray:
    from PIL import ImageOps

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has PIL mode {image.mode!r}, whose range is unknown; convert it to RGB")
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _from_array(x: Any, name: str) -> np.ndarray:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise ValueError(f"{name} is a {type(x).__name__}; pass a path, a PIL image or an array")
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
    height: int, width: int, to_height: int, to_width: int, *, pixel_aspect: float = 1.0
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
