"""Torch checkpoints of Wan2.1 to this project's format and back.

`to_flax(src, dst, dtype=None, overwrite=False)`, `to_torch(src, dst, layout, overwrite=False)` and `open_checkpoint(path)`;
`fps-convert` is the same on the command line. Importing this package imports nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fps_convert.flax_to_torch import to_torch
    from fps_convert.open import open_checkpoint
    from fps_convert.torch_to_flax import to_flax

__all__ = ["open_checkpoint", "to_flax", "to_torch"]

# No module has the name of its function: imported, it would take the function's place here.
_LAZY = {
    "open_checkpoint": "fps_convert.open",
    "to_flax": "fps_convert.torch_to_flax",
    "to_torch": "fps_convert.flax_to_torch",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
