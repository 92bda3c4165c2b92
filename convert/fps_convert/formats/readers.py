"""Lazy readers of safetensors: a file is mapped, its header checked in full, and a tensor is a view of the mapping."""

import collections
import dataclasses
import json
import math
import mmap
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

import ml_dtypes
import numpy as np

from fps_jax.choices import WeightDtype
from fps_jax.files import check_regular, read_json

DTYPES: tuple[WeightDtype, ...] = get_args(WeightDtype)
# Names as in safetensors, with their NumPy types where Wan's files may hold them.
FLOATS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
FP8: dict[str, np.dtype] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FN": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# What `read` gives: beside weights, what FP8 files and tokenizers consist of.
_NUMBERS = {"F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4")}
VIEWS = FLOATS | FP8 | _NUMBERS | {"U8": np.dtype(np.uint8)}
# The format admits 100 MB. A 14B model with all its parts in one file has some 300 kB, and parsed it takes a hundred times that.
# What trainers and ComfyUI keep in the metadata (the words of all captions, a workflow, a picture) may be some megabytes beside.
_MAX_HEADER = 16_000_000


_MAX_RANK = 32  # axes that NumPy had until version 2


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a source: what its file says about it, before anything is read."""

    key: str
    shape: tuple[int, ...]
    dtype: str  # as in safetensors: F32, BF16, ...
    file: pathlib.Path

    def check_dtype(self) -> np.dtype:
        """The NumPy type. Raises NotImplementedError for what is no plain floating-point weight."""
        if self.dtype in FLOATS:
            return FLOATS[self.dtype]
        raise NotImplementedError(
            f"{self.file}: tensor {self.key!r} has dtype {self.dtype}; weights are F32, F16 or BF16, or FP8 (e4m3, e5m2) in a "
            "model's safetensors: use one of those files"
        )


class Reader(Protocol):
    """Tensors of one component, wherever they lie."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def read(self, key: str) -> np.ndarray:
        """The tensor, as a read-only view of the file; bytes, whole numbers and FP8 too. Else as `TensorInfo.check_dtype`."""
        ...


def map_file(path: pathlib.Path) -> np.ndarray:
    """The bytes of a file as a read-only array, mapped: reading them takes no anonymous memory."""
    check_regular(path)
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            raise ValueError(f"{path} is empty; copy or download it again")
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


class _TwiceError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise _TwiceError(f"{counts.most_common(1)[0][0]!r} stands twice in the header")
    return content


