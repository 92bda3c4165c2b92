"""Videos out: an mp4, a contact sheet, 8-bit frames."""

import io
import logging
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from fps_jax.choices import check_fps
from fps_jax.files import write_bytes
from fps_jax.media.mp4 import index_first

log = logging.getLogger("fps_jax")

_CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# The code of colour primaries, transfer and matrix alike (ITU-T H.273); the default, BT.601, shifts HD colours.
BT709 = 1
_THUMBNAIL = 320  # pixels, the longer side


def video_to_uint8(video: Any) -> UInt8[np.ndarray, "F H W 3"]:
    """Frames as bytes.

    Args:
      video: `[F, H, W, 3]` or `[1, F, H, W, 3]`; uint8 (returned as is), or float in [0, 1] (clipped to it, rounded).
    Raises: ValueError for another shape or dtype, or NaN or inf.
    """
    frames = np.asarray(video)
    if frames.ndim == 5 and frames.shape[0] == 1:
        frames = frames[0]
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"video has shape {frames.shape}; it must be [F, H, W, 3] (one sample of a batch: video[0])")
    if frames.dtype == np.uint8:
        return frames
    if not jnp.issubdtype(frames.dtype, jnp.floating):
        raise ValueError(f"video has dtype {frames.dtype}; pass uint8 or floats in [0, 1]")
    out = np.empty(frames.shape, np.uint8)
    for i, frame in enumerate(frames):  # one at a time: a float copy of 81 frames at 720p is 0.9 GB
        frame = frame.astype(np.float32)
        if not np.isfinite(frame).all():
            raise ValueError(f"video frame {i} holds NaN or inf, so there is no picture to write")
        out[i] = np.rint(np.clip(frame, 0, 1) * 255)
    return out


def to_pil(video: Float[np.ndarray, "B F H W 3"]) -> list[list[Any]]:
    """One list of PIL images a sample, of floats in [0, 1]."""
    from PIL import Image

    return [[Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in sample] for sample in video]


def save_video(video: Any, path: str | os.PathLike, fps: float = 16, crf: int = 18) -> None:
    """Write a video file: H.264, 4:2:0, BT.709; the file appears when whole, and one that was there stays until then.

    Args:
      video: as for `video_to_uint8`; height and width even.
      path: ends in .mp4, .mov or .mkv, in a folder that exists; or in .png, for a video of one frame.
      fps: frames per second, 1 to 1000, fractions too (23.976).
      crf: quality from 0 (lossless) to 51; 18 looks lossless.
    Raises: ValueError for a wrong video, suffix, fps or crf; OSError naming the path if it can't be written.
    """
    # Encoded in memory (a few MB) and then written by us: a full disk is a plain OSError, and nothing half-written stays.
    write_bytes(path, video_bytes(video, Path(path), fps, crf))


def video_bytes(video: Any, path: Path, fps: float = 16, crf: int = 18) -> bytes:
    """What `save_video` writes at a path; its arguments and errors."""
    if path.suffix.lower() not in (*_CONTAINERS, ".png"):
        raise ValueError(f"path={str(path)!r} must end in one of {', '.join((*_CONTAINERS, '.png'))}")
    check_fps(fps)
    if not 0 <= crf <= 51:
        raise ValueError(f"crf={crf} must be in 0 (lossless) to 51; 18 looks lossless")
    frames = video_to_uint8(video)
    if path.suffix.lower() == ".png":
        return _png(frames, path)
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"video has {frames.shape[1]}x{frames.shape[2]} pixels; H.264 needs even sizes: crop a pixel")
    container = _CONTAINERS[path.suffix.lower()]
    content = _encode(frames, container, fps, crf)
    return content if container == "matroska" else index_first(content)


def _png(frames: UInt8[np.ndarray, "F H W 3"], path: Path) -> bytes:
    from PIL import Image

    if len(frames) != 1:
        raise ValueError(f"path={str(path)!r} is a picture, and the video has {len(frames)} frames; use .mp4")
    Image.fromarray(frames[0]).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def contact_sheet(video: Any, path: str | os.PathLike, columns: int = 4, num_frames: int = 12) -> None:
    """Write a png of frames spread evenly over the video, first and last included, in rows from left to right.

    Args:
      video: as for `video_to_uint8`.
      path: ends in .png, in a folder that exists.
      columns: frames in a row.
      num_frames: frames in all, or as many as there are.
    Raises: ValueError for a wrong argument; OSError naming the path if it can't be written.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path={str(path)!r} must end in .png")
    if columns < 1 or num_frames < 1:
        raise ValueError(f"columns={columns} and num_frames={num_frames} must be at least 1")
    frames = video_to_uint8(video)
    picks = np.unique(np.linspace(0, len(frames) - 1, min(num_frames, len(frames))).round().astype(int))
    columns = min(columns, len(picks))
    scale = min(1.0, _THUMBNAIL / max(frames.shape[1:3]))
    height, width = (max(1, round(n * scale)) for n in frames.shape[1:3])
    sheet = Image.new("RGB", (columns * width, -(-len(picks) // columns) * height))
    for place, i in enumerate(picks):
        thumbnail = Image.fromarray(frames[i]).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, (place % columns * width, place // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _encode(frames: UInt8[np.ndarray, "F H W 3"], container: str, fps: float, crf: int) -> bytes:
    from fractions import Fraction

    import av
    from av.codec import codecs_available

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        rate = Fraction(float(fps)).limit_denominator(1001)
        if "libx264" in codecs_available:
            stream = output.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        else:
            log.warning("this build of PyAV has no libx264: writing MPEG-4 part 2 instead of H.264")
            stream = output.add_stream("mpeg4", rate=rate, options={"qscale": str(1 + crf // 4)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        for pixels in frames:
            output.mux(stream.encode(rgb_frame(pixels)))
        output.mux(stream.encode())
    return buffer.getvalue()


def rgb_frame(pixels: UInt8[np.ndarray, "H W 3"]) -> Any:
    """A frame for an encoder: 4:2:0, BT.709."""
    import av
    from av.video.reformatter import Colorspace

    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
