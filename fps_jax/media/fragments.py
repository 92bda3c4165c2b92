"""Videos written while they are made: an mp4 in fragments, which plays at every moment up to the last one that was written."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fps_jax.choices import check_fps
from fps_jax.media.video import BT709, rgb_frame


class FragmentWriter:
    """Takes frames and writes them at once. Memory is constant in the length of the video. Made by `fragmented_mp4`.

    Attributes:
      frames: handed to the encoder so far.
    """

    def __init__(self, path: Path, files: ExitStack, fps: Fraction, crf: int):
        self._path, self._files, self._fps, self._crf = path, files, fps, crf
        self._output: Any = None
        self._stream: Any = None
        self.frames = 0

    def push(self, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Encodes frames; they are in the file when this returns, but for the last, whose length its successor tells.

        Raises: ValueError for frames of another size than the first.
        """
        if self._stream is None:
            self._stream = self._begin(*frames.shape[1:3])
        size = (self._stream.height, self._stream.width)
        if frames.shape[1:3] != size:
            raise ValueError(
                f"frames have {frames.shape[1]}x{frames.shape[2]} pixels; this video has {size[0]}x{size[1]}"
            )
        for pixels in frames:
            self._output.mux(self._stream.encode(rgb_frame(pixels)))
            self.frames += 1

    def _begin(self, height: int, width: int) -> Any:
        import av

        flags = {"movflags": "empty_moov+default_base_moof+frag_every_frame", "flush_packets": "1"}
        file = self._files.enter_context(self._path.open("wb", buffering=0))
        self._output = self._files.enter_context(av.open(file, "w", format="mp4", options=flags))
        # zerolatency: no frame waits in the encoder for later ones.
        options = {"crf": str(self._crf), "tune": "zerolatency"}
        stream = self._output.add_stream("libx264", rate=self._fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.gop_size = 3 * round(self._fps)
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        return stream

    def close(self) -> None:
        if self._stream is not None:
            self._output.mux(self._stream.encode())


@contextmanager
def fragmented_mp4(path: str | os.PathLike, fps: float = 16, crf: int = 18) -> Iterator[FragmentWriter]:
    """A file to write frames to, H.264 in fragments of one frame. What was written stays, however the block ends.

    Args:
      path: ends in .mp4, in a folder that exists. It is opened, and what stood there is gone, when the first frames are there.
      fps, crf: as of `save_video`.
    Raises: ValueError for a wrong suffix, fps or crf; NotImplementedError where PyAV has no H.264; OSError naming the path.
    """
    from av.codec import codecs_available

    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"path={str(path)!r} must end in .mp4")
    check_fps(fps)
    if not 0 <= crf <= 51:
        raise ValueError(f"crf={crf} must be in 0 (lossless) to 51; 18 looks lossless")
    if "libx264" not in codecs_available:
        raise NotImplementedError("this build of PyAV has no libx264; install PyAV's own wheel (pip install av)")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} is in a folder that doesn't exist; make it first")
    with ExitStack() as files:
        writer = FragmentWriter(path, files, Fraction(float(fps)).limit_denominator(1001), crf)
        try:
            yield writer
        finally:
            writer.close()
