"""Copies of single tensors: transposed, cast and written at the speed of memory, with no fresh memory for each."""

import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

_scratch = threading.local()


def in_threads(work: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """`map`, in order, on as many threads as there are cores up to 4; NumPy's copies and file writes release the GIL."""
    pool = concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, cast where dtypes differ, in strips along the innermost axis.

    A transposed NumPy copy walks the source column by column and misses the cache at each element
    (0.8 GB/s); strips of 16 keep the lines that it touches in cache (2.6 GB/s).
    """
    if target.dtype == source.dtype:  # bits: ml_dtypes' own copy loops are slower
        unsigned = np.dtype(f"u{target.itemsize}")
        target, source = target.view(unsigned), source.view(unsigned)
    if target.ndim < 2 or source.flags.c_contiguous:
        np.copyto(target, source, casting="unsafe")
        return
    for start in range(0, target.shape[-1], 16):
        np.copyto(target[..., start : start + 16], source[..., start : start + 16], casting="unsafe")


# Of a dtype that another can't hold all of: unsigned bits of magnitudes grow with them, so bits are compared.
_LARGEST = {np.dtype(kind): float(ml_dtypes.finfo(kind).max) for kind in (np.float16, ml_dtypes.bfloat16, np.float32)}


def overflow(values: np.ndarray, dtype: np.dtype) -> float | None:
    """The largest finite magnitude in `values` (of 2 or 4 bytes each), if a cast to `dtype` would make it inf; else None."""
    own = _LARGEST[values.dtype]
    if own <= _LARGEST[np.dtype(dtype)] or not values.size:
        return None
    bits = np.dtype(f"u{values.itemsize}")
    sign, infinity = bits.type(1 << (8 * values.itemsize - 1)), np.asarray(np.inf, values.dtype).view(bits)
    most = 0.0
    values = np.atleast_1d(values)
    for rows in np.array_split(values.view(bits), max(1, min(len(values), values.size >> 20))):
        magnitudes = rows & ~sign
        finite = magnitudes.max(where=magnitudes < infinity, initial=0)
        most = max(most, float(np.asarray(finite, bits).view(values.dtype)))
    with np.errstate(over="ignore"):
        lost = np.isinf(np.asarray(most, values.dtype).astype(dtype))
    return most if lost else None


def contiguous(pieces: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The pieces joined along their first axis, C-contiguous, in `dtype`.

    One piece that is so already is returned itself; else the values lie in a buffer of this thread, valid until its next
    call: touching fresh memory for each tensor costs more than the copy.
    """
    if len(pieces) == 1 and pieces[0].flags.c_contiguous and pieces[0].dtype == dtype:
        return pieces[0]
    first = pieces[0]
    shape = first.shape if len(pieces) == 1 else (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
    nbytes = sum(piece.size for piece in pieces) * dtype.itemsize
    if len(getattr(_scratch, "raw", b"")) < nbytes:
        _scratch.raw = b""  # the old one goes before the new one comes
        _scratch.raw = np.empty(nbytes, np.uint8)
    target = _scratch.raw[:nbytes].view(dtype).reshape(shape)
    if len(pieces) == 1:
        copy(target, first)
        return target
    start = 0
    for piece in pieces:
        copy(target[start : start + piece.shape[0]], piece)
        start += piece.shape[0]
    return target


def write_at(descriptor: int, position: int, data: Any) -> None:
    """Writes all of `data` at a position; threads may write to one file. Raises OSError: disk full."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(descriptor, view[: 1 << 30], position)  # Linux writes at most 2 GiB at once
        view, position = view[done:], position + done
