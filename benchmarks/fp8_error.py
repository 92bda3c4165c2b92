"""Error of FP8 attention in one layer, by what shares a scale of Q and K.

    python -m benchmarks.fp8_error     # about a minute on 2 cores

Gaussian q, k, v for a grid of (7, 18, 18) tokens, tile (7, 6, 6), 2 heads, head dim 128, whole-grid attention; logits of standard
deviation 2. 'outliers': four channels of a head 20 times as large in Q and K, as Wan's have some. The specification
(pallas_kernels.reference) against itself without rounding: relative L2 of the output, mean and deviation over 8 seeds.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import write
from fps_jax import AttentionPlan
from pallas_kernels import reference

GRID, TILE, HEADS, HEAD_DIM, SEEDS = (7, 18, 18), (7, 6, 6), 2, 128, 8
OUTLIERS = {"no outliers": (1, 1), "outliers in Q and K": (20, 20), "outliers in K": (1, 20)}
PLAN = AttentionPlan.build(GRID, TILE)


def operands(seed: int, q_size: float, k_size: float) -> list[jax.Array]:
    """q, k, v in tile order, q and k with outliers and logits of standard deviation 2."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, PLAN.layout.num_tokens, HEADS, HEAD_DIM)).astype(np.float32) for _ in range(3))
    channels = rng.permutation(HEAD_DIM)[:4]
    q[..., channels] *= q_size
    k[..., channels] *= k_size
    logits = np.einsum("bqnh,bknh->bnqk", q[:, :256], k) / np.sqrt(HEAD_DIM)
    q *= 2 / logits.std()
    return [PLAN.to_tiles(jnp.asarray(x)) for x in (q, k, v)]


@functools.partial(jax.jit, static_argnames="tokens_per_scale")
def attention(q, k, v, tokens_per_scale):
    return reference.attention(q, k, v, dataclasses.replace(PLAN.pattern, tokens_per_scale=tokens_per_scale))[0]


def main() -> None:
    stored = PLAN.layout.stored
    parts = {"a tile": 1, "half a tile": 2, "a quarter of a tile": 4}
    shared_by = {"the whole tensor": PLAN.layout.num_stored} | {what: stored // n for what, n in parts.items()}
    results = {}
    for name, sizes in OUTLIERS.items():
        errors: dict[str, list[float]] = {what: [] for what in (*shared_by, "bf16 inputs, no FP8")}
        for seed in range(SEEDS):
            x = operands(seed, *sizes)
            exact = attention(*x, tokens_per_scale=None)

            def error(out, exact=exact):
                return float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))

            for what, tokens in shared_by.items():
                errors[what].append(error(attention(*x, tokens_per_scale=tokens)))
            rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in x]
            errors["bf16 inputs, no FP8"].append(error(attention(*rounded, tokens_per_scale=None)))
        results[name] = {
            what: {"mean": round(float(np.mean(e)), 5), "deviation": round(float(np.std(e)), 5)}
            for what, e in errors.items()
        }
        print(name, results[name], flush=True)
    write(
        "fp8_error",
        {
            "claim": "with outlier channels, a scale per tile beats one per tensor, and more scales a tile beat one",
            "case": f"grid {GRID}, tile {TILE}, {HEADS} heads, head dim {HEAD_DIM}, logits of deviation 2, {SEEDS} seeds",
            "scale_of_q_and_k_shared_by": results,
        },
    )


if __name__ == "__main__":
    main()
