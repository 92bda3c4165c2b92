"""The device that a program is being built for."""

from typing import Any

import jax


def target_device() -> Any:
    """The default device. It may only be described: a program can be compiled ahead of time for a device that isn't there."""
    device = jax.config.jax_default_device
    return jax.devices(device)[0] if device is None or isinstance(device, str) else device


def target_platform() -> str:
    """Its kind: 'cpu', 'gpu', ..."""
    platform = target_device().platform
    return "gpu" if platform == "cuda" else platform


def multiprocessors() -> int:
    """Of the GPU; 132, as H100 and H200 have, where the device is another one or only described."""
    return getattr(target_device(), "core_count", None) or 132
