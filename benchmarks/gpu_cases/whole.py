"""A whole diffusion transformer with random weights: one velocity by each regime, and a denoising loop with guidance."""

import functools
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_cases.programs import reference_file
from benchmarks.gpu_cases.results import NOT_MEASURED
from benchmarks.gpu_cases.weights import random_params
from fps_jax.attention.attend import PlannedAttention
from fps_jax.attention.schedule import FPSSchedule
from fps_jax.config import WAN_T2V_1_3B, WAN_T2V_14B, DiTConfig
from fps_jax.models.dit import DENSE, build_dit, dit, param_dtype
from fps_jax.models.params import Params, abstract_params, flatten, unflatten
from fps_jax.sampling.denoise import denoise
from fps_jax.sampling.guidance import Inputs
from fps_jax.sampling.solvers import solver_table
from fps_jax.sizes import latent_grid, token_grid
from fps_jax.tuning.timing import summary

_MODELS = {"1.3B": (WAN_T2V_1_3B, 480, 832), "14B": (WAN_T2V_14B, 720, 1280)}
_BF16 = jnp.dtype(jnp.bfloat16)
_ROUNDS = 3
_PATIENCE = 50  # seconds to wait for a CPU's result


def _model(toy: bool, model: str) -> tuple[DiTConfig, tuple[int, int, int]]:
    """(config, latent frames, rows and columns)."""
    config, height, width = _MODELS[model]
    if toy:
        small = DiTConfig(
            task="t2v", dim=128, num_heads=1, num_layers=1, mlp_dim=128, text_dim=32, freq_dim=32, text_len=8
        )  # fmt: skip
        return small, (4, 16, 32)
    return config.dit, latent_grid(height, width, 81)


def _shapes(config: DiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    weights = flatten(abstract_params(build_dit(config)))
    return {path: jax.ShapeDtypeStruct(leaf.shape, param_dtype(path, _BF16)) for path, leaf in weights}


@functools.lru_cache(maxsize=1)
def _params(config: DiTConfig) -> Params:
    return random_params(_shapes(config))


def _attention(toy: bool, grid: tuple[int, int, int], regime: int | None) -> Any:
    if regime is None:
        return DENSE
    return PlannedAttention(FPSSchedule.default(grid).plans(grid)[regime], implementation="portable" if toy else "auto")


def velocity(toy: bool, *, model: str, regime: int | None) -> Iterator[dict[str, Any] | None]:
    """One evaluation, batch 1, 512 text tokens. `regime`: of the default schedule; None for dense attention (cuDNN)."""
    config, (frames, rows, columns) = _model(toy, model)
    grid = token_grid((frames, rows, columns))
    attention = _attention(toy, grid, regime)
    latents = jax.ShapeDtypeStruct((1, 16, frames, rows, columns), jnp.float32)
    text = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), _BF16)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)

    def run(params: Params, latents: Any, t: Any, text: Any) -> Any:
        out = dit(config, params, latents, t, text, dtype=_BF16, attention=attention)
        return out.velocity, out.first_bad

    yield None
    # Compiled in its own turn: XLA times matmuls to choose among them, which would disturb what others measure.
    start = time.perf_counter()
    compiled = jax.jit(run).lower(unflatten(_shapes(config)), latents, t, text).compile()
    yield {"part": "compiled", "took": time.perf_counter() - start}
    params = _params(config)
    x = jax.random.normal(jax.random.key(1), latents.shape)
    states = jax.random.normal(jax.random.key(2), text.shape, _BF16)
    times = []
    for _ in range(1 if toy else _ROUNDS + 1):
        start = time.perf_counter()
        _, bad = jax.block_until_ready(compiled(params, x, jnp.full((1,), 500.0), states))
        times.append(time.perf_counter() - start)
        yield {"part": "round", "ok": int(bad) == -1}
    timing = {"seconds": NOT_MEASURED} if toy else summary(times[1:], 1)
    plan = None if regime is None else attention.plan
    yield {
        "part": "velocity", "tokens": int(np.prod(grid)), "window": None if plan is None else plan.window,
        "density": 1.0 if plan is None else plan.density, "scales": None if plan is None else plan.scales_per_tile,
        **timing,
    }  # fmt: skip


def video(toy: bool, *, model: str, steps: int, attention: str) -> Iterator[dict[str, Any] | None]:
    """The denoising loop of so many UniPC steps with guidance. `attention`: dense or fps, by the default schedule."""
    config, (frames, rows, columns) = _model(toy, model)
    steps = 2 if toy else steps
    grid = token_grid((frames, rows, columns))
    table = solver_table("unipc", "wan", steps, 5.0)
    segments = None
    if attention == "fps":
        segments = FPSSchedule.default(grid).segments(table.sigma, 5.0, grid, config.num_layers)
    yield None
    params = _params(config)
    noise = jax.random.normal(jax.random.key(1), (1, 16, frames, rows, columns))
    text, negative = (
        jax.random.normal(jax.random.key(i), (1, config.text_len, config.text_dim), _BF16) for i in (2, 3)
    )
    times, out = [], None
    for name in ("first, with compilation", "again"):
        yield {"part": f"starting: {name}"}
        start = time.perf_counter()
        out = denoise(
            config, params, Inputs(noise, text, negative), table, guidance_scale=5.0, dtype=_BF16, segments=segments
        ).block_until_ready()
        times.append(time.perf_counter() - start)
    yield {
        "part": "denoise",
        "ok": bool(jnp.isfinite(out).all()),
        "steps": steps,
        "segments": None if segments is None else [n for n, _ in segments],
        "seconds": NOT_MEASURED if toy else times[1],
        "first_seconds": NOT_MEASURED if toy else times[0],
    }


def pipeline(toy: bool, *, attention: str, dtype: str) -> Iterator[dict[str, Any] | None]:
    """The small checkpoint's latents here beside those of a CPU, from one seed. In float32 they differ by rounding only."""
    if toy:
        latents = small_latents(attention, dtype)
    else:
        path = reference_file(f"pipeline {attention} {dtype}.npy", _PATIENCE)
        latents = None if path is None else np.load(path)
    yield None
    yield {"part": "starting"}
    if latents is None:
        yield {"not available": "the CPU hasn't finished"}
        return
    got = small_latents(attention, dtype)
    error = float(np.linalg.norm(got - latents) / np.linalg.norm(latents))
    yield {"part": f"{attention} {dtype}", "ok": bool(np.isfinite(got).all()) and error < 0.1, "rel_l2_to_cpu": error}


def small_latents(attention: str, dtype: str) -> np.ndarray:
    """Four steps of the small checkpoint with random weights."""
    from fps_convert.small import write_small_checkpoint
    from fps_jax.sampling.pipeline import WanPipeline

    with tempfile.TemporaryDirectory() as folder:
        write_small_checkpoint(pathlib.Path(folder) / "small")
        pipe = WanPipeline.from_pretrained(pathlib.Path(folder) / "small", dtype=dtype)
    pipe.show_progress = False
    return pipe(
        "A cat walks in the snow.", height=128, width=256, num_frames=17, num_inference_steps=4, output_type="latent",
        attention=attention,
    )  # fmt: skip
