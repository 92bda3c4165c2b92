"""Shards: ArrayRecord files of tensors under keys. A shard has its final name only when it is whole.

A record is a safetensors file in memory; its metadata holds the key and what its maker noted. The last record of a shard is JSON:
the keys and shapes of the others, so that one small read says what a shard holds, and a file that was cut short is known by its
lack.
A shard is named after its keys: two processes that make the same shard make one file.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fps_jax.errors import one_line

SUFFIX = ".array_record"
PARTIAL = ".partial"
_FORMAT = {"format": "fps_jax_shard", "version": 1}
_OPTIONS = "group_size:1,uncompressed"  # read one by one, in any order; latents don't compress
_MOST_OPEN = 128  # files
_DTYPES = {"BF16": jnp.bfloat16, "F32": np.float32}

Tensors = dict[str, np.ndarray]


class Place(NamedTuple):
    """Where a record is, and the shapes of its tensors."""

    shard: pathlib.Path
    position: int
    shapes: dict[str, tuple[int, ...]]


class ShardWriter:
    """Writes records into shards of a folder, each closed at `shard_bytes`. A context manager: what is whole at its end, or at
    an error, is closed and kept.

    Args:
      folder: made where it isn't there.
      shard_bytes: a shard is closed when it has so many.
      owner: of the partial files; those that an earlier process of this name left are removed.
    Raises: OSError where the disk is full.
    """

    def __init__(self, folder: pathlib.Path, *, shard_bytes: int, owner: str):
        self._folder, self._shard_bytes, self._owner = folder, shard_bytes, owner
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{owner}.*{PARTIAL}"):
            left.unlink(missing_ok=True)
        self._writer: Any = None
        self._path: pathlib.Path | None = None
        self._keys: dict[str, dict[str, list[int]]] = {}
        self._nbytes = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, *_) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # the first error is the one to tell
            self.close()

    def add(self, key: str, tensors: Tensors, notes: Mapping[str, str] | None = None) -> None:
        """Append a record."""
        from safetensors.numpy import save

        writer = self._writer or self._open()
        content = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {**(notes or {}), "key": key})
        with self._telling():
            writer.write(content)
        self._keys[key] = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self._nbytes += len(content)
        if self._nbytes >= self._shard_bytes:
            self.close()

    def close(self) -> None:
        """Give the open shard its name."""
        if self._writer is None or self._path is None:
            return
        writer, path, keys = self._writer, self._path, self._keys
        self._writer, self._path, self._keys, self._nbytes = None, None, {}, 0
        try:
            with self._telling():
                writer.write(json.dumps({**_FORMAT, "records": keys}).encode())
                writer.close()
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                name = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]
                path.replace(self._folder / f"{name}{SUFFIX}")
        finally:
            path.unlink(missing_ok=True)

    def _open(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path = self._folder / f".{self._owner}.{secrets.token_hex(4)}{PARTIAL}"
        with self._telling():
            self._writer = ArrayRecordWriter(str(self._path), _OPTIONS)
        return self._writer

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the library's only kind: a full disk, too
            raise OSError(
                f"can't write a shard in {str(self._folder)!r}: {one_line(error)}; make room, then run again: whole shards stay"
            ) from None


class Store:
    """The records of a folder's shards, to read in any order and from several threads.

    Raises: ValueError for a shard that isn't whole or isn't ours. A folder that doesn't exist holds nothing.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.places: dict[str, Place] = {}
        self._readers: collections.OrderedDict[pathlib.Path, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        for shard in sorted(folder.glob(f"*{SUFFIX}")):
            for position, (key, shapes) in enumerate(self._index(shard).items()):
                place = Place(shard, position, {name: tuple(shape) for name, shape in shapes.items()})
                self.places.setdefault(key, place)  # the same content wherever it is

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def read(self, key: str) -> tuple[Tensors, dict[str, str]]:
        """A record's tensors and notes. Raises KeyError for a key that isn't there, ValueError for a damaged shard."""
        from safetensors import SafetensorError, deserialize

        place = self.places[key]
        content = self._record(place.shard, place.position)
        try:
            length = int.from_bytes(content[:8], "little")
            notes = json.loads(content[8 : 8 + length])["__metadata__"]
            # not safetensors.numpy.load: it knows no bfloat16
            tensors = {
                name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
                for name, tensor in deserialize(content)
            }
        except (ValueError, KeyError, SafetensorError) as error:
            raise _damaged(place.shard, error) from None
        if notes["key"] != key or {name: tensor.shape for name, tensor in tensors.items()} != place.shapes:
            raise _damaged(place.shard, ValueError(f"record {place.position} is another than its index says"))
        return tensors, notes

    def _index(self, shard: pathlib.Path) -> dict[str, dict[str, list[int]]]:
        try:
            index = json.loads(self._record(shard, -1))
            if {name: index[name] for name in _FORMAT} != _FORMAT:
                raise ValueError(f"its index is of {index['format']} {index['version']}, this release reads {_FORMAT}")
            return index["records"]
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
            raise _damaged(shard, ValueError("its last record is no index")) from None

    def _record(self, shard: pathlib.Path, position: int) -> bytes:
        from array_record.python.array_record_module import ArrayRecordReader

        try:
            with self._lock:
                reader = self._readers.get(shard)
                if reader is None:
                    reader = self._readers[shard] = ArrayRecordReader(str(shard))
                self._readers.move_to_end(shard)
                if len(self._readers) > _MOST_OPEN:
                    self._readers.popitem(last=False)  # closed when the last read of it is done
            if position < 0:
                position += reader.num_records()
            if not 0 <= position < reader.num_records():
                raise _damaged(shard, ValueError("it is cut short"))
            return reader.read([position])[0]
        except (RuntimeError, IndexError) as error:
            raise _damaged(shard, error) from None


def _damaged(shard: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(f"shard {str(shard)!r} is damaged: {one_line(error)}; delete it and run fps-precompute again")
