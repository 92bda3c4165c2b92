"""Which weights made something: a hash of what a model computes with."""

import hashlib

import numpy as np

from fps_jax.config import Component
from fps_jax.models.params import Params, flatten

VAE_ENCODER = ("encoder", "quant_conv")  # what of a VAE makes latents; the rest decodes them


def encoder_fingerprint(name: Component, params: Params) -> str:
    """Hash of what a component encodes with: of a VAE not its decoder, which may be trained further with latents as they are."""
    return params_fingerprint({part: params[part] for part in VAE_ENCODER} if name == "vae" else params)


def params_fingerprint(params: Params) -> str:
    """Hash of every parameter's path, dtype, shape and bytes, wherever they live; 16 hexadecimal digits.

    The same weights from another layout have the same one, as long as they are held in the same dtype.
    """
    digest = hashlib.sha256()
    for path, leaf in flatten(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]
