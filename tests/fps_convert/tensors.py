"""Every tensor of a torch directory, read by other means than the converter's own where there are any."""

import pathlib

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


def rewrite(file: pathlib.Path, change) -> None:
    """Rewrites a safetensors file after `change(tensors)`."""
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
