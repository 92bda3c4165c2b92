"""Few-step sampling and named levels against diffusers and the distilled models' own arithmetic (tests/make_golden_few_step.py)."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from fps_jax import FPSSchedule, Regime, WanPipeline
from fps_jax.config import WAN_T2V_1_3B
from fps_jax.sampling.denoise import _denoise, denoise
from fps_jax.sampling.flow import explicit_grid, shift_sigma
from fps_jax.sampling.presets import PRESETS
from fps_jax.sampling.request import Request
from fps_jax.sampling.solvers import coefficients
from tests.checkpoints import T2V
from tests.reference import golden, rel_l2

CAT, NEGATIVE = "A cat walks in the snow.", "worst quality, low quality, static"
SIZE = {"height": 32, "width": 48, "num_frames": 9}
SIGMAS = [1.0, 0.85, 0.6, 0.2]
CASES = {
    "lcm": {"solver": "lcm", "sigma_grid": "diffusers", "num_inference_steps": 4, "flow_shift": 5.0, "guidance_scale": 1.0},
    "lcm_guided": {
        "solver": "lcm", "sigma_grid": "diffusers", "num_inference_steps": 3, "flow_shift": 3.0, "guidance_scale": 4.0
    },
    "few_step": {"preset": "few-step"},
    "dmd": {"preset": "dmd"},
    "lcm_sigmas": {"solver": "lcm", "sigmas": SIGMAS, "guidance_scale": 1.0},
    "euler_sigmas": {"solver": "euler", "sigmas": SIGMAS, "guidance_scale": 1.0},
    "unipc_sigmas": {"solver": "unipc", "sigmas": SIGMAS, "guidance_scale": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(T2V, dtype="float32")


@pytest.mark.parametrize("name", CASES)
def test_latents_match_the_original_on_its_noise(pipe, name):
    g = golden("few_step")
    request = Request(prompt=CAT, negative_prompt=NEGATIVE, latents=g["in.latents"], **CASES[name], **SIZE)
    prepared = pipe.prepare(request)
    table, steps = prepared.table, len(g[f"{name}.timesteps"])
    np.testing.assert_allclose(table.sigma, g[f"{name}.sigmas"][:-1], rtol=1e-7)
    np.testing.assert_allclose(table.timestep, g[f"{name}.timesteps"], rtol=1e-7)
    inputs = prepared.inputs
    if table.renoise is not None:
        noise = np.concatenate([g["in.step_noise"][: steps - 1], np.zeros_like(g["in.step_noise"][:1])])
        assert np.shape(inputs.step_noise) == noise.shape
        inputs = inputs._replace(step_noise=noise)
    out = denoise(
        pipe.config.dit, pipe.params["dit"], inputs, table, guidance_scale=prepared.guidance_scale, dtype=pipe.dtype
    )
    assert rel_l2(out, g[f"{name}.latents"][-1]) <= 1e-5


def test_causvid_is_sampled_as_dmd_and_the_level_of_757_is_looked_up():
    """CausVid's step list, look-up and shift are those that FastVideo took over: 757 is level 280 of 1000, 0.756757."""
    causvid, dmd = (Request(prompt="x", preset=name).resolve(WAN_T2V_1_3B) for name in ("causvid", "dmd"))
    np.testing.assert_array_equal(causvid.table.sigma, dmd.table.sigma)
    np.testing.assert_array_equal(causvid.table.timestep, np.float32([1000, 757, 522]))
    want = shift_sigma(np.array([1.0, 0.28, 0.12]), 8.0)
    np.testing.assert_allclose(causvid.table.sigma, want, rtol=1e-7)
    assert abs(causvid.table.sigma[1] - 0.757) > 2e-4


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "lcm"])
def test_every_solver_takes_levels_and_tells_the_model_its_own_way(solver):
    grid = explicit_grid(solver, 5.0, sigmas=[0.9996, 0.5])
    assert grid.timesteps.tolist() == ([999, 500] if solver in ("unipc", "dpm++") else [np.float32(999.6), 500])
    np.testing.assert_array_equal(grid.sigmas, np.float32([0.9996, 0.5, 0]))  # not shifted
    with pytest.raises(ValueError, match="sigmas and timesteps are both given"):
        explicit_grid(solver, 1.0, sigmas=[1.0], timesteps=[1000])
    told = explicit_grid(solver, 1.0, timesteps=[1000, 999, 1])
    assert told.timesteps.tolist() == [1000, 999, 1]
    np.testing.assert_allclose(told.sigmas, [1 - 1e-6 * (solver == "unipc"), 0.999, 0.001, 0], rtol=1e-7)
    assert all(np.isfinite(column).all() for column in coefficients(solver, told) if column is not None)


def test_the_added_noise_is_of_sample_and_step_alone():
    shape = (2, 16, 2, 4, 6)
    both = Request(prompt=["a", "b"], seed=[7, 3], preset="dmd").step_noise(shape, 3)
    assert both.shape == (3, *shape)
    own = Request(prompt="b", seed=3).step_noise((1, *shape[1:]), 5)
    np.testing.assert_array_equal(both[:2, 1], own[:2, 0])
    assert not np.any(both[-1])
    draws = [*own[:-1, 0], Request(prompt="b", seed=3).noise((1, *shape[1:]))[0], both[0, 0]]
    close = np.corrcoef(np.stack([np.ravel(draw) for draw in draws])) - np.eye(len(draws))
    assert np.abs(close).max() < 5 / np.sqrt(np.size(draws[0]))  # five deviations of a chance correlation
    # as documented, so that another program can draw it
    want = jax.random.normal(jax.random.fold_in(jax.random.key(3), 1), shape[1:])
    np.testing.assert_array_equal(own[1, 0], want)


