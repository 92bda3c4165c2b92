"""Where a checkpoint's parameters live, in which dtype, and the encoders' visits to the device."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fps_jax.checkpoints.format import load_component
from fps_jax.config import Component, WanConfig
from fps_jax.models.dit import build_dit, param_dtype
from fps_jax.models.image_encoder import build_image_encoder
from fps_jax.models.params import Build, Params, abstract_params, flatten, unflatten
from fps_jax.models.text_encoder import build_text_encoder
from fps_jax.models.vae import build_vae


def builds(config: WanConfig) -> dict[Component, Build]:
    """The model of each component, by the component's name."""
    models: dict[Component, Build] = {
        "text_encoder": build_text_encoder(config.text_encoder),
        "vae": build_vae(config.vae),
        "dit": build_dit(config.dit),
    }
    if config.image_encoder is None:
        return models
    return {"image_encoder": build_image_encoder(config.image_encoder), **models}


class visiting:  # noqa: N801  (reads as a phrase: `with visiting(params) as on_device`)
    """Parameters on the default device for the time of a block. Where that is the host's CPU they already are."""

    def __init__(self, params: Params):
        self.host = params

    def __enter__(self) -> Params:
        device = jax.local_devices()[0]
        self.on_device = self.host if _shares_host_memory(device) else jax.device_put(self.host, device)
        return self.on_device

    def __exit__(self, *_) -> None:
        if self.on_device is not self.host:
            jax.tree.map(lambda a: a.delete(), self.on_device)


def _shares_host_memory(device: Any) -> bool:
    return device.platform == "cpu"


# The encoders live in host memory, the DiT and the VAE on the device.
_ON_DEVICE = ("dit", "vae")


def _stored_dtype(name: str, path: str, dtype: Any) -> Any:
    """How the pipeline holds a parameter: `dtype` rules the DiT and the text encoder, the rest is float32."""
    if name == "dit":
        return param_dtype(path, dtype)
    return jnp.dtype(dtype if name == "text_encoder" else jnp.float32)


def restore(directory: pathlib.Path, build: Build, dtype: Any, shardings: Params | None = None) -> Params:
    """A component of our format, cast while it is read, straight to where it lives: as `shardings` says, or sampling wants it."""
    device = jax.local_devices()[0]
    on_device = directory.name in _ON_DEVICE or _shares_host_memory(device)
    where: Any = jax.sharding.SingleDeviceSharding(device) if on_device else None
    return load_component(
        directory,
        expected=abstract_params(build),
        dtype=lambda path: _stored_dtype(directory.name, path, dtype),
        shardings=where if shardings is None else dict(flatten(shardings)).__getitem__,
    )


def place(name: str, params: Params, dtype: Any) -> Params:
    """The same for NumPy arrays, leaf by leaf: no second copy of the component is ever held."""
    device = jax.local_devices()[0]
    on_device = name in _ON_DEVICE or _shares_host_memory(device)

    def put(path: str, leaf: np.ndarray) -> Any:
        leaf = leaf.astype(_stored_dtype(name, path, dtype), copy=False)
        return jax.device_put(leaf, device) if on_device else leaf

    leaves = dict(flatten(params))
    params.clear()
    return unflatten({path: put(path, leaves.pop(path)) for path in list(leaves)})


def place_shards(
    name: str,
    read: Callable[[str, tuple[slice, ...], np.dtype], np.ndarray],
    build: Build,
    dtype: Any,
    shardings: Params,
) -> Params:
    """A component on a mesh. Every process reads what its own devices hold, and has one device's part of one parameter in memory.

    Args:
      read: read(path, index, dtype) is the part of a parameter that `index` cuts out.
      shardings: of every parameter, nested as they are.
    """

    def put(path: str, shape: tuple[int, ...], sharding: Any) -> Any:
        devices: dict[tuple[slice, ...], list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            devices.setdefault(index, []).append(device)
        shards = []
        for index, holders in devices.items():
            part = read(path, index, _stored_dtype(name, path, dtype))
            # Copies, on a CPU too, where devices would share this buffer and donate it one by one
            shards += jax.block_until_ready([jax.device_put(part, device, may_alias=False) for device in holders])
            del part
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    where = dict(flatten(shardings))
    return unflatten({path: put(path, leaf.shape, where[path]) for path, leaf in flatten(abstract_params(build))})
