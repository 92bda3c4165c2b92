"""A reader of PyTorch `.pth` files that runs nothing.

A `.pth` is a zip archive: `data.pkl`, a pickle that describes the tensors, and one uncompressed record per storage. A pickle
is a program for a small stack machine that may call anything importable. Here that machine is interpreted opcode by opcode
(pickletools only takes the bytes apart): nothing is ever imported, and a call to anything but the three functions that a
state dict needs is refused by name.

Source: torch/serialization.py and torch/_weights_only_unpickler.py describe the format.
"""

import math
import pathlib
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from fps_convert.formats.readers import TensorInfo, map_file

_STORAGES = {
    "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2), "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_MAX_PICKLE = 2 << 20  # of the largest state dict that there is, 60 kB; interpreted at about a megabyte a second
# Of the state dicts that a trainer keeps in one file, the first of these is what videos are made with. The moving average comes
# before the weights themselves: Self-Forcing's demo and the command of its readme take it.
ROOTS = ("generator_ema", "generator", "model", "state_dict")


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    record: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_MARK = object()


class _RefusedError(ValueError):
    pass


class _RootError(ValueError):
    """Of the root that was asked for, not of the file."""


def _admit(name: str) -> _Global:
    known = {_ORDERED_DICT, _TENSOR, _PARAMETER} | {f"torch.{storage}" for storage in _STORAGES}
    if name not in known:
        raise _RefusedError(
            f"its pickle asks to import {name}; only tensors and ordered dicts are admitted, and nothing was run. "
            "If you trust its author, re-save the state dict alone as safetensors"
        )
    return _Global(name)


def _ints(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 32 and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _call(function: Any, args: Any) -> Any:
    name = function.name if isinstance(function, _Global) else type(function).__name__
    match name, args:
        case "collections.OrderedDict", ():
            return {}
        case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, int(offset), shape, stride, bool(), *_rest):
            if _ints(shape) and _ints(stride) and len(shape) == len(stride) and offset >= 0 and len(_rest) <= 2:
                last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
                if math.prod(shape) and last >= storage.numel:
                    raise _RefusedError(
                        f"a tensor of shape {list(shape)} reaches past its storage of {storage.numel} elements"
                    )
                return _Tensor(storage, offset, shape, stride)
        case "torch._utils._rebuild_parameter", (_Tensor() as tensor, bool(), _):
            return tensor
    raise _RefusedError(f"its pickle calls {name} with arguments that no state dict has; nothing was run")


def _persistent(pid: Any) -> _Storage:
    match pid:
        case ("storage", _Global(name=name), str(record), str(), int(numel)) if name[6:] in _STORAGES and numel >= 0:
            return _Storage(_STORAGES[name[6:]][0], record, numel)
    raise _RefusedError("its pickle has a persistent id that is not a tensor's storage")


def interpret(pickle: bytes) -> Any:
    """The object that a state dict's pickle describes: dicts, lists, tuples, scalars and `_Tensor`s.

    Raises: ValueError for anything that a state dict doesn't need, before it takes any effect.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_mark() -> list[Any]:
        at = (
            len(stack) - 1
        )  # from the top: from the bottom a pickle of nothing but marks and tuples takes quadratic time
        while stack[at] is not _MARK:
            at -= 1  # IndexError where there is none
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def set_items(items: list[Any]) -> None:
        if not isinstance(stack[-1], dict) or len(items) % 2:
            raise _RefusedError("its pickle sets items of something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise _RefusedError(f"its pickle has a dict key of type {type(key).__name__}")
            stack[-1][key] = value

    arg: Any
    for opcode, arg, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "INT" | "LONG" | "BINFLOAT"
                | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "SHORT_BINSTRING" | "BINSTRING"
            ):  # fmt: skip
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode.name == "APPEND" else pop_mark()
                if not isinstance(stack[-1], list):
                    raise _RefusedError("its pickle appends to something that is not a list")
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items([key, value])
            case "SETITEMS":
                set_items(pop_mark())
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[int(arg)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[int(arg)])
            case "GLOBAL":
                stack.append(_admit(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_admit(f"{module}.{name}"))
            case "BINPERSID":
                stack.append(_persistent(stack.pop()))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_call(function, args))
            case "BUILD":  # state_dict's `_metadata` attribute: version numbers of modules
                state = stack.pop()
                if not isinstance(stack[-1], dict) or not isinstance(state, dict) or set(state) - {"_metadata"}:
                    raise _RefusedError("its pickle sets the state of an object")
            case "STOP":
                return stack.pop()
            case other:
                raise _RefusedError(f"its pickle uses the opcode {other}, which no state dict needs; nothing was run")
    raise _RefusedError("its pickle doesn't end")


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, _Tensor) for k, v in value.items())
    )


def _state_dicts(content: Any) -> dict[str, dict[str, _Tensor]]:
    """The tensors by root, such as {"generator": ..., "critic": ...} beside plain values and an optimizer's; by '' without one."""
    if _is_state_dict(content):
        return {"": content}
    if isinstance(content, dict):
        roots = {name: value for name, value in content.items() if _is_state_dict(value)}
        if (
            roots
            and all(isinstance(name, str) and name for name in roots)
            and all(isinstance(v, dict | list | str | int | float | None) for v in content.values())
        ):
            return roots
    raise _RefusedError("it doesn't hold a state dict (names to tensors)")


def _chosen(roots: tuple[str, ...], wanted: str | None, path: pathlib.Path) -> str:
    """The root to read. Raises ValueError that lists those there are."""
    listed = ", ".join(sorted(roots))
    if wanted is not None and not roots[0]:
        raise _RootError(f"root={wanted!r}: {path} is one state dict, without roots; leave it out")
    if wanted is not None and wanted not in roots:
        raise _RootError(f"root={wanted!r} is not in {path}, which has {listed}; give one of these")
    chosen = wanted or (roots[0] if len(roots) == 1 else next((name for name in ROOTS if name in roots), None))
    if chosen is None:
        raise _RootError(f"{path} holds several state dicts: {listed}; say which with --root (root=)")
    return chosen


def _check_stored(entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise _RefusedError(f"its record {entry.filename} is compressed; PyTorch doesn't do that")
    if entry.flag_bits & 1:
        raise _RefusedError(f"its record {entry.filename} is encrypted; PyTorch doesn't do that")


def _record(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    """A small record. Its size is only believed up to `most`, whatever the directory says."""
    _check_stored(entry)
    if entry.file_size > most:
        raise _RefusedError(f"its {entry.filename} has {entry.file_size} bytes, more than the {most} that it may have")
    with archive.open(entry) as opened:
        return opened.read(most)


class PthFile:
    """The tensors of one `.pth` (or `.pt`) state dict, each a view of the mapped file.

    Args:
      root: which, where the file holds several under names; None for the only one, or the first of `ROOTS`.
    Attributes:
      root: that was read, '' in a file that is one state dict.
      roots: those there are.
    Raises: ValueError, naming the file, where it is truncated, compressed, in PyTorch's format of before 1.6, or asks
      for anything but tensors and ordered dicts; nothing it asks for is run. Also for a root that isn't there.
    """

    def __init__(self, path: pathlib.Path, root: str | None = None):
        self._path = path
        self._bytes = map_file(path)
        self.metadata: dict[str, str] = {}
        if self._bytes[:2].tobytes() != b"PK":
            raise ValueError(
                f"{path} is not a zip-format .pth; it may be truncated, corrupt or in the format of before PyTorch "
                "1.6. Re-save it there: torch.save(torch.load(path, weights_only=True), path)"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                records = {entry.filename: entry for entry in archive.infolist()}
                pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise _RefusedError(f"it has {len(pickles)} data.pkl records, a .pth has one")
                self._prefix = pickles[0].removesuffix("data.pkl")
                order = records.get(self._prefix + "byteorder")
                if order is not None and _record(archive, order, 16) != b"little":
                    raise _RefusedError("it was written on a big-endian machine")
                content = interpret(_record(archive, records[pickles[0]], _MAX_PICKLE))
            self._records = records
            state_dicts = _state_dicts(content)
            self.roots = tuple(state_dicts)
            self.root = _chosen(self.roots, root, path)
            self._tensors = state_dicts[self.root]
            self._starts = {key: self._place(tensor.storage) for key, tensor in self._tensors.items()}
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is truncated or corrupt ({error}); copy or download it again") from None
        except _RefusedError as error:
            raise ValueError(f"{path} is refused: {error}") from None
        except (OSError, _RootError):
            raise
        except Exception as error:  # whatever a damaged archive or pickle leads to
            raise ValueError(
                f"{path} has a corrupt data.pkl ({repr(error)[:200]}); copy or download it again"
            ) from None
        self.tensors = {
            key: TensorInfo(key, tensor.shape, tensor.storage.dtype, path) for key, tensor in self._tensors.items()
        }

    def _place(self, storage: _Storage) -> int:
        """The byte at which a storage's record begins."""
        name = f"{self._prefix}data/{storage.record}"
        entry = self._records.get(name)
        if entry is None:
            raise _RefusedError(f"its pickle names the record {name}, which the archive lacks")
        _check_stored(entry)
        size = next(width for dtype, width in _STORAGES.values() if dtype == storage.dtype) * storage.numel
        # The local header's name and extra field may be longer than the central directory's.
        head = self._bytes[entry.header_offset : entry.header_offset + 30].tobytes()
        if len(head) < 30 or head[:4] != b"PK\3\4":
            raise _RefusedError(f"its record {name} has no local header where the directory says")
        name_length, extra_length = struct.unpack_from("<HH", head, 26)
        start = entry.header_offset + 30 + name_length + extra_length
        if entry.file_size < size or start + size > len(self._bytes):
            raise _RefusedError(f"its record {name} should have {size} bytes and has {entry.file_size}")
        return start

    def read(self, key: str) -> np.ndarray:
        tensor, dtype = self._tensors[key], self.tensors[key].check_dtype()
        start = self._starts[key]
        flat = self._bytes[start : start + tensor.storage.numel * dtype.itemsize].view(dtype)[tensor.offset :]
        strides = tuple(step * dtype.itemsize for step in tensor.stride)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
