"""Parameters to train a model from scratch. A checkpoint's come from `fps_jax.checkpoints`; `init_params` are for tests of shapes.

Sources: Wan-Video/Wan2.1 wan/modules/model.py (WanModel.init_weights); adaLN-zero is DiT's (arXiv 2212.09748, section 3.2);
that images come first and are inflated in time is how Wan's VAE was trained (arXiv 2503.20314).
"""

import math
import re
import zlib

import jax
import jax.numpy as jnp

from fps_jax.config import DiTConfig, VAEConfig
from fps_jax.models.dit import build_dit
from fps_jax.models.params import Params, abstract_params, flatten, unflatten
from fps_jax.models.vae import build_vae

_EMBEDDING_STD = 0.02
_LOG_VARIANCE = (
    -6.0
)  # of a new VAE's latents: a deviation of 0.05, beside which what is coded can be seen from the first step
_ZERO = re.compile(r"^time_projection/|^head/|/bias$|^image_embedding/positions$")
_EMBEDDING = re.compile(r"^(text|time)_embedding/.*kernel$")
_GATES = [2, 5]  # of a block's modulation: [shift, scale, gate] of self-attention, then of the MLP


def init_dit_for_training(config: DiTConfig, key: jax.Array, *, gate: float = 1.0) -> Params:
    """Random parameters of a DiT to be trained from scratch. Pure: `jax.jit` with `out_shardings` makes a large one in place.

    As Wan's own: linear layers Xavier-uniform, text and time embeddings normal with deviation 0.02, biases 0, norms 1. Apart
    from it, adaLN-zero: the time projection, all modulations and the whole head are 0, so that no block starts with random
    shifts and scales (Wan starts those at deviation 1 / sqrt(D)), and the velocity starts as 0.

    Step by step: at 0 a head of zeros lets no gradient through, and learns alone. From 1 on gradients reach the blocks: with
    gate=1 all of them, with gate=0 what has no gate (cross-attention, embeddings) and the gates themselves; self-attention
    and MLP follow at 2.

    Args:
      gate: what the blocks' gates start at. 1: a plain pre-norm transformer, from which small models learn at once. 0: DiT's
        adaLN-zero, where every block starts as its cross-attention alone; steadier for deep ones.
    Returns: float32, the tree of `build_dit(config)`. A parameter's values are a function of (key, path, shape) alone.
    """
    leaves = {}
    for path, spec in flatten(abstract_params(build_dit(config))):
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        leaves[path] = _initial(path, spec.shape, own, gate)
    return unflatten(leaves)


def _initial(path: str, shape: tuple[int, ...], key: jax.Array, gate: float) -> jax.Array:
    if path == "blocks/modulation":  # [L, 6, D]
        return jnp.zeros(shape).at[:, jnp.array(_GATES)].set(gate)
    if _ZERO.search(path):
        return jnp.zeros(shape)
    if path.endswith("/scale"):
        return jnp.ones(shape)
    if _EMBEDDING.search(path):
        return _EMBEDDING_STD * jax.random.normal(key, shape)
    if not path.endswith("/kernel"):
        raise NotImplementedError(f"no initial value is known for {path!r}; add it to {__name__}")
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5  # a leading axis is layers
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def init_vae_for_training(config: VAEConfig, key: jax.Array) -> Params:
    """Random parameters of a VAE to be trained from scratch, on images or on video: an image VAE, inflated in time.

    A causal convolution has random numbers (LeCun-normal, for one frame) in its last tap, that of the newest frame, and 0 in the
    taps of earlier frames. The convolutions that halve or double the frame rate pass the newest frame on. So a clip is coded frame
    by frame: latent frame j is the image 4 j, and decodes to it four times over. Training on single images moves the last taps
    alone (the others get a gradient of 0), so that an image VAE stays such a video VAE, from which video training goes on.

    The log-variance of every latent starts at -6, whatever the video, and not normalised.

    Returns: float32, the tree of `build_vae(config)`.
    """
    leaves = {}
    for path, spec in flatten(abstract_params(build_vae(config))):
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        leaves[path] = _initial_vae(path, spec.shape, own)
    return unflatten(leaves)


def _initial_vae(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    if path == "quant_conv/bias":  # [2 Z]: means, then log-variances
        return jnp.zeros(shape).at[shape[0] // 2 :].set(_LOG_VARIANCE)
    if not path.endswith("/kernel"):
        return jnp.ones(shape) if path.endswith("/scale") else jnp.zeros(shape)
    if "/time_conv/" in path:  # [3, 1, 1, C, C or 2 C]
        newest = jnp.tile(jnp.eye(shape[-2]), (1, shape[-1] // shape[-2]))
        return jnp.zeros(shape).at[-1, 0, 0].set(newest)
    causal = len(shape) == 5 and shape[0] == 3
    frame = shape[1:] if causal else shape
    fan_in = math.prod(frame[:-1])
    kernel = jax.random.normal(key, frame) / fan_in**0.5
    if path == "quant_conv/kernel":
        kernel = kernel.at[..., frame[-1] // 2 :].set(0.0)
    return jnp.zeros(shape).at[-1].set(kernel) if causal else kernel
