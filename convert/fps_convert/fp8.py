"""FP8 weights read as bf16: fp8 x scale, where a file holds scales.

What is read (e4m3 and e5m2, X being a layer's name):

  X.weight alone                               plain: the values themselves
  X.weight, X.scale_weight, scaled_fp8         ComfyUI, Kijai
  X.weight, X.weight_scale(, X.comfy_quant)    ComfyUI since its quantization metadata; one scale, or one per output channel

Scales of activations (`scale_input`, `input_scale`) belong to FP8 matmuls, which bf16 weights don't need.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

import numpy as np

from fps_convert.formats.readers import FLOATS, FP8, Reader, TensorInfo

MARK = "scaled_fp8"
_SCALES = ("scale_weight", "weight_scale")
_OF_ACTIVATIONS = ("scale_input", "input_scale")
_FORMAT = "comfy_quant"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_CODES = np.arange(256, dtype=np.uint8)
_CHUNK = 1 << 16
_BF16 = FLOATS["BF16"]


@dataclass(frozen=True)
class _Stored:
    """How a weight lies in the file: the key of its scale, if it has one."""

    info: TensorInfo
    scale: str | None


class _Dequantized:
    """A reader of bf16 in place of FP8 (and of whatever has a scale)."""

    def __init__(self, reader: Reader, stored: dict[str, _Stored], aside: set[str]):
        self._reader, self._stored = reader, stored
        self.metadata = reader.metadata
        self.tensors = {
            key: dataclasses.replace(info, dtype="BF16") if key in stored else info
            for key, info in reader.tensors.items()
            if key not in aside
        }

    def read(self, key: str) -> np.ndarray:
        values = self._reader.read(key)
        stored = self._stored.get(key)
        if stored is None:
            return values
        scale = np.ones(1, np.float32)
        if stored.scale is not None:
            scale = self._reader.read(stored.scale).astype(np.float32).reshape(-1)
            if not (np.isfinite(scale) & (scale != 0)).all():
                raise ValueError(f"{stored.info.file}: scale {stored.scale!r} has zero, NaN or inf; download it again")
        rows = values.reshape(len(scale), -1)
        whole = np.empty(rows.shape, _BF16)
        for row, factor, target in zip(rows, scale, whole, strict=True):
            _multiply(row, factor, target, stored.info)
        return whole.reshape(values.shape)


def _multiply(values: np.ndarray, factor: np.float32, target: np.ndarray, info: TensorInfo) -> None:
    """target = values x factor in float32, rounded once. FP8 has 256 values: they are multiplied, and looked up."""
    fp8 = values.dtype.itemsize == 1
    numbers = (_CODES.view(values.dtype) if fp8 else values).astype(np.float32)
    with np.errstate(over="ignore"):
        products = (numbers * factor).astype(_BF16)
    lost = np.isinf(products) & np.isfinite(numbers)
    if lost.any() and (not fp8 or lost[values.view(np.uint8)].any()):
        raise ValueError(
            f"{info.file}: tensor {info.key!r} times its scale {factor:g} overflows bfloat16; download it again"
        )
    if fp8:
        table, bits, into = products.view(np.uint16), values.view(np.uint8), target.view(np.uint16)
        for start in range(0, len(bits), _CHUNK):  # twice as fast: NumPy's 8-byte copy of the indices stays in cache
            part = slice(start, start + _CHUNK)
            np.take(table, bits[part], out=into[part], mode="clip")
    else:
        target[...] = products


def _check_format(reader: Reader, key: str) -> None:
    """ComfyUI's note on how a layer is quantized: JSON as bytes."""
    info = reader.tensors[key]
    try:
        kind = json.loads(reader.read(key).tobytes())["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{info.file}: {key!r} is no quantization note ({error!r}); download it again") from None
    if kind not in _FORMATS:
        raise NotImplementedError(f"{info.file}: {key!r} says {kind!r}, which isn't supported; use a bf16 or FP8 file")