class SafetensorsFile:
    """One safetensors file.

    Raises: ValueError, naming the file, where the header is corrupt, doesn't describe the file's bytes exactly
      (truncated, overlapping, holes) or contradicts itself.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._bytes = map_file(path)
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[int, int]] = {}
        size = len(self._bytes)
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        if size < 8 or length > size - 8:
            raise self._corrupt(f"the header should be {length} bytes long, the file has {size}")
        if length > _MAX_HEADER:
            raise ValueError(
                f"{path}: its header has {length:,} bytes, metadata included, more than the {_MAX_HEADER:,} that are read; save it "
                "again without its metadata"
            )
        try:
            header = json.loads(self._bytes[8 : 8 + length].tobytes(), object_pairs_hook=_no_duplicates)
        except _TwiceError as error:
            raise self._corrupt(str(error)) from None
        except (
            ValueError,
            RecursionError,
        ) as error:  # ValueError: not JSON, not UTF-8, a number of thousands of digits
            raise self._corrupt(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._corrupt("its header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise self._corrupt("its __metadata__ is not a JSON object of texts")
        self.metadata: dict[str, str] = metadata
        for key, entry in header.items():
            self._add(key, entry, 8 + length)
        end = 8 + length
        for key, (start, stop) in sorted(self._places.items(), key=lambda item: item[1]):
            if start != end:
                raise self._corrupt(f"tensor {key!r} starts at byte {start}, where {end} is expected")
            end = stop
        if end != size:
            what = "truncated" if end > size else "longer than its header says"
            raise self._corrupt(f"{what}: the header describes {end} bytes, the file has {size}")

    def _corrupt(self, why: str) -> ValueError:
        return ValueError(f"{self._path} is not a whole safetensors file: {why}; copy or download it again")

    def _add(self, key: str, entry: Any, base: int) -> None:
        dtype, shape, start, stop = "", (), 0, 0
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sane = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop)) and len(shape) <= _MAX_RANK
            sane &= isinstance(dtype, str)
        except (KeyError, TypeError, ValueError):
            sane = False
        if not sane:
            raise self._corrupt(f"the header's entry for {key!r} lacks a sound dtype, shape or data_offsets")
        if dtype not in _BITS:
            raise self._corrupt(f"tensor {key!r} has the unknown dtype {dtype!r}")
        if (math.prod(shape) * _BITS[dtype] + 7) // 8 != stop - start:
            raise self._corrupt(
                f"tensor {key!r} of shape {list(shape)} and dtype {dtype} can't have {stop - start} bytes"
            )
        self.tensors[key] = TensorInfo(key, shape, dtype, self._path)
        self._places[key] = (base + start, base + stop)

    def read(self, key: str) -> np.ndarray:
        info = self.tensors[key]
        start, stop = self._places[key]
        return self._bytes[start:stop].view(VIEWS.get(info.dtype) or info.check_dtype()).reshape(info.shape)

    def number(self, key: str) -> float:
        """A tensor of one number, which unlike a weight may be whole or double. Raises NotImplementedError for another dtype."""
        info = self.tensors[key]
        start, stop = self._places[key]
        kind = _NUMBERS.get(info.dtype) or info.check_dtype()
        return float(self._bytes[start:stop].view(kind)[0])


class ShardedSafetensors:
    """Shards with their index: `{"weight_map": {tensor: file}}`.

    Raises: ValueError where index and shards disagree on any tensor, FileNotFoundError where a shard is missing.
    """

    def __init__(self, index: pathlib.Path):
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())
        ):
            raise ValueError(f"{index} has no weight_map from tensor to file; copy or download it again")
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._shards: dict[pathlib.Path, SafetensorsFile] = {}
        for name in dict.fromkeys(weight_map.values()):
            if pathlib.PurePosixPath(name).name != name or "\\" in name:
                raise ValueError(f"{index} names the shard {name!r}, which is not a plain file name beside it")
            path = index.parent / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, and {index.name} names it; copy or download it again")
            shard = self._shards[path] = SafetensorsFile(path)
            self.metadata |= shard.metadata
            for key, info in shard.tensors.items():
                if weight_map.get(key) != name:
                    where = f"places it in {weight_map[key]}" if key in weight_map else "doesn't name it"
                    raise ValueError(
                        f"{path} holds tensor {key!r}, but {index.name} {where}; shards and index disagree"
                    )
                self.tensors[key] = info
        for key, name in weight_map.items():
            if key not in self.tensors:
                raise ValueError(f"{index} places tensor {key!r} in {name}, which lacks it; shards and index disagree")

    def read(self, key: str) -> np.ndarray:
        return self._shards[self.tensors[key].file].read(key)


class Renamed:
    """A reader under other key names, for files that spell a prefix differently. `only`: without the keys that keep theirs."""

    def __init__(self, reader: Reader, names: dict[str, str], *, only: bool = False):
        self._reader, self._names = reader, {new: old for old, new in names.items()}
        self.metadata = reader.metadata
        self.tensors = {
            names.get(key, key): dataclasses.replace(info, key=names.get(key, key))
            for key, info in reader.tensors.items()
            if not only or key in names
        }

    def read(self, key: str) -> np.ndarray:
        return self._reader.read(self._names.get(key, key))


@dataclass
class _Named:
    """The files of one stem and variant."""

    single: pathlib.Path | None = None
    index: pathlib.Path | None = None
    shards: list[pathlib.Path] = field(default_factory=list)


def _by_variant(directory: pathlib.Path, stem: str) -> dict[str, _Named]:
    """The files of a stem by variant: '' without one, 'fp16' of `stem.fp16.safetensors`, wherever diffusers has put the word."""
    word = r"(?:\.([A-Za-z]\w*))?"
    weights = re.compile(rf"{re.escape(stem)}{word}(-\d+-of-\d+)?{word}\.safetensors")
    index = re.compile(rf"{re.escape(stem)}{word}\.safetensors\.index{word}\.json")
    found: dict[str, _Named] = {}
    for path in sorted(directory.glob(f"{stem}*")):
        if match := weights.fullmatch(path.name):
            named = found.setdefault(match[1] or match[3] or "", _Named())
            if match[2]:
                named.shards.append(path)
            else:
                named.single = path
        elif match := index.fullmatch(path.name):
            found.setdefault(match[1] or match[2] or "", _Named()).index = path
    return found


def open_safetensors(directory: pathlib.Path, stem: str) -> Reader | None:
    """`stem.safetensors`, or its shards by their index; None where the directory has neither.

    Only where there are none without it, files of a variant are taken: `stem.fp16.safetensors`.
    Raises: ValueError for both whole and shards, or files of two variants; FileNotFoundError for shards without their index.
    """
    found = _by_variant(directory, stem)
    if not found:
        return None
    if "" not in found and len(found) > 1:
        variants = " and ".join(f"{stem}.{variant}" for variant in sorted(found))
        raise ValueError(f"{directory} has {variants}; keep the one to be used")
    variant = "" if "" in found else next(iter(found))
    named = found[variant]
    if named.index is not None:
        reader = ShardedSafetensors(named.index)
        unknown = {path.name for path in (*named.shards, named.single) if path is not None} - {
            info.file.name for info in reader.tensors.values()
        }
        if unknown:
            raise ValueError(
                f"{directory / min(unknown)} is not named by {named.index.name}; remove the one that is stale"
            )
        return reader
    if named.shards:
        shard = named.shards[0].name
        if named.single is not None:
            raise ValueError(f"{directory} has both {named.single.name} and {shard}; remove the stale one")
        dotted = f".{variant}" if variant else ""
        index = directory / f"{stem}{dotted}.safetensors.index.json"
        raise FileNotFoundError(f"{index} is missing, and {shard} is a shard; copy or download the index too")
    return None if named.single is None else SafetensorsFile(named.single)


def open_weights(file: pathlib.Path) -> Reader:
    """A safetensors file, or the shards of a `.safetensors.index.json`. Raises ValueError: no whole file of these kinds."""
    return ShardedSafetensors(file) if file.suffix == ".json" else SafetensorsFile(file)
