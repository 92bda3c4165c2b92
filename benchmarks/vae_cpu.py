"""Speed of the VAE decoder on a CPU, beside diffusers' AutoencoderKLWan in the same run.

    python benchmarks/vae_cpu.py --torch-python /path/to/python3.11   # with torch, diffusers

Wan's VAE at its real width, 9 frames of 240 x 416, float32, 2 threads. Needs 8 GB.
"""

import os
import pathlib
import sys

import numpy as np
from side_by_side import THREADS, compare, measure

LATENTS = (1, 16, 3, 30, 52)
ROOT = pathlib.Path(__file__).resolve().parent.parent


def _weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that depend on the key alone, at scales that keep activations near 1."""
    noise = np.random.default_rng(sum(ord(c) * (i + 1) for i, c in enumerate(key))).standard_normal(shape, np.float32)
    if key.endswith("gamma"):
        return 1 + 0.1 * noise
    return noise * np.float32(0.02 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5)


def _latents() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(LATENTS, np.float32)


def _ours(runs: int):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    import jax.numpy as jnp

    from fps_convert import mapping
    from fps_jax.config import WAN_T2V_1_3B
    from fps_jax.models.params import unflatten
    from fps_jax.models.vae import decode

    leaves = {}
    for row in mapping.rows("vae", WAN_T2V_1_3B):
        weight = _weight(row.keys["diffusers"], row.shapes["diffusers"])
        leaves[row.path] = jnp.asarray(mapping.to_ours(weight, row))
    params, latents = unflatten(leaves), _latents()
    return measure(lambda: decode(WAN_T2V_1_3B.vae, params, latents), runs)


def _torch(runs: int):
    import torch
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(THREADS)
    model = AutoencoderKLWan().eval()
    with torch.inference_mode():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_weight(key, tuple(parameter.shape))))
        mean, std = (
            torch.tensor(x).view(1, -1, 1, 1, 1) for x in (model.config.latents_mean, model.config.latents_std)
        )
        z = torch.from_numpy(_latents()) / (1 / std) + mean
        return measure(lambda: model.decode(z, return_dict=False)[0].permute(0, 2, 3, 4, 1).numpy(), runs)


if __name__ == "__main__":
    compare(
        __file__,
        claim="the VAE decoder on a CPU is at least 0.8 times as fast as diffusers' in torch",
        case="Wan's VAE at real width, decode of 3 latent frames to 9 frames of 240 x 416",
        ours=_ours,
        torch=_torch,
        packages=("torch", "diffusers"),
    )
