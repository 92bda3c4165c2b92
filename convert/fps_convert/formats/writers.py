"""Streaming writers of safetensors (sharded where large) and of `.pth` files, one tensor in memory at a time."""

import itertools
import json
import math
import pathlib
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fps_convert.formats.arrays import in_threads, write_at
from fps_convert.formats.readers import VIEWS
from fps_jax.progress import Moved

SHARD_BYTES = 10_000_000_000
_ALIGN = 64
# zip's 32-bit fields end here, and the real value goes into an extra field. A name so that tests can lower it.
ZIP64_FROM = 0xFFFFFFFF
_STORAGE = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}


@dataclass(frozen=True)
class Output:
    """A tensor to write: `make()` gives its values, in `dtype` (of `VIEWS`; in a .pth F32, F16 or BF16)
    and, but for axes of 1, `shape`.

    It runs on the thread that writes them, so that they may lie in that thread's buffer; a list is the values in pieces.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray | list[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * VIEWS[self.dtype].itemsize

    def bytes(self) -> list[np.ndarray]:
        """The values as uint8, in pieces."""
        made = self.make()
        pieces = made if isinstance(made, list) else [made]
        if sum(p.size for p in pieces) != math.prod(self.shape) or any(p.dtype != VIEWS[self.dtype] for p in pieces):
            made_of = [f"{p.dtype}{list(p.shape)}" for p in pieces]
            raise ValueError(f"{self.key}: made {', '.join(made_of)}, not {self.dtype}{list(self.shape)}")
        return [np.ascontiguousarray(piece).reshape(-1).view(np.uint8) for piece in pieces]


def _write_pieces(descriptor: int, position: int, pieces: Sequence[np.ndarray | bytes]) -> None:
    for piece in pieces:
        write_at(descriptor, position, piece)
        position += len(piece)


def write_safetensors(
    directory: pathlib.Path,
    stem: str,
    outputs: list[Output],
    metadata: dict[str, str],
    progress: Moved,
    shard_bytes: int = SHARD_BYTES,
) -> list[pathlib.Path]:
    """Writes `stem.safetensors`, or numbered shards with their index where one file would exceed `shard_bytes`.

    Returns the weight files. Raises OSError where the disk is full.
    """
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors_file(directory / name, shard, metadata, progress)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(output.nbytes for output in outputs)},
            "weight_map": {output.key: name for name, shard in zip(names, shards, strict=True) for output in shard},
        }
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [directory / name for name in names]


def write_safetensors_file(
    path: pathlib.Path, outputs: list[Output], metadata: dict[str, str], progress: Moved
) -> None:
    """Writes one safetensors file, in place. Raises OSError where the disk is full."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    # The order of the format's own writer; wide types first keeps every tensor aligned to its element.
    outputs = sorted(outputs, key=lambda output: (-VIEWS[output.dtype].itemsize, output.key))
    for output, offset in zip(outputs, _offsets(outputs), strict=True):
        end = offset + output.nbytes
        header[output.key] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [offset, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = [(output, start + offset) for output, offset in zip(outputs, _offsets(outputs), strict=True)]
    with open(path, "wb", buffering=0) as file:
        write_at(file.fileno(), 0, len(text).to_bytes(8, "little") + text)

        def write(place: tuple[Output, int]) -> int:
            _write_pieces(file.fileno(), place[1], place[0].bytes())
            return place[0].nbytes

        for nbytes in in_threads(write, places):
            progress(nbytes)


def _offsets(outputs: list[Output]) -> list[int]:
    return [0, *itertools.accumulate(output.nbytes for output in outputs)][:-1]


def _pickled(outputs: list[Output], root: str | None = None) -> bytes:
    """The pickle of `{key: tensor}`, or `{root: {key: tensor}}`, in the opcodes that `torch.load(weights_only=True)` admits."""

    def text(value: str) -> bytes:
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def integer(value: int) -> bytes:
        if value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        data = value.to_bytes(8, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    ordered_dict = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", ordered_dict, b"("]
    if root is not None:
        parts += [text(root), ordered_dict, b"("]
    for number, output in enumerate(outputs):
        strides = tuple(math.prod(output.shape[i + 1 :]) for i in range(len(output.shape)))
        storage = f"ctorch\n{_STORAGE[output.dtype]}\n".encode()
        numel = integer(math.prod(output.shape))
        parts += [text(output.key), b"ctorch._utils\n_rebuild_tensor_v2\n("]
        parts += [b"(", text("storage"), storage, text(str(number)), text("cpu"), numel, b"tQ"]
        parts += [integer(0), integers(output.shape), integers(strides), b"\x89", ordered_dict, b"tR"]
    return b"".join([*parts, b"u" if root is None else b"uu", b"."])


@dataclass(frozen=True)
class _Record:
    """A file of the archive: its local header begins at `position`, its data follows, at a multiple of 64."""

    name: bytes
    size: int
    position: int

    def header(self, crc: int) -> bytes:
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size) if self.size >= ZIP64_FROM else b""
        short = 0xFFFFFFFF if extra else self.size
        # Padding as PyTorch does it: an extra field with the id "FB".
        pad = -(self.position + 30 + len(self.name) + len(extra) + 4) % _ALIGN
        extra += struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        fields = (0x04034B50, 45, 0x800, 0, 0, 0x21, crc, short, short, len(self.name), len(extra))
        return struct.pack("<IHHHHHIIIHH", *fields) + self.name + extra

    @property
    def end(self) -> int:
        return self.position + len(self.header(0)) + self.size


def write_pth(
    path: pathlib.Path, outputs: list[Output], progress: Moved, *, root: str | None = None, name: str | None = None
) -> None:
    """Writes a zip-format `.pth` that `torch.load(weights_only=True)` reads (and maps: records are 64-byte aligned).

    Args:
      root: the name under which the file holds its state dict; None for a file that is one.
      name: of the folder within the archive, if not as `path` is called.
    Raises: OSError where the disk is full.
    """
    folder = (name or path.stem).encode() + b"/"
    contents: list[tuple[bytes, Output | bytes]] = [(b"data.pkl", _pickled(outputs, root)), (b"byteorder", b"little")]
    contents += [(b"data/" + str(number).encode(), output) for number, output in enumerate(outputs)]
    contents += [(b"version", b"3\n")]
    places: list[tuple[_Record, Output | bytes]] = []
    position = 0
    for record, content in contents:
        size = content.nbytes if isinstance(content, Output) else len(content)
        places.append((_Record(folder + record, size, position), content))
        position = places[-1][0].end
    with open(path, "wb", buffering=0) as file:

        def write(place: tuple[_Record, Output | bytes]) -> tuple[int, int]:
            record, content = place
            pieces = content.bytes() if isinstance(content, Output) else [content]
            crc = 0
            for piece in pieces:
                crc = zlib.crc32(piece, crc)
            _write_pieces(file.fileno(), record.position, [record.header(crc), *pieces])
            return crc, record.size

        crcs = []
        for crc, size in in_threads(write, places):
            crcs.append(crc)
            progress(size)
        records = [record for record, _ in places]
        write_at(file.fileno(), position, _central_directory(records, crcs, position))


def _central_directory(records: list[_Record], crcs: list[int], start: int) -> bytes:
    entries = []
    for record, crc in zip(records, crcs, strict=True):
        large, far = record.size >= ZIP64_FROM, record.position >= ZIP64_FROM
        fields = ([record.size, record.size] if large else []) + ([record.position] if far else [])
        extra = struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
        size, position = (0xFFFFFFFF if large else record.size), (0xFFFFFFFF if far else record.position)
        entries.append(
            struct.pack(
                "<IHHHHHHIIIHHHHHII", 0x02014B50, 45, 45, 0x800, 0, 0, 0x21, crc, size, size,
                len(record.name), len(extra), 0, 0, 0, 0, position,
            )
            + record.name
            + extra
        )  # fmt: skip
    directory = b"".join(entries)
    count, end = len(records), start + len(directory)
    tail = b""
    if count >= 0xFFFF or start >= ZIP64_FROM:
        tail = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, len(directory), start)
        tail += struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    short = (min(count, 0xFFFF), min(count, 0xFFFF), len(directory), 0xFFFFFFFF if start >= ZIP64_FROM else start)
    return directory + tail + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, *short, 0)
