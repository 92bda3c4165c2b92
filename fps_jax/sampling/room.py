"""What a device has room for."""

import os
from typing import Any


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


def _stats(device: Any) -> dict[str, int]:
    try:
        return device.memory_stats() or {}
    except RuntimeError:  # an allocator that keeps no count
        return {}
