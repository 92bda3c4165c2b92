"""Sliding-tile attention by its definition: NumPy, float64, token by token in raster order. Shares no code with the product."""

import itertools
import math

import numpy as np


def attended(grid, tile, window) -> np.ndarray:
    """bool `[S, S]`: does query token i attend key token j."""
    tiles = [math.ceil(n / t) for n, t in zip(grid, tile, strict=True)]
    cells = [tuple(c // t for c, t in zip(place, tile, strict=True)) for place in itertools.product(*map(range, grid))]

    def reaches(query, key):
        for q, k, n, width in zip(query, key, tiles, window, strict=True):
            w = min(width, n)
            first = min(max(q - w // 2, 0), n - w)
            if not first <= k < first + w:
                return False
        return True

    return np.array([[reaches(q, k) for k in cells] for q in cells])


def attention(q, k, v, mask) -> np.ndarray:
    """Softmax attention `[B, S, N, H]` in float64; mask `[S, S]` or `[N, S, S]`."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(mask, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnqk,bknh->bqnh", p / p.sum(-1, keepdims=True), v)


def gradients(q, k, v, mask, d_out) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of sum(attention * d_out) in q, k and v, float64, from the formulas of softmax attention."""
    q, k, v, d_out = (np.asarray(a, np.float64) for a in (q, k, v, d_out))
    scale = 1 / math.sqrt(q.shape[-1])
    scores = np.where(mask, np.einsum("bqnh,bknh->bnqk", q, k) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bqnh,bknh->bnqk", d_out, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bnqk,bknh->bqnh", ds, k),
        np.einsum("bnqk,bqnh->bknh", ds, q),
        np.einsum("bnqk,bqnh->bknh", p, d_out),
    )
