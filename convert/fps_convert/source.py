"""A torch checkpoint that was opened and checked: loaded or saved in our format, a tensor at a time."""

import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fps_convert import mapping
from fps_convert.formats import array_files
from fps_convert.formats.arrays import contiguous, copy, in_threads, overflow
from fps_convert.formats.readers import FLOATS, Reader
from fps_convert.mapping import Row, SourceTensor
from fps_jax.checkpoints.format import empty_aligned
from fps_jax.checkpoints.lora import Scaled, merge
from fps_jax.choices import LayoutName
from fps_jax.config import Component, WanConfig
from fps_jax.models.params import Params, unflatten
from fps_jax.progress import Moved


@dataclass
class Part:
    """One component of a source, checked: every row of the table has its tensor and the other way round."""

    reader: Reader
    table: list[Row]
    tensors: list[SourceTensor]
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        infos = (self.reader.tensors[tensor.key] for tensor in self.tensors)
        return sum(int(np.prod(info.shape, dtype=np.int64)) * info.check_dtype().itemsize for info in infos)

    def row_dtypes(self) -> dict[str, list[str]]:
        """Source dtypes of each of our parameters, by layer."""
        dtypes: dict[str, list[str]] = {}
        for tensor in self.tensors:
            for row in tensor.rows:
                dtypes.setdefault(row.path, []).append(self.reader.tensors[tensor.key].dtype)
        return dtypes


