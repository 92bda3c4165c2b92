"""What a device has room for, and what is said where it has none."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

# What XLA says where it finds no room, compiling or running. Other services' limits have the same name.
_NO_ROOM = re.compile(r"RESOURCE_EXHAUSTED: (.*(?:memory|allocat).*)", re.IGNORECASE)


def memory_limit(device: Any, devices: int = 1) -> int | None:
    """Bytes that programs may take of a device; of a CPU, one of so many `devices`, a share of the machine's. None where nothing
    tells."""
    if device.platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        return None if pages is None else pages * os.sysconf("SC_PAGE_SIZE") // devices
    return _stats(device).get("bytes_limit")


def memory_used(device: Any) -> int:
    """Bytes of it that are taken, as far as that is known."""
    return _stats(device).get("bytes_in_use", 0)


def no_room(error: Exception) -> str | None:
    """What XLA says of memory that it asked for in vain, None of any other error."""
    found = _NO_ROOM.search(str(error)) if isinstance(error, RuntimeError) else None  # JaxRuntimeError is one
    return None if found is None else found[1].strip()[:200]


@contextlib.contextmanager
def enough_memory(what: str, limit: Callable[[], int | None], fix: Callable[[], str]) -> Iterator[None]:
    """Raises MemoryError, in one line, where XLA finds no room for what is done in the block.

    what: for the line, as limit, a device's bytes, and fix, what would take less; these are asked for then.
    """
    try:
        yield
    except RuntimeError as error:
        found = no_room(error)
        if found is None:
            raise
        most = limit()
        has = "" if most is None else f", which has {most / 1e9:.1f} GB"
        raise MemoryError(f"{what}: no memory left on a device{has} ({found}); {fix()}") from error


def _stats(device: Any) -> dict[str, int]:
    try:
        return device.memory_stats() or {}
    except RuntimeError:  # an allocator that keeps no count
        return {}
