"""Videos written while they are made: an mp4 in fragments, which plays at every moment up to the last one that was written."""

import os
from collections.abc import Iterator
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


class Fragments:
    """Takes frames and gives the bytes of an mp4, whole frames at a time: all that was taken, joined, is the file.

    Memory is constant in the length of the video.

    Attributes:
      frames: handed to the encoder so far.
    """

    def __init__(self, fps: float, codec: str = "avc1", crf: int = 18):
        """Args: fps, crf: as of `save_video`. codec: a key of `CODECS`. Raises: as `fragmented_mp4`, of these."""
        self._codec = CODECS[codec]
        _check(fps, crf, self._codec)
        self._fps, self._crf = Fraction(float(fps)).limit_denominator(1001), crf
        self._written, self._files = _Memory(), ExitStack()
        self._output: Any = None
        self._stream: Any = None
        self.frames = 0

    def push(self, frames: UInt8[np.ndarray, "F H W 3"]) -> bytes:
        """What is new in the file with these frames: all of them but the last, whose length its successor tells, and the last of
        those before.

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
        return self._written.take()

    def _begin(self, height: int, width: int) -> Any:
        import av

        flags = {"movflags": "empty_moov+default_base_moof+frag_every_frame", "flush_packets": "1"}
        self._output = self._files.enter_context(av.open(self._written, "w", format="mp4", options=flags))
        options = self._codec.options | {"crf": str(self._crf)}
        stream = self._output.add_stream(self._codec.encoder, rate=self._fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.gop_size = 3 * round(self._fps)
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        return stream

    def close(self) -> bytes:
        """The last frame, and the file's end."""
        with self._files:
            if self._stream is not None:
                self._output.mux(self._stream.encode())
        return self._written.take()


class _Memory:
    """A file that can only be written. PyAV then seeks nowhere."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


class FragmentWriter:
    """`Fragments` into a file, which has whole frames at every moment. Made by `fragmented_mp4`."""

    def __init__(self, path: Path, packed: Fragments):
        self._path, self._packed = path, packed
        self._file: Any = None
        self._torn = False  # a write was broken off: what came behind it wouldn't be found

    @property
    def frames(self) -> int:
        """Handed to the encoder so far."""
        return self._packed.frames

    def push(self, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """As `Fragments.push`: written when this returns, but for the last of them."""
        self._write(self._packed.push(frames))

    def close(self) -> None:
        try:
            self._write(self._packed.close())
        finally:
            if self._file is not None:
                self._file.close()

    def _write(self, content: bytes) -> None:
        if not content or self._torn:
            return
        if self._file is None:
            self._file = self._path.open("wb", buffering=0)
        self._torn, rest = True, memoryview(content)
        while rest:  # at once, but where the disk is about to be full
            rest = rest[self._file.write(rest) :]
        self._torn = False


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
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"path={str(path)!r} must end in .mp4")
    packed = Fragments(fps, crf=crf)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} is in a folder that doesn't exist; make it first")
    writer = FragmentWriter(path, packed)
    try:
        try:
            yield writer
        finally:
            writer.close()
    except OSError as error:
        if error.filename is not None:
            raise
        # A write knows no names. What is there plays to its last whole frame.
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
