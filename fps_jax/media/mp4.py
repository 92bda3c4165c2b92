"""The boxes of an mp4 or mov file, put in the order that a player on the network wants: the index before the pictures."""

import struct
from collections.abc import Iterator

_INSIDE = (b"moov", b"trak", b"mdia", b"minf", b"stbl")  # boxes on the way to the tables of offsets


def index_first(content: bytes) -> bytes:
    """The same file with `moov` before `mdat`, and the offsets in it moved by its length; as it is, where it is so already.

    Source: ISO/IEC 14496-12, 4.2 and 8.7.5. FFmpeg's `faststart` does the same, but only to a file that has a name.
    """
    boxes = list(_boxes(content, 0, len(content)))
    names = [name for name, *_ in boxes]
    if b"moov" not in names or b"mdat" not in names or names.index(b"moov") < names.index(b"mdat"):
        return content
    start, stop = boxes[names.index(b"moov")][1:]
    moov = bytearray(content[start:stop])
    _move(moov, 0, len(moov), len(moov))
    first = boxes[names.index(b"mdat")][1]
    return content[:first] + bytes(moov) + content[first:start] + content[stop:]


def _boxes(content: bytes | bytearray, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, its first byte, the byte behind it) of the boxes in a part of a file."""
    while start + 8 <= stop:
        length, name = struct.unpack_from(">I4s", content, start)
        if length == 1:
            length = struct.unpack_from(">Q", content, start + 8)[0]
        end = start + length if length else stop
        yield name, start, end
        start = end


def _move(moov: bytearray, start: int, stop: int, by: int) -> None:
    """Adds to every offset of a chunk in these boxes."""
    for name, first, end in _boxes(moov, start, stop):
        if name in _INSIDE:
            _move(moov, first + 8, end, by)
        elif name in (b"stco", b"co64"):
            kind = ">I" if name == b"stco" else ">Q"
            count = struct.unpack_from(">I", moov, first + 12)[0]
            for at in range(first + 16, first + 16 + count * struct.calcsize(kind), struct.calcsize(kind)):
                struct.pack_into(kind, moov, at, struct.unpack_from(kind, moov, at)[0] + by)