def sample(pipe, prompt=CAT, **arguments):
    """What the pipeline does, with the programs of the cases above."""
    p = pipe.prepare(Request(prompt=prompt, **arguments, **SIZE))
    return np.asarray(denoise(pipe.config.dit, pipe.params["dit"], p.inputs, p.table, guidance_scale=p.guidance_scale))


def test_noise_is_of_the_seed_whatever_jax_draws_by_default():
    request = Request(prompt="x", seed=5)
    shape = (1, 16, 1, 2, 2)
    want = request.noise(shape), request.step_noise(shape, 2)
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        np.testing.assert_array_equal(request.noise(shape), want[0])
        np.testing.assert_array_equal(request.step_noise(shape, 2), want[1])


def test_a_few_step_sample_depends_on_its_own_seed_and_repeats(pipe):
    two, one = sample(pipe, [CAT, CAT], preset="dmd", seed=7), sample(pipe, preset="dmd", seed=8)
    np.testing.assert_allclose(one[0], two[1], atol=2e-5)
    np.testing.assert_array_equal(sample(pipe, preset="dmd", seed=8), one)
    given = sample(pipe, preset="dmd", seed=9, latents=Request(prompt=CAT, seed=8).noise(one.shape))
    assert rel_l2(given, one) > 1e-2  # the seed is also that of the added noise


def test_presets_with_as_many_steps_share_a_program(pipe):
    sample(pipe, preset="dmd")
    before = _denoise._cache_size()
    sample(pipe, preset="few-step", num_inference_steps=3, flow_shift=3.0)
    sample(pipe, preset="causvid", seed=1)
    assert _denoise._cache_size() == before


def test_step_noise_that_is_missing_is_named(pipe):
    prepared = pipe.prepare(Request(prompt=CAT, preset="dmd", **SIZE))
    with pytest.raises(ValueError, match=r"step_noise has shape None; .* needs \(3, 1, 16, 3, 4, 6\)"):
        denoise(pipe.config.dit, {}, prepared.inputs._replace(step_noise=None), prepared.table)


def test_what_is_given_wins_over_the_preset():
    resolved = Request(prompt="x", preset="few-step", solver="euler", flow_shift=3.0).resolve(WAN_T2V_1_3B)
    assert resolved.settings == dataclasses.replace(PRESETS["few-step"], solver="euler", flow_shift=3.0)
    levels = Request(prompt="x", preset="dmd", sigmas=(0.9, 0.4)).resolve(WAN_T2V_1_3B)
    assert (levels.settings.solver, levels.settings.num_inference_steps, levels.settings.timesteps) == ("lcm", 2, None)
    grid = Request(prompt="x", preset="few-step", num_inference_steps=6).resolve(WAN_T2V_1_3B)
    assert len(grid.table.sigma) == 6
    assert grid.flow_shift == 5.0


def test_a_checkpoints_preset_holds_until_the_request_has_one():
    distilled = dataclasses.replace(WAN_T2V_1_3B, preset="dmd")
    own = Request(prompt="x").resolve(distilled)
    assert own.preset == "dmd"
    assert own.settings == PRESETS["dmd"]
    assert own.flow_shift == 8.0
    usual = Request(prompt="x", preset="wan").resolve(distilled)
    assert len(usual.table.sigma) == 50
    assert usual.flow_shift == distilled.flow_shift
    with pytest.raises(
        ValueError, match="num_inference_steps=4 where preset='dmd' has timesteps of its own, 3 of them"
    ):
        Request(prompt="x", num_inference_steps=4).resolve(distilled)


def test_guidance_above_one_on_a_distilled_model_is_done_and_remarked(pipe, caplog):
    with caplog.at_level(logging.WARNING, "fps_jax"):
        assert pipe.prepare(Request(prompt=CAT, preset="dmd", **SIZE)).inputs.negative is None
        assert not caplog.records
        assert pipe.prepare(Request(prompt=CAT, preset="dmd", guidance_scale=3.0, **SIZE)).inputs.negative is not None
    assert "guidance_scale=3 with preset 'dmd': distilled models have guidance in them" in caplog.text


def test_a_schedule_goes_by_the_noise_of_named_levels():
    """0.756757 at shift 8 is training level 280: progress 0.72, although it is the second of three steps."""
    schedule = FPSSchedule(
        regimes=(Regime(until=0.71), Regime(until=0.8, scales_per_tile=1), Regime(until=1.0, density=0.5))
    )
    size = {"prompt": "x", "height": 64, "width": 64, "num_frames": 9, "schedule": schedule}
    dmd = Request(**size, preset="dmd").resolve(WAN_T2V_1_3B).segments
    assert dmd is not None
    assert [count for count, _ in dmd] == [1, 1, 1]
    late = Request(**size, sigmas=(0.5, 0.4, 0.3), flow_shift=8.0).resolve(WAN_T2V_1_3B).segments
    assert late is not None
    assert [count for count, _ in late] == [3]
    assert late[0][1] == dmd[2][1]
