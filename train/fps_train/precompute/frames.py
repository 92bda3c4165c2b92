"""Frames of clips and images, as training reads them."""

import hashlib
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from fps_jax.errors import one_line
from fps_jax.media.clips import MOST_PIXELS, ClipError, covering, display_size, resampled
from fps_jax.media.images import load_image
from fps_jax.media.video import video_to_uint8


class Probe(NamedTuple):
    """What decoding a clip showed.

    Attributes:
      frames: at the new rate; no more were looked for than the limit.
      decoded: frames as they come from the decoder, until then.
      longer: there is more of the clip than the limit.
      height, width: pixels, upright; the width of square pixels, so fractional for others.
    """

    frames: int
    decoded: int
    longer: bool
    height: float
    width: float


def content_hash(path: pathlib.Path) -> str:
    """Of a file's bytes, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def probe(path: pathlib.Path, *, is_image: bool, fps: int, limit: int) -> Probe:
    """Decode a clip as far as `limit` frames at the new rate. Raises ClipError."""
    if is_image:
        height, width = _load_image(path, None).shape[:2]
        return Probe(1, 1, False, height, width)
    count, longer, decoded, size = 0, False, 0, (0.0, 0.0)
    for count, decoded, shown in resampled(path, fps, limit + 1):  # noqa: B007  # of the last one
        size = display_size(shown)
    if count > limit:
        count, longer = limit, True
    return Probe(count, decoded, longer, *size)


def read_frames(
    path: pathlib.Path, *, is_image: bool, fps: int, num_frames: int, height: int, width: int
) -> UInt8[np.ndarray, "F H W 3"]:
    """The first frames of a clip at the new rate, each resized to cover the size (Lanczos) and cropped around its centre.

    Raises: ClipError, also where there are fewer frames than that.
    """
    if is_image:
        return _load_image(path, (height, width))[None]
    out, count = np.empty((num_frames, height, width, 3), np.uint8), 0
    for pixels in covering(path, fps, num_frames, height, width):
        out[count] = pixels
        count += 1
    if count < num_frames:
        raise ClipError("it changed since it was looked at", f"{count} frames, {num_frames} before")
    return out


def read_all_frames(
    path: pathlib.Path, *, is_image: bool, fps: int, limit: int, height: int, width: int
) -> UInt8[np.ndarray, "F H W 3"]:
    """As `read_frames`, but as many frames as there are, at most `limit`. Raises: ClipError."""
    if is_image:
        return _load_image(path, (height, width))[None]
    return np.stack(list(covering(path, fps, limit, height, width)))


def _load_image(path: pathlib.Path, size: tuple[int, int] | None) -> UInt8[np.ndarray, "H W 3"]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
        if width * height > MOST_PIXELS:
            raise ClipError("larger than 8192 x 8192 pixels", f"{width} x {height}")
        if size is None:
            size = _upright(path)
        return video_to_uint8(load_image(path, *size))[0]
    except ClipError:
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error and others
        raise ClipError("can't be read", one_line(error)) from None


def _upright(path: pathlib.Path) -> tuple[int, int]:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        width, height = ImageOps.exif_transpose(image).size
    return height, width
