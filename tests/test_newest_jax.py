"""What has to hold on every jax that pyproject.toml allows: imports, a parity smoke, lowering for a GPU. See `make newest`."""

import functools

import jax
import jax.numpy as jnp

from fps_jax.dit import dit
from fps_jax.sampling import denoise
from fps_jax.solvers import solver_table
from tests.checkpoints import TINY, tiny_dit
from tests.fps_jax.test_dit import batch_of, outputs
from tests.reference import golden, rel_l2


def test_dit_parity():
    g = golden("dit_t2v_single")
    assert rel_l2(dit(TINY, tiny_dit(), *batch_of(g)).velocity, outputs(g)) <= 1e-5


def test_denoise_loop_runs_and_reports():
    seen = []
    noise = jax.random.normal(jax.random.key(0), (1, 16, 1, 4, 4))
    text = jnp.ones((1, 512, 32))
    out = denoise(
        TINY, tiny_dit(), noise, solver_table("unipc", "wan", 3, 3.0), text, 0 * text,
        guidance_scale=2.0, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert bool(jnp.isfinite(out).all())
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_dit_lowers_for_cuda():
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = jax.tree.map(lambda a: spec(a.shape), tiny_dit())
    fn = jax.jit(functools.partial(dit, TINY, dtype=jnp.bfloat16))
    lowered = fn.trace(params, spec((1, 16, 3, 4, 6)), spec((1,)), spec((1, 20, 32))).lower(
        lowering_platforms=("cuda",)
    )
    assert "stablehlo" in lowered.as_text()
