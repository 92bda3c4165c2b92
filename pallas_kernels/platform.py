"""Which kind of device a program is being built for."""

import jax


def target_platform() -> str:
    """'cpu', 'gpu', ... of the default device, which may only be described, when a program is compiled ahead of time for it."""
    device = jax.config.jax_default_device
    name = device if isinstance(device, str) else device.platform if device is not None else jax.default_backend()
    return "gpu" if name == "cuda" else name
