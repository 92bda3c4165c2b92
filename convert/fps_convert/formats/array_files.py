"""An orbax directory filled in place, tensor by tensor, and read back the same way.

orbax writes a tree of whole arrays: a component (28 GB for a 14B DiT) would have to lie in memory first, and every page of
it be touched once more than a file copy touches it. An uncompressed zarr array is plain bytes in files, one per chunk, so:
orbax writes the directory for stand-ins of one element, the shapes in its metadata are set to the real ones, and the
chunk files are written where they lie. orbax itself then confirms the shapes, and reads the result like any other.

Source: zarr v2 (https://zarr-specs.readthedocs.io), orbax-checkpoint's PyTreeCheckpointHandler without OCDBT.
"""

import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from fps_convert.formats.arrays import write_at
from fps_convert.formats.readers import map_file
from fps_jax.checkpoints.format import abstract_component, save_component
from fps_jax.files import read_json
from fps_jax.models.params import flatten, unflatten

_CHUNK_BYTES = 128 << 20  # what any reader holds at least; about one layer of a 14B model's largest parameter


def _rows_per_chunk(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of the first axis in one chunk: all, or the most that fit and divide it (zarr pads a last chunk that is short)."""
    row = math.prod(shape[1:]) * itemsize
    fitting = [n for n in range(1, shape[0] + 1) if shape[0] % n == 0 and (n == 1 or n * row <= _CHUNK_BYTES)]
    return max(fitting)


class ArrayFiles:
    """The arrays of one component's directory, by path; rows of the first axis are written or mapped.

    Raises: ValueError, naming the directory, where it isn't one of uncompressed arrays cut along the first axis alone.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._rows: dict[str, int] = {}
        for path, leaf in flatten(abstract_component(directory)):
            header = read_json(self._folder(path) / ".zarray")
            chunks = header.get("chunks") or [0]
            plain = header.get("compressor") is None and not header.get("filters") and header.get("order") == "C"
            if header.get("shape") != list(leaf.shape) or chunks[1:] != list(leaf.shape[1:]) or not plain:
                raise ValueError(f"{self._folder(path)} is not a plain array of shape {list(leaf.shape)}")
            if header.get("dimension_separator", ".") != "." or not chunks[0] or leaf.shape[0] % chunks[0]:
                raise ValueError(f"{self._folder(path)} is not cut evenly along its first axis")
            self.shapes[path], self.dtypes[path], self._rows[path] = leaf.shape, np.dtype(leaf.dtype), chunks[0]

    def _folder(self, path: str) -> pathlib.Path:
        return self.directory / path.replace("/", ".")

    def _chunk(self, path: str, number: int) -> pathlib.Path:
        return self._folder(path) / ".".join([str(number), *"0" * (len(self.shapes[path]) - 1)])

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * self.dtypes[path].itemsize for path, shape in self.shapes.items())

    def write(self, path: str, start: int, rows: np.ndarray) -> None:
        """Writes consecutive rows of the first axis, C-contiguous and of the array's dtype. Raises OSError: disk full."""
        per_chunk, data = self._rows[path], rows.reshape(len(rows), -1).view(np.uint8)
        done = 0
        while done < len(rows):
            number, offset = divmod(start + done, per_chunk)
            count = min(per_chunk - offset, len(rows) - done)
            descriptor = os.open(self._chunk(path, number), os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                write_at(descriptor, offset * data.shape[1], data[done : done + count].reshape(-1))
            finally:
                os.close(descriptor)
            done += count

    def read(self, path: str, row: int | None = None) -> np.ndarray:
        """One row of the first axis, or the whole array: a view of the mapped file, a copy only of several chunks."""
        if row is not None:
            return self._mapped(path, row // self._rows[path])[row % self._rows[path]]
        chunks = self.chunks(path)
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def chunks(self, path: str) -> list[np.ndarray]:
        """The whole array as views of its mapped files, consecutive along the first axis."""
        return [self._mapped(path, number) for number in range(self.shapes[path][0] // self._rows[path])]

    def _mapped(self, path: str, number: int) -> np.ndarray:
        file, shape = self._chunk(path, number), (self._rows[path], *self.shapes[path][1:])
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; convert the checkpoint again")
        raw = map_file(file)
        if len(raw) != math.prod(shape) * self.dtypes[path].itemsize:
            raise ValueError(f"{file} has {len(raw)} bytes, not those of {list(shape)}; convert the checkpoint again")
        return raw.view(self.dtypes[path]).reshape(shape)


def create(directory: pathlib.Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, np.dtype]) -> ArrayFiles:
    """An orbax directory of arrays that are still to be written.

    Raises: ValueError where this orbax lays its directories out in a way that this module doesn't know.
    """
    stand_ins = {path: np.zeros((1,) * len(shape), dtypes[path]) for path, shape in shapes.items()}
    save_component(directory, unflatten(stand_ins))
    chunks = {path: (_rows_per_chunk(shape, dtypes[path].itemsize), *shape[1:]) for path, shape in shapes.items()}
    names = {path.replace("/", "."): path for path in shapes}

    def patch(file: pathlib.Path, fields: dict[str, Any]) -> None:
        content = read_json(file)
        content.update(fields)
        file.write_text(json.dumps(content))

    for name, path in names.items():
        folder = directory / name
        fields = {"shape": list(shapes[path]), "chunks": list(chunks[path])}
        patch(folder / ".zarray", fields)
        (folder / ".".join("0" * len(shapes[path]))).unlink()
    try:
        tree = read_json(directory / "_METADATA")
        for entry in tree["tree_metadata"].values():
            path = "/".join(part["key"] for part in entry["key_metadata"])
            entry["value_metadata"]["write_shape"] = list(shapes[path])
        patch(directory / "_METADATA", tree)
        for file in (directory / "array_metadatas").iterdir():
            arrays = read_json(file)
            for entry in arrays["array_metadatas"]:
                path = names[entry["array_metadata"]["param_name"]]
                entry["array_metadata"] |= {"write_shape": list(shapes[path]), "chunk_shape": list(chunks[path])}
            patch(file, arrays)
    except (KeyError, TypeError, OSError) as error:
        raise ValueError(f"orbax's metadata in {directory} is laid out in an unknown way ({error!r})") from error
    made = ArrayFiles(directory)  # orbax's own view of it
    if made.shapes != shapes or any(made.dtypes[path] != dtypes[path] for path in shapes):
        raise ValueError(f"orbax reads other shapes in {directory} than were set")
    return made
