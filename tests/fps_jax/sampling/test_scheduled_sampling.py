"""Schedules inside the DiT, the sampler and the pipeline."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax import AttentionPlan, FPSSchedule, WanPipeline
from fps_jax.attention.attend import PlannedAttention
from fps_jax.attention.schedule import Regime
from fps_jax.models.dit import dit
from fps_jax.sampling import denoise
from fps_jax.sampling.guidance import Inputs
from tests.checkpoints import T2V, TINY, tiny_dit
from tests.reference import golden, rel_l2

CAT, NEGATIVE = "A cat walks in the snow.", "worst quality, low quality, static"
SIZE = {"height": 32, "width": 48, "num_frames": 9}
GRID = (3, 2, 3)
WHOLE = FPSSchedule(regimes=(Regime(until=1.0),))


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(T2V, dtype="float32")


@pytest.mark.parametrize("tile", [None, (2, 2, 2)])
def test_one_whole_grid_regime_without_quantization_is_the_dense_result(pipe, tile):
    g = golden("e2e_unipc6_cfg5")
    arguments = {
        "negative_prompt": NEGATIVE, "num_inference_steps": 6, "sigma_grid": "diffusers", "latents": g["in.latents"],
        "output_type": "latent", **SIZE,
    }  # fmt: skip
    dense = pipe(CAT, **arguments)
    out = pipe(CAT, attention="fps", schedule=dataclasses.replace(WHOLE, tile=tile), **arguments)
    assert rel_l2(out, dense) <= 1e-5
    assert rel_l2(out, g["out.latents"]) <= 1e-4, "and diffusers' own"


@pytest.mark.parametrize("remat", ["none", "attention"])
def test_the_dit_in_tile_order_is_the_dit_gradients_included(remat):
    grid, rng = (3, 4, 6), np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, tiny_dit())
    latents = jnp.asarray(rng.standard_normal((2, 16, grid[0], 2 * grid[1], 2 * grid[2]), np.float32))
    text = jnp.asarray(rng.standard_normal((2, 7, 32), np.float32))
    t = jnp.array([900.0, 100.5])

    def loss(params, latents, **attention):
        velocity = dit(TINY, params, latents, t, text, remat=remat, **attention).velocity
        return jnp.square(velocity).sum(), velocity

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, want), want_grads = jax.jit(both)(params, latents)
    plan = AttentionPlan.build(grid, (2, 3, 4), quantize=False)
    for implementation in ("auto", "portable"):
        planned = functools.partial(both, attention=PlannedAttention(plan, implementation=implementation))
        (_, got), grads = jax.jit(planned)(params, latents)
        assert rel_l2(got, want) <= 1e-5
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
            # keys' biases have no gradient at all (softmax ignores a shift): rounding there, not 0 / 0
            assert np.abs(a - b).max() <= 1e-4 * max(1e-3, np.abs(b).max())


def test_settings_differ_and_repeat(pipe):
    """On these three tiles every setting is its own approximation; the same seed gives the same bits."""
    schedule = FPSSchedule(
        tile=(1, 2, 3),
        regimes=(
            Regime(until=0.5, scales_per_tile=1, window=(1, 1, 1)),
            Regime(until=1.0, scales_per_tile=1, window=(2, 1, 1)),
        ),
    )
    arguments = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0, **SIZE}
    outs = {name: pipe(CAT, attention=name, schedule=schedule, **arguments) for name in ("fp8", "sparse", "fps")}
    outs["dense"] = pipe(CAT, **arguments)
    for name, out in outs.items():
        assert np.isfinite(out).all()
        for other, another in outs.items():
            assert (rel_l2(out, another) > 1e-4) == (name != other)
    np.testing.assert_array_equal(outs["fps"], pipe(CAT, attention="fps", schedule=schedule, **arguments))
    batched = pipe(CAT, attention="fps", schedule=schedule, batch_guidance=True, **arguments)
    assert rel_l2(batched, outs["fps"]) <= 1e-5


def test_dense_layers_at_every_layer_are_the_dense_model(pipe):
    schedule = FPSSchedule(
        tile=(1, 2, 3), dense_layers=(0, 1, 2), regimes=(Regime(until=1.0, scales_per_tile=1, window=(1, 1, 1)),)
    )
    arguments = {"num_inference_steps": 2, "output_type": "latent", **SIZE}
    dense = pipe(CAT, **arguments)
    assert rel_l2(pipe(CAT, attention="fps", schedule=schedule, **arguments), dense) <= 1e-5
    one = dataclasses.replace(schedule, dense_layers=(1,))
    none = dataclasses.replace(schedule, dense_layers=())
    errors = [rel_l2(pipe(CAT, attention="fps", schedule=s, **arguments), dense) for s in (one, none)]
    assert all(error > 1e-4 for error in errors)
    steps = dataclasses.replace(none, dense_steps=2)
    assert rel_l2(pipe(CAT, attention="fps", schedule=steps, **arguments), dense) <= 1e-5


def test_the_schedule_is_one_program_with_the_sampler(pipe, monkeypatch):
    """No call per regime or step: one dispatch of one compiled loop, and none of it compiled again for another seed."""
    calls = []
    compiled = denoise._denoise
    monkeypatch.setattr(denoise, "_denoise", lambda *a, **k: calls.append(1) or compiled(*a, **k))
    arguments = {"num_inference_steps": 4, "output_type": "latent", "attention": "fps", **SIZE}
    pipe(CAT, seed=1, **arguments)
    assert len(calls) == 1
    before = compiled._cache_size()
    pipe(CAT, seed=2, guidance_scale=4.0, schedule=FPSSchedule.default(GRID), **arguments)
    assert compiled._cache_size() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "flash"}, "attention='flash' is not one of 'dense', 'fp8', 'sparse', 'fps'"),
        ({"attention": "dense", "schedule": WHOLE}, "schedule was given, but attention='dense' follows none"),
        ({"attention": "fps", "schedule": 3}, "schedule=3 is not an FPSSchedule, the path of its JSON file or None"),
        (
            {"attention": "fps", "schedule": dataclasses.replace(WHOLE, grid=(21, 30, 52))},
            r"schedule is for a grid of \(21, 30, 52\) tokens and this video has \(3, 2, 3\)",
        ),
        (
            {"attention": "fps", "schedule": dataclasses.replace(WHOLE, dense_layers=(3,))},
            "dense_layers=.* names layer 3; the model has layers 0 to 2",
        ),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(pipe, arguments, message, monkeypatch):
    monkeypatch.setattr(WanPipeline, "_encode_prompts", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        pipe(CAT, **SIZE, **arguments)


def test_a_plan_for_another_grid_is_refused_by_the_model():
    with pytest.raises(
        ValueError, match=r"attention is planned for \(3, 4, 6\) tokens; these latents have \(3, 4, 4\)"
    ):
        dit(
            TINY, tiny_dit(), jnp.zeros((1, 16, 3, 8, 8)), jnp.zeros(1), jnp.zeros((1, 4, 32)),
            attention=PlannedAttention(AttentionPlan.build((3, 4, 6))),
        )  # fmt: skip


def test_segments_have_to_cover_the_steps():
    from fps_jax.sampling.solvers import solver_table

    with pytest.raises(ValueError, match="segments cover 3 steps of 4"):
        denoise.denoise(
            TINY, tiny_dit(), Inputs(jnp.zeros((1, 16, 3, 8, 8)), jnp.zeros((1, 4, 32))), solver_table("unipc", "wan", 4, 5.0),
            segments=((3, PlannedAttention(AttentionPlan.build((3, 4, 4)))),),
        )  # fmt: skip


def test_nan_in_a_layer_is_named_in_tile_order_too(pipe):
    params = jax.tree.map(lambda a: a, pipe.params["dit"])
    kernel = params["blocks"]["self_attn"]["v"]["kernel"]
    params["blocks"]["self_attn"]["v"] = {
        **params["blocks"]["self_attn"]["v"],
        "kernel": kernel.at[1, 0, 0].set(jnp.nan),
    }
    broken = dataclasses.replace(pipe, params={**pipe.params, "dit": params})
    with pytest.raises(FloatingPointError, match=r"step 1 of 2 .* first in block 1"):
        broken(CAT, attention="fps", num_inference_steps=2, output_type="latent", **SIZE)
