"""What taking the mean off K before it is rounded (`center_k`) gains in the output of FP8 attention.

    python -m benchmarks.center_k [MODEL]     # about two minutes on 2 cores; random weights where MODEL is left out

1. Synthetic: 7 x 18 x 18 tokens, tile (7, 6, 6), 2 heads of 128, Gaussian q, k and v, logits of deviation 2 but for what all keys
   share: a component of a given size, in deviations. Whole-grid attention; relative L2 from unrounded attention.
2. A model: errors of self-attention as fps-calibrate measures them, dense trajectory, whole-grid FP8; mean over steps and layers.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import functools
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import write
from fps_convert.small import write_small_checkpoint
from fps_jax import AttentionPlan, WanPipeline
from fps_jax.attention.tiles import TileLayout, propose_tiles
from fps_jax.sampling.request import Request
from fps_jax.tuning import calibration
from pallas_kernels import reference

GRID, TILE, HEADS, HEAD_DIM, SEEDS = (7, 18, 18), (7, 6, 6), 2, 128, 4
COMMON = (0.0, 0.5, 1.0, 2.0, 4.0, 16.0)
PLAN = AttentionPlan.build(GRID, TILE)


@functools.partial(jax.jit, static_argnames=("tokens_per_scale", "center_k"))
def attention(q, k, v, *, tokens_per_scale, center_k=False):
    pattern = dataclasses.replace(PLAN.pattern, tokens_per_scale=tokens_per_scale, center_k=center_k)
    return reference.attention(q, k, v, pattern)[0]


def synthetic() -> dict[str, Any]:
    table = {}
    for common in COMMON:
        errors: dict[bool, list[float]] = {False: [], True: []}
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            shape = (1, PLAN.layout.num_tokens, HEADS, HEAD_DIM)
            q, k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
            k += np.float32(common) * rng.choice([-1.0, 1.0], (1, 1, HEADS, HEAD_DIM)).astype(np.float32)
            q, k, v = (PLAN.to_tiles(jnp.asarray(x)) for x in (2 * q, k, v))
            exact = attention(q, k, v, tokens_per_scale=None)
            for center_k in errors:
                out = attention(q, k, v, tokens_per_scale=PLAN.layout.stored, center_k=center_k)
                errors[center_k].append(float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)))
        plain, centred = (round(float(np.mean(errors[c])), 5) for c in (False, True))
        table[f"{common:g}"] = {"error": plain, "error_with_center_k": centred, "gain": round(plain / centred, 3)}
        print(common, table[f"{common:g}"], flush=True)
    return table


def model(path: str) -> dict[str, Any]:
    request = Request(prompt="A cat walks in the snow.", height=64, width=96, num_frames=9, num_inference_steps=4)
    pipe = WanPipeline.from_pretrained(path, dtype="float32")
    prepared = pipe.prepare(request)
    grid = request.resolve(pipe.config).grid
    plans = calibration.candidates(TileLayout(grid, propose_tiles(grid)[0].tile), (1.0,), (False, True))
    errors = calibration.measure(
        pipe.config.dit, pipe.params["dit"], prepared.inputs, prepared.table, plans=plans, guidance_scale=5.0
    ).mean((0, 1))
    table = {plan.brief(): round(float(error), 5) for plan, error in zip(plans, errors, strict=True) if plan.quantize}
    print(table, flush=True)
    return table


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = sys.argv[1] if len(sys.argv) > 1 else f"{folder}/small"
        if len(sys.argv) < 2:
            write_small_checkpoint(pathlib.Path(path))
        measured = model(path)
    write(
        "center_k",
        {
            "claim": "center_k costs nothing where keys share nothing, and spares what rounding of the shared part would cost",
            "case": f"grid {GRID}, tile {TILE}, one scale a tile, {HEADS} heads of {HEAD_DIM}, {SEEDS} seeds",
            "common_component_in_deviations": synthetic(),
            "model": {"checkpoint": pathlib.Path(path).name, "size": "64 x 96, 9 frames, 4 steps", **measured},
        },
    )


if __name__ == "__main__":
    main()
