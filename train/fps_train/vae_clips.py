"""Clips of a folder as arrays in memory, for training a small VAE."""

import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt8

VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif"}
IMAGES = {".png", ".jpg", ".jpeg", ".webp"}


def read_clips(
    folder: str | os.PathLike, height: int, width: int, frames: int, *, tell: Callable[[str], None] = lambda line: None
) -> UInt8[np.ndarray, "N F H W 3"]:
    """Every stretch of `frames` frames of the videos in a folder, one after the other without overlap; files in order of name.

    Frames are decoded as they come (no change of rate), resized to cover height x width and cropped to their middle. Images are
    videos of one frame. What is left of a video, or one that is too short, is said through `tell`.
    Raises: FileNotFoundError or ValueError, naming the folder or the file: nothing there, unreadable, nothing long enough.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"videos={str(folder)!r} is no folder; give one that holds clips ({_kinds()})")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEOS | IMAGES)
    if not files:
        raise ValueError(f"videos={str(folder)!r} holds no clip; supported are {_kinds()}")
    clips, too_short = [], []
    for file in files:
        pixels = np.stack([_cover(frame, height, width) for frame in _decoded(file)])
        whole = len(pixels) // frames
        if not whole:
            too_short.append(file.name)
        clips.append(pixels[: whole * frames].reshape(whole, frames, height, width, 3))
    if too_short:
        tell(
            f"{len(too_short)} of {len(files)} files have fewer than {frames} frames and are left out: {too_short[0]} ..."
        )
    found = np.concatenate(clips)
    if not len(found):
        raise ValueError(
            f"videos={str(folder)!r} holds no clip of {frames} frames; use fewer --frames, or longer clips"
        )
    return found


def _kinds() -> str:
    return " ".join(sorted(VIDEOS | IMAGES))


def _decoded(file: pathlib.Path) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    import av
    from av.error import FFmpegError

    count = 0
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise ValueError(f"{file} has no video stream; take it out of the folder")
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
                count += 1
    except FFmpegError as error:
        raise ValueError(
            f"{file} can't be decoded ({error.strerror}); repair it or take it out of the folder"
        ) from error
    if not count:
        raise ValueError(f"{file} holds no frame; take it out of the folder")


def _cover(frame: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """Resized to cover, cropped to the middle."""
    from PIL import Image

    h, w = frame.shape[:2]
    scale = max(height / h, width / w)
    rows, columns = max(height, round(h * scale)), max(width, round(w * scale))
    if (rows, columns) != (h, w):
        frame = np.asarray(Image.fromarray(frame).resize((columns, rows), Image.Resampling.LANCZOS))
    top, left = (rows - height) // 2, (columns - width) // 2
    return frame[top : top + height, left : left + width]