@dataclass
class Source:
    """A checkpoint to convert from.

    Attributes:
      layout: the name of one in `layouts.LAYOUTS`.
      config: what it is.
      parts: its components; `components` are their names.
      tokenizer_dir: the directory that holds tokenizer.json or spiece.model.
      spelling: how this source spells what its layout spells in two ways, for the way back.
      loras: merged into the DiT's weights as they are loaded or saved, in float32, before they are cast.
      audit: a report, JSON-ready: per component every source tensor with file, dtype, shape and parameter,
        and what was left out.
    """

    path: pathlib.Path
    layout: LayoutName
    config: WanConfig
    parts: dict[Component, Part]
    tokenizer_dir: pathlib.Path
    spelling: dict[str, Any]
    audit: dict[str, Any]
    loras: list[Scaled] = field(default_factory=list)

    @property
    def components(self) -> tuple[Component, ...]:
        return tuple(self.parts)

    def stored_dtypes(self, component: Component, dtype: Any = None) -> dict[str, np.dtype]:
        """The dtype of every parameter as `load` returns it: `dtype` (never for the VAE), else the source's own.

        A stacked parameter whose layers differ gets float32, which holds F16 and BF16 exactly.
        """
        if dtype is not None and component != "vae":
            return dict.fromkeys(self.parts[component].row_dtypes(), np.dtype(dtype))
        return {
            path: FLOATS[names[0]] if len(set(names)) == 1 else np.dtype(np.float32)
            for path, names in self.parts[component].row_dtypes().items()
        }

    def load(self, component: Component, dtype: Any = None, progress: Moved | None = None) -> Params:
        """Parameters of one component as NumPy arrays, each tensor copied once, from the mapped file to its place.

        Args:
          component: one of `components`.
          dtype: cast (round to nearest even) to this type; None keeps each tensor's. The VAE is never cast.
          progress: called with a number of source bytes whenever so many more are done.
        """
        dtypes = self.stored_dtypes(component, dtype)
        shapes = mapping.leaves(self.parts[component].table)
        buffers = {path: empty_aligned(shape, dtypes[path]) for path, shape in shapes.items()}

        def place(row: Row, values: np.ndarray) -> None:
            copy(buffers[row.path] if row.layer is None else buffers[row.path][row.layer], values)

        self.each(component, self._merging(component, place, dtypes), progress, dtypes)
        return unflatten(buffers)

    def _merging(
        self, component: Component, take: Callable[[Row, np.ndarray], None], dtypes: dict[str, np.dtype]
    ) -> Callable[[Row, np.ndarray], None]:
        """`take` of values with the LoRAs in them."""
        if component != "dit" or not self.loras:
            return take
        changed = {place for scaled in self.loras for place in scaled.lora.changes}

        def merged(row: Row, values: np.ndarray) -> None:
            place = (row.path, row.layer)
            take(row, merge(values, place, self.loras, dtypes[row.path]) if place in changed else values)

        return merged

    def each(
        self,
        component: Component,
        take: Callable[[Row, np.ndarray], None],
        progress: Moved | None,
        dtypes: dict[str, np.dtype],
    ) -> None:
        """Calls `take(row, values)` for every parameter of every layer, on several threads; `values` is a view in our shape.

        dtypes: what each parameter will be cast to. Raises ValueError, naming the tensor, for a number that is too large for it.
        """
        part = self.parts[component]

        def fill(tensor: SourceTensor) -> int:
            whole = part.reader.read(tensor.key)
            for row, piece in _pieces(tensor, whole):
                _check_range(part, tensor, piece, dtypes[row.path])
                take(row, mapping.to_ours(piece, row))
            return whole.nbytes

        for nbytes in in_threads(fill, part.tensors):
            if progress is not None:
                progress(nbytes)

    def read(self, component: Component, path: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The part of one parameter that `index` cuts out, in `dtype`: only that is copied from the mapped files.

        index: a slice with step 1 for each of our dimensions, the layer axis included. Raises as `each`.
        """
        part, dtype = self.parts[component], np.dtype(dtype)
        spans = [range(*cut.indices(n)) for cut, n in zip(index, mapping.leaves(part.table)[path], strict=True)]
        target = empty_aligned(tuple(map(len, spans)), dtype)

        def wanted(row: Row) -> bool:
            return row.path == path and (row.layer is None or row.layer in spans[0])

        def cut(row: Row, values: np.ndarray) -> np.ndarray:
            return values[index if row.layer is None else index[1:]]

        def put(row: Row, values: np.ndarray) -> None:
            copy(target if row.layer is None else target[row.layer - spans[0].start], cut(row, values))

        take = self._merging(component, put, {path: dtype})

        def fill(tensor: SourceTensor) -> None:
            for row, piece in _pieces(tensor, part.reader.read(tensor.key)):
                if wanted(row):
                    values = mapping.to_ours(piece, row)
                    _check_range(part, tensor, cut(row, values), dtype)
                    take(row, values)

        list(in_threads(fill, [tensor for tensor in part.tensors if any(map(wanted, tensor.rows))]))
        return target

    def save(self, component: Component, directory: pathlib.Path, dtype: Any, progress: Moved | None = None) -> None:
        """What `save_component(directory, load(component, dtype))` writes, with one tensor a thread in memory."""
        files = array_files.create(
            directory, mapping.leaves(self.parts[component].table), self.stored_dtypes(component, dtype)
        )

        def write(row: Row, values: np.ndarray) -> None:
            values = contiguous([values], files.dtypes[row.path])
            if row.layer is None:
                files.write(row.path, 0, values)
            else:
                files.write(row.path, row.layer, values[None])

        self.each(component, self._merging(component, write, files.dtypes), progress, files.dtypes)


def _pieces(tensor: SourceTensor, whole: np.ndarray) -> Iterator[tuple[Row, np.ndarray]]:
    """Each row of a tensor with its part of it."""
    parts = np.split(whole, len(tensor.rows)) if len(tensor.rows) > 1 else [whole]
    return zip(tensor.rows, parts, strict=True)


def _check_range(part: Part, tensor: SourceTensor, values: np.ndarray, dtype: np.dtype) -> None:
    most = overflow(values, dtype)
    if most is not None:
        raise ValueError(
            f"{part.reader.tensors[tensor.key].file}: tensor {tensor.key!r} holds {most:g}, which {dtype} can't; convert to "
            "bfloat16 or float32"
        )
