"""Videos written while they are made: an mp4 in fragments, which plays at every moment up to the last one that was written."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from fps_jax.choices import check_fps
from fps_jax.media.video import BT709, rgb_frame


class Codec(NamedTuple):
    """How frames are packed. encoder: its name in PyAV. options: its own; no frame waits in it for later ones."""

    encoder: str
    options: dict[str, str]


# By the first four letters of what a browser calls them (RFC 6381).
CODECS = {
    "avc1": Codec("libx264", {"tune": "zerolatency", "forced-idr": "1"}),
    "vp09": Codec("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "b": "0"}),
}


class FragmentWriter:
    """Takes frames and writes them at once. Memory is constant in the length of the video. Made by `fragmented_mp4`.

    Attributes:
      frames: handed to the encoder so far.
    """

    def __init__(self, sink: Callable[[], Any], files: ExitStack, fps: Fraction, crf: int, codec: Codec):
        self._sink, self._files, self._fps, self._crf, self._codec = sink, files, fps, crf, codec
        self._output: Any = None
        self._stream: Any = None
        self.frames = 0

    def push(self, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Encodes frames; they are written when this returns, but for the last, whose length its successor tells.

        The first of them is a keyframe: a player can begin there, and what came before can be dropped.
        Raises: ValueError for frames of another size than the first.
        """
        from av.video.frame import PictureType

        if self._stream is None:
            self._stream = self._begin(*frames.shape[1:3])
        size = (self._stream.height, self._stream.width)
        if frames.shape[1:3] != size:
            raise ValueError(
                f"frames have {frames.shape[1]}x{frames.shape[2]} pixels; this video has {size[0]}x{size[1]}"
            )
        for i, pixels in enumerate(frames):
            frame = rgb_frame(pixels)
            frame.pict_type = PictureType.NONE if i else PictureType.I
            self._output.mux(self._stream.encode(frame))
            self.frames += 1

    def _begin(self, height: int, width: int) -> Any:
        import av

        flags = {"movflags": "empty_moov+default_base_moof+frag_every_frame", "flush_packets": "1"}
        sink = self._files.enter_context(self._sink())
        self._output = self._files.enter_context(av.open(sink, "w", format="mp4", options=flags))
        options = self._codec.options | {"crf": str(self._crf)}
        stream = self._output.add_stream(self._codec.encoder, rate=self._fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.gop_size = 3 * round(self._fps)
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        return stream

    def close(self) -> None:
        if self._stream is not None:
            self._output.mux(self._stream.encode())


class Fragments:
    """The same in memory, for whoever passes the bytes on: all that was taken, joined, is a file of `fragmented_mp4`."""

    def __init__(self, fps: float, codec: str = "avc1", crf: int = 18):
        """Args and errors: as of `fragmented_mp4`. codec: a key of `CODECS`."""
        _check(fps, crf, CODECS[codec])
        self._written = _Memory()
        self._files = ExitStack()
        self._writer = FragmentWriter(lambda: self._written, self._files, _rate(fps), crf, CODECS[codec])

    @property
    def frames(self) -> int:
        """Taken in so far."""
        return self._writer.frames

    def push(self, frames: UInt8[np.ndarray, "F H W 3"]) -> bytes:
        """What is new in the file with these frames: all of them but the last, and the last of those before."""
        self._writer.push(frames)
        return self._written.take()

    def close(self) -> bytes:
        """The last frame, and the file's end."""
        with self._files:
            self._writer.close()
        return self._written.take()


class _Memory:
    """A file that can only be written. PyAV then seeks nowhere."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def __enter__(self) -> "_Memory":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def split_head(content: bytes) -> tuple[bytes, bytes]:
    """(the boxes before the first fragment, the rest) of the beginning of a fragmented mp4."""
    at = 0
    while at < len(content) and content[at + 4 : at + 8] != b"moof":
        at += int.from_bytes(content[at : at + 4], "big")
    return content[:at], content[at:]


def mime_type(head: bytes) -> str:
    """What a browser calls a file that begins so (RFC 6381): 'video/mp4; codecs="avc1.64000a"'."""
    at = head.find(b"avcC")
    if at >= 0:  # version, profile, constraints, level
        return f'video/mp4; codecs="avc1.{head[at + 5 : at + 8].hex()}"'
    at = head.find(b"vpcC")
    if at < 0:
        raise ValueError("no H.264 and no VP9 in the head of this mp4")
    profile, level, depth = head[at + 8], head[at + 9], head[at + 10] >> 4  # behind version and flags
    return f'video/mp4; codecs="vp09.{profile:02d}.{level:02d}.{depth:02d}"'


@contextmanager
def fragmented_mp4(path: str | os.PathLike, fps: float = 16, crf: int = 18) -> Iterator[FragmentWriter]:
    """A file to write frames to, H.264 in fragments of one frame. What was written stays, however the block ends.

    Args:
      path: ends in .mp4, in a folder that exists. It is opened, and what stood there is gone, when the first frames are there.
      fps, crf: as of `save_video`.
    Raises: ValueError for a wrong suffix, fps or crf; NotImplementedError where PyAV has no H.264; OSError naming the path.
    """
    path, codec = Path(path), CODECS["avc1"]
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"path={str(path)!r} must end in .mp4")
    _check(fps, crf, codec)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} is in a folder that doesn't exist; make it first")
    with ExitStack() as files:
        writer = FragmentWriter(lambda: path.open("wb", buffering=0), files, _rate(fps), crf, codec)
        try:
            try:
                yield writer
            finally:
                writer.close()
        except OSError as error:
            if error.filename is not None:
                raise
            # Of a write that PyAV asked for: it knows no names. What is there plays to its last whole frame.
            raise OSError(error.errno, error.strerror, str(path)) from error


def _check(fps: float, crf: int, codec: Codec) -> None:
    from av.codec import codecs_available

    check_fps(fps)
    if not 0 <= crf <= 51:
        raise ValueError(f"crf={crf} must be in 0 (lossless) to 51; 18 looks lossless")
    if codec.encoder not in codecs_available:
        raise NotImplementedError(
            f"this build of PyAV has no {codec.encoder}; install PyAV's own wheel (pip install av)"
        )


def _rate(fps: float) -> Fraction:
    return Fraction(float(fps)).limit_denominator(1001)
