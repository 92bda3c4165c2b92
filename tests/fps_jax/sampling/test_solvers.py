"""Sigma grids and trajectories against Wan's and diffusers' schedulers (golden: oracle case `schedulers`)."""

import numpy as np
import pytest

from fps_jax.config import MAX_SHIFT
from fps_jax.sampling.flow import MAX_STEPS, VALID_PAIRS, explicit_grid, sigma_grid
from fps_jax.sampling.solvers import SolverState, SolverTable, coefficients, solver_step, solver_table
from tests.reference import golden, rel_l2

ORIGINALS = {
    "official_unipc": ("unipc", "wan"),
    "diffusers_unipc": ("unipc", "diffusers"),
    "official_dpmpp": ("dpm++", "wan"),
    "diffusers_euler": ("euler", "diffusers"),
}


def cases(what: str) -> list[str]:
    return [k for k in golden("schedulers") if k.endswith(what) and k.split("/")[0] in ORIGINALS]


def table_for(key: str):
    name, shift, steps, *_ = key.split("/")
    return ORIGINALS[name], int(steps.removeprefix("steps")), float(shift.removeprefix("shift"))


def integrate(table, x, model):
    """The denoising loop with NumPy's arrays. Noise that is added: Gaussian, seeded."""
    rng, zeros = np.random.default_rng(0), np.zeros_like(x)
    state, states = SolverState(x, zeros, zeros, zeros), [x]
    for i in range(len(table.sigma)):
        row = SolverTable(*(None if column is None else column[i] for column in table))
        noise = None if table.renoise is None else rng.standard_normal(x.shape, np.float32)
        state = solver_step(state, row, model(state.x, row.timestep / np.float32(1000)), noise)
        states.append(state.x)
    return np.stack(states)


@pytest.mark.parametrize("name", ORIGINALS)
def test_sigmas_and_timesteps_equal_the_originals(name):
    g, checked = golden("schedulers"), 0
    for key in cases("sigmas"):
        if key.split("/")[0] == name:
            pair, steps, shift = table_for(key)
            grid = sigma_grid(*pair, steps, shift)
            np.testing.assert_array_equal(grid.sigmas, g[key])
            np.testing.assert_array_equal(grid.timesteps, g[key.replace("sigmas", "timesteps")].astype(np.float32))
            checked += 1
    assert checked >= 15


@pytest.mark.parametrize("key", cases("tanh/traj"))
def test_trajectories_match_the_originals(key):
    """Upstream's fake model: sigma tanh(x) + 0.1 x at sigma = timestep / 1000."""
    pair, steps, shift = table_for(key)
    want = golden("schedulers")[key]
    got = integrate(solver_table(*pair, steps, shift), want[0], lambda x, s: s * np.tanh(x) + np.float32(0.1) * x)
    assert rel_l2(got, want) <= 1e-6


def test_euler_on_the_wan_grid_walks_the_dpmpp_levels():
    euler, dpmpp = sigma_grid("euler", "wan", 7, 5.0), sigma_grid("dpm++", "wan", 7, 5.0)
    np.testing.assert_array_equal(euler.sigmas, dpmpp.sigmas)
    np.testing.assert_array_equal(euler.timesteps, dpmpp.timesteps)
    x = np.linspace(-1, 1, 5, dtype=np.float32)
    states = integrate(solver_table("euler", "wan", 7, 5.0), x, lambda x, s: np.cos(x))
    want = x.astype(np.float64)
    for sigma, after in zip(dpmpp.sigmas[:-1], dpmpp.sigmas[1:], strict=True):
        want = want + (float(after) - float(sigma)) * np.cos(want)
    np.testing.assert_allclose(states[-1], want, atol=1e-6)


@pytest.mark.parametrize(("solver", "grid"), VALID_PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 3, 25])
def test_every_solver_is_exact_where_the_data_prediction_is_constant(solver, grid, steps):
    """v = (x - c) / sigma predicts x0 = c at every level, so any consistent solver must end at c."""
    table = solver_table(solver, grid, steps, 5.0)
    target = np.float32(0.7)
    x = np.full(3, 2.0, np.float32)
    end = integrate_with_sigma(table, x, lambda x, sigma: (x - target) / sigma)
    np.testing.assert_allclose(end, target, atol=2e-5)


def integrate_with_sigma(table, x, velocity):
    levels = iter(table.sigma)
    return integrate(table, x, lambda x, _: velocity(x, next(levels)))[-1]


@pytest.mark.parametrize(("solver", "grid"), [("dpm++", "diffusers"), ("heun", "wan"), ("unipc", "karras")])
def test_other_pairs_are_refused_with_the_valid_ones(solver, grid):
    with pytest.raises(ValueError, match="use one of unipc/wan, unipc/diffusers, dpm"):
        solver_table(solver, grid, 5, 3.0)


@pytest.mark.parametrize(
    ("steps", "shift", "message"),
    [
        (0, 5.0, "num_inference_steps=0"),
        (5, 0.0, "flow_shift=0"),
        (5, float("nan"), "flow_shift=nan"),
    ],
)
def test_bad_steps_and_shift_are_named(steps, shift, message):
    with pytest.raises(ValueError, match=message):
        solver_table("unipc", "wan", steps, shift)


def test_the_most_steps_and_the_largest_shift_are_taken():
    levels = np.linspace(1, 0.001, MAX_STEPS)
    for grid in (sigma_grid("euler", "wan", MAX_STEPS, MAX_SHIFT), explicit_grid("euler", MAX_SHIFT, sigmas=levels)):
        assert grid.timesteps.shape == (MAX_STEPS,)


def test_lcm_noises_its_prediction_again_to_the_next_level():
    table, (x, velocity, noise) = solver_table("lcm", "wan", 3, 5.0), np.random.default_rng(0).normal(size=(3, 8))
    row = SolverTable(*(column[0] for column in table))
    after = solver_step(SolverState(x, x, x, x), row, velocity, noise)
    level = table.sigma[1]
    # float32 coefficients
    np.testing.assert_allclose(
        after.x, (1 - level) * (x - table.sigma[0] * velocity) + level * noise, rtol=1e-6, atol=1e-6
    )


def test_dpmpp_between_first_and_last_step_has_the_order_of_two_predictions():
    """Algorithm 2 of arXiv 2211.01095, on levels below 1, where the first step's slope is no infinity."""
    sigmas = np.float64([0.9, 0.6, 0.3, 0.1])
    rows = coefficients("dpm++", explicit_grid("dpm++", 1.0, sigmas=sigmas.tolist())).predictor
    h = np.diff(np.log((1 - sigmas) / sigmas))
    for i in (1, 2):
        half = h[i] / h[i - 1] / 2
        scale = -(1 - sigmas[i + 1]) * np.expm1(-h[i])
        np.testing.assert_allclose(rows[i], [sigmas[i + 1] / sigmas[i], scale * (1 + half), -scale * half], rtol=1e-6)
    for i in (0, 3):
        assert rows[i][2] == 0
