"""Small clips drawn for tests: every frame is told by its brightness, so a decoded frame says which one it was."""

import pathlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

STEP = 6  # of brightness from a frame to the next; H.264 at its best quality is within 1


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 `[F, H, W, 3]`, frame i grey of brightness 10 + STEP * i."""
    levels = 10 + STEP * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    """Which of `numbered` these frames are."""
    return [round((float(frame.mean()) - 10) / STEP) for frame in frames]


def write(
    path: pathlib.Path,
    frames: np.ndarray,
    *,
    fps: Fraction | int = 16,
    times: Sequence[Fraction] | None = None,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
) -> pathlib.Path:
    """Write a video. times: of each frame in seconds, in place of a fixed rate."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=fps, options={"crf": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv444p"
        if rotation:
            stream.set_display_rotation(rotation)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def folder_of_clips(folder: pathlib.Path, lengths: dict[str, int], **size: int) -> pathlib.Path:
    """A folder of numbered clips with captions. Clip `name` has lengths[name] frames at 16 a second; no two are alike."""
    folder.mkdir(exist_ok=True)
    for i, (name, length) in enumerate(lengths.items()):
        frames = numbered(length, **size)
        frames[:, 0, 0] = i  # so that two of equal length are two clips
        write(folder / f"{name}.mp4", frames)
        (folder / f"{name}.txt").write_text(f"A clip called {name}.\n")
    return folder