def _check_scale(reader: Reader, scale: str, weight: TensorInfo | None) -> None:
    info = reader.tensors[scale]
    if weight is None:
        raise ValueError(f"{info.file}: {scale!r} is the scale of no tensor; copy or download it again")
    size, outs = math.prod(info.shape), weight.shape[0] if weight.shape else 1
    if info.dtype not in (*FLOATS, "F64"):
        raise NotImplementedError(f"{info.file}: scale {scale!r} has dtype {info.dtype}; F32, F16 and BF16 are read")
    if size != 1 and not (size == outs == info.shape[0]):
        raise NotImplementedError(
            f"{info.file}: scale {scale!r} has shape {list(info.shape)} for {list(weight.shape)}; one scale, or one per "
            "output channel is read"
        )
    weight_dtypes = (*FLOATS, *FP8)
    if weight.dtype not in weight_dtypes:
        raise NotImplementedError(
            f"{weight.file}: tensor {weight.key!r} has dtype {weight.dtype} and a scale; with scales, FP8 is read: use an FP8 "
            "or bf16 file"
        )


def dequantized(reader: Reader) -> tuple[Reader, list[str]]:
    """A reader that gives bf16 where the file holds FP8, without its scales; and notes. Others are returned as they are.

    Raises: ValueError for a scale without its weight, or FP8 weights without scales where others have one; NotImplementedError
      for scales of blocks and formats that aren't FP8.
    """
    scales: dict[str, str] = {}
    aside: set[str] = set()
    marked = False
    for key in reader.tensors:
        layer, _, last = key.rpartition(".")
        if last in _SCALES:
            weight = f"{layer}.weight"
            if weight in scales:
                raise ValueError(
                    f"{reader.tensors[key].file}: {weight!r} has two scales, {scales[weight]!r} and {key!r}"
                )
            scales[weight] = key
            aside.add(key)
        elif last in _OF_ACTIVATIONS or last in (_FORMAT, MARK):
            aside.add(key)
            marked = marked or last == MARK
            if last == _FORMAT:
                _check_format(reader, key)
        elif last == "weight_scale_inv":
            raise NotImplementedError(
                f"{reader.tensors[key].file}: {key!r} holds scales of blocks; one scale, or one per output channel is read"
            )
    for weight, scale in scales.items():
        _check_scale(reader, scale, reader.tensors.get(weight))
    fp8 = [key for key, info in reader.tensors.items() if info.dtype in FP8 and key not in aside]
    bare = [key for key in fp8 if key not in scales and key.endswith(".weight") and len(reader.tensors[key].shape) > 1]
    if bare and (scales or marked):
        raise ValueError(
            f"{reader.tensors[bare[0]].file}: FP8 tensor {bare[0]!r} lacks its scale, which others of this file have; "
            "copy or download it again"
        )
    if not fp8 and not aside:
        return reader, []
    stored = {key: _Stored(reader.tensors[key], scales.get(key)) for key in dict.fromkeys([*fp8, *scales])}
    kinds = " and ".join(sorted({reader.tensors[key].dtype for key in stored}))
    how = f", times {len(scales)} scales" if scales else ""
    return _Dequantized(reader, stored, aside), [
        f"{len(stored)} tensors of {kinds}{how}, are read as bf16"
    ] if stored else []


def _blocks(values: np.ndarray) -> list[np.ndarray]:
    """Rows of a weight in float32, about a million numbers at a time."""
    return np.array_split(values, max(1, min(len(values), values.size >> 20)))


def scale_of(values: np.ndarray) -> np.ndarray:
    """The float32 scale, of shape [], by which a weight's largest magnitude becomes 448, e4m3's largest number."""
    amax = max(np.abs(rows.astype(np.float32)).max(initial=0) for rows in _blocks(values))
    # Not below the smallest normal number: quotients by less would overflow.
    return np.asarray(max(amax / np.float32(448), np.finfo(np.float32).tiny) if amax > 0 else 1, np.float32)


def codes(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """e4m3 codes of a weight, which times `scale` are the weight; |error| <= amax / 28 where codes are normal numbers."""
    target = np.empty(values.shape, FP8["F8_E4M3"])
    for rows, into in zip(_blocks(values), _blocks(target), strict=True):
        # Clipped: a quotient may pass 448 by a rounding.
        into[...] = np.clip(rows.astype(np.float32) / scale, -448, 448).astype(target.dtype)
    return target
