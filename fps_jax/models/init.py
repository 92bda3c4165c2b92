"""Parameters to train a model from scratch. A checkpoint's come from `fps_jax.checkpoints`; `init_params` are for tests of shapes.

Sources: Wan-Video/Wan2.1 wan/modules/model.py (WanModel.init_weights); adaLN-zero is DiT's (arXiv 2212.09748, section 3.2);
that images come first and are inflated in time is how Wan's VAE was trained (arXiv 2503.20314). That heads start by looking at
neighbours is this project's; a like start helps small vision transformers (arXiv 2103.10697).
"""

import math
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from fps_jax.config import DiTConfig, VAEConfig
from fps_jax.models.dit import build_dit
from fps_jax.models.params import Params, abstract_params, flatten, unflatten
from fps_jax.models.rope import axis_frequencies
from fps_jax.models.vae import build_vae

_EMBEDDING_STD = 0.02
# Of a new VAE's latents: a deviation of 0.05, beside which what is coded can be seen from the first step
_LOG_VARIANCE = -6.0
_ZERO = re.compile(r"^time_projection/|^head/|/bias$|^image_embedding/positions$")
_EMBEDDING = re.compile(r"^(text|time)_embedding/.*kernel$")
_SELF_ATTENTION_NORM = re.compile(r"^blocks/self_attn/norm_[qk]/scale$")
_SLOWEST = 0.1  # radians a token: slower pairs of RoPE hardly tell a neighbour from another
# Where a head starts to look, as (frame, row, column) from a token: one after the other over heads and layers.
_OFFSETS = (
    (0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (1, 0, 1), (1, 0, -1), (-1, 0, 1),
    (-1, 0, -1), (1, 1, 0), (1, -1, 0), (-1, 1, 0), (-1, -1, 0),
)  # fmt: skip
_GATES = [2, 5]  # of a block's modulation: [shift, scale, gate] of self-attention, then of the MLP


def init_dit_for_training(config: DiTConfig, key: jax.Array, *, gate: float = 1.0, locality: float = 1.5) -> Params:
    """Random parameters of a DiT to be trained from scratch. Pure: `jax.jit` with `out_shardings` makes a large one in place.

    As Wan's own: linear layers Xavier-uniform, text and time embeddings normal with deviation 0.02, biases 0, norms 1. Apart
    from it, adaLN-zero: the time projection, all modulations and the whole head are 0, so that no block starts with random
    shifts and scales (Wan starts those at deviation 1 / sqrt(D)), and the velocity starts as 0.

    Step by step: at 0 a head of zeros lets no gradient through, and learns alone. From 1 on gradients reach the blocks: with
    gate=1 all of them, with gate=0 what has no gate (cross-attention, embeddings) and the gates themselves; self-attention
    and MLP follow at 2.

    Heads of self-attention start local: biases of q and k, which RoPE turns by a token's place, make the score of two tokens
    largest where they lie at an offset of the head's own, itself or one of 14 neighbours in the frame and the ones beside it. So
    what is beside what needn't be found in noise. The norms of q and k start at the same number, to make it count.

    Args:
      gate: what the blocks' gates start at. 1: a plain pre-norm transformer, from which small models learn at once. 0: DiT's
        adaLN-zero, where every block starts as its cross-attention alone; steadier for deep ones.
      locality: of those biases, where x W has deviation 1, and of the norms. 0: biases 0 and norms 1, as Wan's own.
    Returns: float32, the tree of `build_dit(config)`. A parameter's values are a function of (key, path, shape) alone.
    """
    leaves = {}
    for path, spec in flatten(abstract_params(build_dit(config))):
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        leaves[path] = _initial(path, spec.shape, own, gate)
        if locality and _SELF_ATTENTION_NORM.search(path):
            leaves[path] = locality * leaves[path]
    if locality:
        q, k = _local_biases(config)
        leaves["blocks/self_attn/q/bias"] = jnp.asarray(locality * q)
        leaves["blocks/self_attn/k/bias"] = jnp.asarray(locality * k)
    return unflatten(leaves)


def _local_biases(config: DiTConfig) -> tuple[np.ndarray, np.ndarray]:
    """Biases `[L, D]` of q and k, of one frequency pair of RoPE each 1 or 0 long.

    A pair's part of the score of tokens at i and j is cos(w (i - j) + turn), largest at j = i + offset for turn = w offset.
    """
    shape = (config.num_layers, config.num_heads, config.head_dim // 2, 2)
    q, k = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for number, (layer, head) in enumerate(np.ndindex(shape[:2])):
        first = 0
        for frequencies, offset in zip(
            axis_frequencies(config.head_dim), _OFFSETS[number % len(_OFFSETS)], strict=True
        ):
            pairs = slice(first, first + len(frequencies))
            turn, seen = frequencies * offset, frequencies > _SLOWEST
            q[layer, head, pairs] = np.stack([np.cos(turn), np.sin(turn)], axis=-1) * seen[:, None]
            k[layer, head, pairs, 0] = seen
            first += len(frequencies)
    return q.reshape(config.num_layers, -1), k.reshape(config.num_layers, -1)


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
