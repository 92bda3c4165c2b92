"""What has to hold on every jax that pyproject.toml allows: imports, a parity smoke, lowering for a GPU. See `make newest`."""

import functools

import jax
import jax.numpy as jnp

from fps_jax import AttentionPlan, attend
from fps_jax.models.dit import dit
from fps_jax.sampling.denoise import denoise
from fps_jax.sampling.guidance import Inputs
from fps_jax.sampling.solvers import solver_table
from tests.checkpoints import TINY, tiny_dit
from tests.fps_jax.models.test_dit import batch_of, outputs
from tests.reference import golden, rel_l2


def test_dit_parity():
    g = golden("dit_t2v_single")
    assert rel_l2(dit(TINY, tiny_dit(), *batch_of(g)).velocity, outputs(g)) <= 1e-5


def test_denoise_loop_runs_and_reports():
    seen = []
    noise = jax.random.normal(jax.random.key(0), (1, 16, 1, 4, 4))
    text = jnp.ones((1, 512, 32))
    out = denoise(
        TINY, tiny_dit(), Inputs(noise, text, 0 * text), solver_table("unipc", "wan", 3, 3.0),
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


def test_fp8_sparse_attention_agrees_with_its_specification_and_lowers_for_cuda():
    plan = AttentionPlan.build((3, 4, 6), (2, 2, 3), (1, 2, 1))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (plan.to_tiles(jax.random.normal(key, (1, 72, 2, 32))) for key in keys)

    def both(implementation):
        run = functools.partial(attend, plan=plan, implementation=implementation)
        out, vjp = jax.vjp(run, q, k, v)
        return out, *vjp(d_out)

    for ours, specified in zip(both("portable"), both("reference"), strict=True):
        assert rel_l2(ours, specified) <= 2e-3
    spec = jax.ShapeDtypeStruct(q.shape, jnp.bfloat16)
    traced = jax.jit(jax.grad(lambda *x: attend(*x, plan=plan).astype(jnp.float32).sum())).trace(spec, spec, spec)
    assert "stablehlo" in traced.lower(lowering_platforms=("cuda",)).as_text()
