"""Attention: the only place that chooses an implementation."""

from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Scores held at a time off the GPU: memory stays linear in tokens, and more gains nothing (2 to 128 MB are alike on a CPU).
_CHUNK_BYTES = 64 * 2**20


class Attend(Protocol):
    """What a DiT block calls for self-attention. Shapes `[B, S, N, H]`; softmax scale H**-0.5; output in q's dtype."""

    def __call__(self, q: Array, k: Array, v: Array, /) -> Array: ...


def dense_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B K N H"],
    v: Float[Array, "B K N H"],
    key_mask: Bool[Array, "B K"] | None = None,
) -> Float[Array, "B Q N H"]:
    """Softmax attention over all keys, scale H**-0.5, softmax in float32, output in q's dtype.

    cuDNN's fused kernel for 16-bit inputs on a GPU; elsewhere plain XLA over chunks of queries, so that memory stays linear
    in tokens. `key_mask` (true: attend) hides padded keys.
    """
    if _platform() in ("gpu", "cuda") and q.dtype in (jnp.bfloat16, jnp.float16):
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return _chunked(q, k, v, key_mask)


def _platform() -> str:
    """Of the default device: also one that is only described, when a program is compiled ahead of time for it."""
    device = jax.config.jax_default_device
    return device if isinstance(device, str) else device.platform if device is not None else jax.default_backend()


def _chunked(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    chunk = max(64, _CHUNK_BYTES // (4 * keys * heads * batch))
    k = k.transpose(0, 2, 3, 1)  # [B, N, H, K]: matmul-ready once, not once a chunk
    v = v.transpose(0, 2, 1, 3)
    bias = None if key_mask is None else jnp.where(key_mask, 0.0, -jnp.inf).astype(jnp.float32)[:, None, None, :]

    def attend(block):  # [B, N, q, H]
        scores = jnp.matmul(block, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        if bias is not None:
            scores = scores + bias
        scores = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = jnp.matmul(scores.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / scores.sum(-1, keepdims=True)).astype(q.dtype)

    if queries <= chunk:
        return attend(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    num_chunks = -(-queries // chunk)
    chunk = -(-queries // num_chunks)
    padded = jnp.pad(q, ((0, 0), (0, num_chunks * chunk - queries), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, num_chunks, chunk, heads, head_dim).transpose(1, 0, 3, 2, 4)
    out = jax.lax.map(attend, blocks)  # [C, B, N, q, H]
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, head_dim)[:, :queries]
