"""Clips decoded: which frame is on screen at each instant of the new rate, turned upright, covering the wanted size.

What counts is what the decoder gives: a container's number of frames and duration are never asked, and its rate only for raw
streams without timestamps.
"""

import contextlib
import hashlib
import pathlib
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from fps_jax.errors import one_line
from fps_jax.media.images import cover_box, load_image
from fps_jax.media.video import video_to_uint8
from fps_train.precompute.clips import ClipError

# Containers such as Matroska round timestamps to milliseconds: a frame due at 62.5 ms is stamped 63 and counts as on screen.
_TOLERANCE = Fraction(2, 1000)
_MOST_PIXELS = 1 << 26  # 8192 x 8192; larger frames are refused before they are decoded
_MOST_RATE = 1024  # decoded frames a second, on average


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


class _Shown(NamedTuple):
    """A decoded frame, `turns` quarter turns counter-clockwise from upright; `pixel_aspect` as it is before them."""

    frame: Any
    turns: int
    pixel_aspect: float


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
    for count, decoded, shown in _resampled(path, fps, limit + 1):  # noqa: B007  # of the last one
        size = _display_size(shown)
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
    for pixels in _covering(path, fps, num_frames, height, width):
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
    return np.stack(list(_covering(path, fps, limit, height, width)))


def _covering(
    path: pathlib.Path, fps: int, limit: int, height: int, width: int
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    last: _Shown | None = None
    for _, _, shown in _resampled(path, fps, limit):
        if last is None or shown.frame is not last.frame:
            last, pixels = shown, _cover(shown, height, width)
        yield pixels


def _load_image(path: pathlib.Path, size: tuple[int, int] | None) -> UInt8[np.ndarray, "H W 3"]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
        if width * height > _MOST_PIXELS:
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


def _display_size(shown: _Shown) -> tuple[float, float]:
    height, width = shown.frame.height, shown.frame.width * shown.pixel_aspect
    return (width, height) if shown.turns % 2 else (height, width)


def _cover(shown: _Shown, height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    from PIL import Image

    pixels = np.rot90(_rgb(shown.frame), shown.turns)
    aspect = 1 / shown.pixel_aspect if shown.turns % 2 else shown.pixel_aspect
    box = cover_box(pixels.shape[0], pixels.shape[1], height, width, pixel_aspect=aspect)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _rgb(frame: Any) -> UInt8[np.ndarray, "H W 3"]:
    from av.video.reformatter import Colorspace

    unspecified = frame.colorspace not in (1, 4, 5, 6, 7, 9, 10)  # ITU-T H.273's codes of matrices that are known
    if unspecified and frame.format.name.startswith("yuv"):
        # As players do: high definition is BT.709, the rest BT.601.
        matrix = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
        return frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray()
    return frame.to_ndarray(format="rgb24")


def _resampled(path: pathlib.Path, fps: int, limit: int) -> Iterator[tuple[int, int, _Shown]]:
    """(frames so far, frames decoded, what is on screen) at 0, 1/fps, 2/fps ... seconds after the first frame, `limit` at most.

    Frame j of the new rate is the last one whose timestamp isn't after j / fps, so clips of a variable rate keep their speed.
    """
    shown: _Shown | None = None
    start = seconds = gap = Fraction(0)
    count = decoded = 0
    with contextlib.closing(_decoded(path)) as frames:
        for following, at, lasts in frames:
            decoded += 1
            if decoded > 16 + _MOST_RATE * (limit + 1) // fps:
                raise ClipError(f"over {_MOST_RATE} frames a second")
            if shown is None:
                start = at
            elif at - start < seconds:
                raise ClipError("its timestamps go back", f"at frame {decoded - 1}")
            else:
                # what `shown` was on screen for; nothing before it is left to be shown
                while count < limit and Fraction(count, fps) + _TOLERANCE < at - start:
                    count += 1
                    yield count, decoded - 1, shown
                if count == limit:
                    return
            gap = lasts or (at - start - seconds if shown is not None else Fraction(0))
            shown, seconds = following, at - start
    if shown is None:
        raise ClipError("no frame in it")
    end = seconds + (gap or Fraction(1, fps))
    while count < limit and Fraction(count, fps) + _TOLERANCE < end:
        count += 1
        yield count, decoded, shown


def _decoded(path: pathlib.Path) -> Generator[tuple[_Shown, Fraction, Fraction]]:
    """(frame, its time, how long it says it lasts or 0) in seconds, in order of showing. Raises ClipError."""
    import av
    from av.error import FFmpegError

    count, size = 0, None
    try:
        with av.open(str(path.absolute())) as container:
            if not container.streams.video:
                raise ClipError("no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            context = stream.codec_context
            if context is None:
                raise ClipError("can't be read", "no decoder for its codec")
            if context.width * context.height > _MOST_PIXELS:
                raise ClipError("larger than 8192 x 8192 pixels", f"{context.width} x {context.height}")
            aspect = float(_fraction(stream.sample_aspect_ratio) or 1)
            rate = _fraction(stream.average_rate)
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise ClipError("damaged", f"at frame {count}")
                if size not in (None, (frame.height, frame.width)):
                    raise ClipError("its frames change their size", f"at frame {count}")
                size = (frame.height, frame.width)
                base = _fraction(frame.time_base)
                if frame.pts is not None and base:
                    at, lasts = frame.pts * base, (frame.duration or 0) * base
                elif rate:
                    at, lasts = count / rate, 1 / rate
                else:
                    raise ClipError("no timestamps")
                yield _Shown(frame, round(frame.rotation / 90) % 4, aspect), at, lasts
                count += 1
    except ClipError:
        raise
    except (FFmpegError, OSError, ValueError, EOFError) as error:
        detail = getattr(error, "strerror", None) or one_line(error)
        raise ClipError(
            "damaged" if count else "can't be read", f"at frame {count}: {detail}" if count else detail
        ) from None


def _fraction(ratio: Any) -> Fraction:
    """Of a ratio as PyAV has it, which is of several kinds; 0 for none."""
    return Fraction(ratio.numerator, ratio.denominator) if ratio else Fraction(0)
