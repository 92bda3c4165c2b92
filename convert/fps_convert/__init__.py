"""Torch checkpoints of Wan2.1 to this project's format and back.

`to_flax(src, dst, dtype=None, overwrite=False)`, `to_torch(src, dst, layout, overwrite=False)` and `open_checkpoint(path)`;
`fps-convert` is the same on the command line. Importing this package imports nothing else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fps_convert.save import to_flax, to_torch
    from fps_convert.wan import open_checkpoint

__all__ = ["open_checkpoint", "to_flax", "to_torch"]


def __getattr__(name: str) -> Any:
    if name == "open_checkpoint":
        from fps_convert.wan import open_checkpoint

        return open_checkpoint
    if name in __all__:
        import fps_convert.save

        return getattr(fps_convert.save, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
