"""Clips decoded into memory as they are, without a model: for training a small VAE."""

import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from fps_jax.progress import amount_bar
from fps_train.precompute.buckets import Size, reasons
from fps_train.precompute.clips import Clip, ClipError, Dropped, find_clips
from fps_train.precompute.frames import read_all_frames

_FPS = 16  # Wan's, as in fps-precompute


class Stretches(NamedTuple):
    """Every stretch of `num_frames` consecutive frames of some clips; with one frame, every frame.

    Attributes:
      pixels: all frames of all clips, one clip after the other.
      starts: of each stretch, its first frame in `pixels`. No stretch reaches into another clip.
      apart: of stretches that don't overlap: all that fit, from each clip's start.
    """

    pixels: UInt8[np.ndarray, "T H W 3"]
    starts: Int[np.ndarray, " N"]
    apart: Int[np.ndarray, " n"]
    num_frames: int

    def read(self, starts: Int[np.ndarray, " B"]) -> UInt8[np.ndarray, "B F H W 3"]:
        return self.pixels[starts[:, None] + np.arange(self.num_frames)]


def stretches(clips: list[UInt8[np.ndarray, "f H W 3"]], num_frames: int) -> Stretches:
    """The stretches of clips, each of `num_frames` frames or more. The list is emptied, so that no frame is held twice."""
    pixels = np.empty((sum(map(len, clips)), *clips[0].shape[1:]), np.uint8)
    starts, apart, first = [], [], 0
    while clips:
        clip = clips.pop(0)
        pixels[first : first + len(clip)] = clip
        starts.append(np.arange(first, first + len(clip) - num_frames + 1))
        apart.append(starts[-1][::num_frames])
        first += len(clip)
    return Stretches(pixels, np.concatenate(starts), np.concatenate(apart), num_frames)


def load_stretches(
    videos: pathlib.Path | None,
    captions: pathlib.Path | None,
    size: Size,
    *,
    max_bytes: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Stretches:
    """Decode whole clips once, as fps-precompute does: 16 frames a second by their timestamps, covering the size, cropped.

    Args:
      videos, captions: as for `find_clips`; clips need no caption.
      size: of a stretch. Images are clips of one frame.
      max_bytes: the most that all frames may take.
      tell: gets a line for each reason to leave clips out, and what was read.
    Raises: ValueError or OSError in one line: nothing there, nothing long enough, more than `max_bytes`.
    """
    found, dropped = find_clips(videos, captions, captioned=False)
    limit = max_bytes // (size.height * size.width * 3)
    if limit < size.num_frames:
        raise ValueError(
            f"one clip of {size.name} takes more than the {_gib(max_bytes)} GiB that are allowed in memory"
        )

    def look(clip: Clip) -> np.ndarray | ClipError:
        try:
            # A frame beyond the limit, so that a clip which alone is too large is known from one that just fits.
            pixels = read_all_frames(
                clip.path, is_image=clip.is_image, fps=_FPS, limit=limit + 1, height=size.height, width=size.width
            )
            if len(pixels) < size.num_frames:
                raise ClipError(f"shorter than {size.num_frames} frames at {_FPS} fps", f"{len(pixels)}")
            return pixels
        except ClipError as error:
            return error
        except OSError as error:
            return ClipError("can't be read", error.strerror or str(error))

    kept, frames = [], 0
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        with amount_bar("read clips", len(found), unit="clip") as advance:
            for done, (clip, what) in enumerate(zip(found, pool.map(look, found), strict=True), 1):
                advance(1)
                if isinstance(what, ClipError):
                    dropped.append(Dropped(source=clip.source, reason=str(what), detail=what.detail))
                    continue
                kept.append(what)
                frames += len(what)
                if frames > limit:
                    raise ValueError(
                        f"{done} of {len(found)} clips at {size.height} x {size.width} take more than the {_gib(max_bytes)} GiB "
                        "that are allowed in memory; use fewer clips, a smaller --size, or a larger --max-gib"
                    )
    finally:
        pool.shutdown(cancel_futures=True)
    if dropped:
        tell("\n".join(["dropped:", *reasons(dropped)]))
    if not kept:
        first = dropped[0]
        detail = f" ({first.detail})" if first.detail else ""
        raise ValueError(f"no clip is left of {len(dropped)}: {first.source}: {first.reason}{detail}")
    count = len(kept)
    read = stretches(kept, size.num_frames)
    tell(f"{count} clips, {len(read.starts)} stretches of {size.name}: {_gib(read.pixels.nbytes)} GiB in memory")
    return read


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g}"
