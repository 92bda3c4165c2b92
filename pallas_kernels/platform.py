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
