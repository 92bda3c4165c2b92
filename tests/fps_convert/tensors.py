"""Every tensor of a torch directory, read by other means than the converter's own where there are any."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fps_convert.formats.pth import PthFile


def read_all(path: pathlib.Path) -> dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """{component: {key: (dtype, shape, bytes)}}; shards of one folder are one component."""
    found: dict[str, dict] = {}
    for file in sorted(path.rglob("*")):
        if file.suffix == ".safetensors":
            group = found.setdefault(str(file.parent.relative_to(path)), {})
            arrays = load_file(file)
            with safe_open(file, "np") as header:
                dtypes = {key: header.get_slice(key).get_dtype() for key in header.keys()}  # noqa: SIM118
            group |= {key: (dtypes[key], arrays[key].shape, arrays[key].tobytes()) for key in arrays}
        elif file.suffix == ".pth":
            reader = PthFile(file)
            found[file.name] = {
                key: (info.dtype, info.shape, np.ascontiguousarray(reader.read(key)).tobytes())
                for key, info in reader.tensors.items()
            }
    return found


_DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BF16": ml_dtypes.bfloat16, "F16": np.float16,
    "F32": np.float32, "I64": np.int64, "I8": np.int8, "U8": np.uint8,
}  # fmt: skip


def load(file: pathlib.Path) -> dict[str, np.ndarray]:
    """`safetensors.numpy.load_file` with FP8, which it can write and not read."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    entries.pop("__metadata__", None)

    def values(entry) -> np.ndarray:
        begin, end = entry["data_offsets"]
        return np.frombuffer(bytearray(data[start + begin : start + end]), _DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )

    return {key: values(entry) for key, entry in entries.items()}


def rewrite(file: pathlib.Path, change) -> None:
    """Rewrites a safetensors file after `change(tensors)`."""
    tensors = dict(load(file))
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
