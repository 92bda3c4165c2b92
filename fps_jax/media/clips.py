"""Clips decoded: which frame is on screen at each instant of the new rate, turned upright, covering the wanted size.

What counts is what the decoder gives: a container's number of frames and duration are never asked, and its rate only for raw
streams without timestamps.
"""

import contextlib
import os
import pathlib
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from fps_jax.errors import one_line
from fps_jax.files import check_regular
from fps_jax.media.images import cover_box, log_crop

# Containers such as Matroska round timestamps to milliseconds: a frame due at 62.5 ms is stamped 63 and counts as on screen.
_TOLERANCE = Fraction(2, 1000)
MOST_PIXELS = 1 << 26  # 8192 x 8192; larger frames are refused before they are decoded
_MOST_RATE = 1024  # decoded frames a second, on average
_LONGEST = 24 * 3600  # seconds of a clip whose end is asked for
# FFmpeg's demuxers whose files hold their own frames: a playlist, whatever its name, would have other files read, or addresses.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,gif,apng,png_pipe,flv,asf,ogg,m4v,h264,hevc,ivf,obu,mxf,"
    "yuv4mpegpipe,wav,mp3,flac,aac"  # the last have no video, and are told so
)
_STILL = 3600  # seconds that one frame may be shown; a timestamp that jumps further is damage
MOST_FRAMES = 1025  # that `read_clip` gives: a minute, 1.2 GB at 480p


class ClipError(ValueError):
    """A clip that can't be used. The message is the reason, equal for equal causes; `detail` is this clip's own."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class Shown(NamedTuple):
    """A decoded frame, `turns` quarter turns counter-clockwise from upright; `pixel_aspect` as it is before them."""

    frame: Any
    turns: int
    pixel_aspect: float


def read_clip(
    path: str | os.PathLike, *, fps: float, height: int, width: int, last: int | None = None, name: str = "video"
) -> UInt8[np.ndarray, "F H W 3"]:
    """The frames of a clip at another rate, each resized to cover the size (Lanczos) and cropped around its centre, which is logged
    where it loses more than a tenth.

    Args:
      fps: frames a second of the result; frame j is what is on screen j / fps seconds after the clip's first.
      last: only so many, the last, of a clip of a day at most; None for all. No more than `MOST_FRAMES`.
      name: the argument's name, for error messages.
    Raises: FileNotFoundError, or ValueError that names the file: no video that can be read, fewer frames than `last`, too many.
    """
    path = pathlib.Path(path)
    if last is not None and last > MOST_FRAMES:
        raise ValueError(f"{name}={str(path)!r}: {last} frames are more than {MOST_FRAMES}; ask for fewer of the last")
    rate = Fraction(fps).limit_denominator(1001)
    with told(path, name):
        count, size = 0, (height, width)
        # Decoded twice: resizing every frame of a long clip takes minutes, and keeping its own ones gigabytes.
        for count, _, shown in resampled(path, rate, MOST_FRAMES + 1 if last is None else int(_LONGEST * rate)):  # noqa: B007
            size = display_size(shown)
        if last is None and count > MOST_FRAMES:
            raise ValueError(
                f"{name}={str(path)!r} has more than {MOST_FRAMES} frames at {fps:g} a second; say how many of the last to take"
            )
        if last is not None and count < last:
            raise ValueError(
                f"{name}={str(path)!r} has {count} frames at {fps:g} a second, fewer than the {last} asked for"
            )
        log_crop(*size, height, width, name)
        return np.stack(list(covering(path, rate, count, height, width, skip=0 if last is None else count - last)))


@contextlib.contextmanager
def told(path: pathlib.Path, name: str) -> Iterator[None]:
    """Holds that a file is there to be decoded in the block, and says which one it is where that fails.

    name: the argument's name, for error messages.
    Raises: FileNotFoundError; ValueError in place of the block's ClipError.
    """
    try:
        check_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}={str(path)!r} doesn't exist; check the path") from None
    except ValueError as error:
        raise ValueError(f"{name}={str(path)!r} can't be read as a video ({error})") from None
    try:
        yield
    except ClipError as error:
        detail = f": {error.detail}" if error.detail else ""
        raise ValueError(
            f"{name}={str(path)!r} can't be read as a video ({error}{detail}); use an mp4 or webm"
        ) from None


def covering(
    path: pathlib.Path, fps: int | Fraction, limit: int, height: int, width: int, *, skip: int = 0
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The frames of a clip at the new rate, from `skip` to `limit`, each resized to cover the size, cropped. Raises ClipError."""
    last: Shown | None = None
    for count, _, shown in resampled(path, fps, limit):
        if count <= skip:
            continue
        if last is None or shown.frame is not last.frame:
            last, pixels = shown, _cover(shown, height, width)
        yield pixels


