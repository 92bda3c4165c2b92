"""Stands in for jaxtyping where that is missing: every name is a type that takes any shape and says nothing about it.

Only for `benchmarks.gpu` on machines where nothing can be installed. It goes last on the path, so that the real one is found first.
"""

from typing import Any


class _Shaped:
    def __class_getitem__(cls, item: Any) -> Any:
        return Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Any if name == "Array" else _Shaped