def display_size(shown: Shown) -> tuple[float, float]:
    """Height and width upright, the width of square pixels."""
    height, width = shown.frame.height, shown.frame.width * shown.pixel_aspect
    return (width, height) if shown.turns % 2 else (height, width)


def _cover(shown: Shown, height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    from PIL import Image

    pixels = np.rot90(rgb(shown.frame), shown.turns)
    aspect = 1 / shown.pixel_aspect if shown.turns % 2 else shown.pixel_aspect
    box = cover_box(pixels.shape[0], pixels.shape[1], height, width, pixel_aspect=aspect)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def rgb(frame: Any) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a decoded frame, as they are stored: neither turned nor stretched."""
    from av.video.reformatter import Colorspace

    unspecified = frame.colorspace not in (1, 4, 5, 6, 7, 9, 10)  # ITU-T H.273's codes of matrices that are known
    if unspecified and frame.format.name.startswith("yuv"):
        # As players do: high definition is BT.709, the rest BT.601.
        matrix = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
        return frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray()
    return frame.to_ndarray(format="rgb24")


def resampled(path: pathlib.Path, fps: int | Fraction, limit: int) -> Iterator[tuple[int, int, Shown]]:
    """(frames so far, frames decoded, what is on screen) at 0, 1/fps, 2/fps ... seconds after the first frame, `limit` at most.

    Frame j of the new rate is the last one whose timestamp isn't after j / fps, so clips of a variable rate keep their speed.
    """
    shown: Shown | None = None
    start = seconds = gap = Fraction(0)
    count = decoded = 0
    with contextlib.closing(decoded_frames(path)) as frames:
        for following, at, lasts in frames:
            decoded += 1
            if decoded > 16 + _MOST_RATE * (limit + 1) // fps:
                raise ClipError(f"over {_MOST_RATE} frames a second")
            if shown is None:
                start = at
            elif at - start < seconds:
                raise ClipError("its timestamps go back", f"at frame {decoded - 1}")
            elif at - start - seconds > _STILL:
                raise ClipError("its timestamps jump by more than an hour", f"at frame {decoded - 1}")
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


def decoded_frames(path: pathlib.Path) -> Generator[tuple[Shown, Fraction, Fraction]]:
    """(frame, its time, how long it says it lasts or 0) in seconds, in order of showing. Raises ClipError."""
    import av
    from av.error import ArgumentError, FFmpegError

    count, size = 0, None
    try:
        with av.open(str(path.absolute()), options={"format_whitelist": _FORMATS}) as container:
            if not container.streams.video:
                raise ClipError("no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            context = stream.codec_context
            if context is None:
                raise ClipError("can't be read", "no decoder for its codec")
            if context.width * context.height > MOST_PIXELS:
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
                yield Shown(frame, round(frame.rotation / 90) % 4, aspect), at, lasts
                count += 1
    except ClipError:
        raise
    except ArgumentError:  # a playlist, a device's description, ...
        raise ClipError("can't be read", "a playlist, or of a format that isn't read") from None
    except (FFmpegError, OSError, ValueError, EOFError) as error:
        detail = getattr(error, "strerror", None) or one_line(error)
        raise ClipError(
            "damaged" if count else "can't be read", f"at frame {count}: {detail}" if count else detail
        ) from None


def _fraction(ratio: Any) -> Fraction:
    """Of a ratio as PyAV has it, which is of several kinds; 0 for none."""
    return Fraction(ratio.numerator, ratio.denominator) if ratio else Fraction(0)
