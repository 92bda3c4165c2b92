"""Calibration: what is measured is the attention error, what is chosen is the cheapest fit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fps_jax import AttentionPlan, attend
from fps_jax.attention.schedule import progress
from fps_jax.attention.tiles import TileLayout
from fps_jax.models.dit import dit
from fps_jax.sampling.denoise import denoise
from fps_jax.sampling.flow import explicit_grid
from fps_jax.sampling.guidance import Inputs
from fps_jax.sampling.solvers import coefficients, solver_table
from fps_jax.tuning import calibration
from tests.checkpoints import TINY, tiny_dit
from tests.reference import rel_l2

GRID = (3, 4, 6)
LAYOUT = AttentionPlan.build(GRID, (2, 2, 3)).layout  # as a schedule has it here
PLANS = (
    AttentionPlan(LAYOUT, (2, 2, 2), None),
    AttentionPlan(LAYOUT, (2, 2, 2), 1),
    AttentionPlan(LAYOUT, (1, 2, 2), None),
    AttentionPlan(LAYOUT, (1, 2, 1), 1),
)


def test_errors_are_those_of_the_attention_output_along_the_dense_trajectory():
    rng = np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, tiny_dit())
    noise = jnp.asarray(rng.standard_normal((1, 16, 3, 8, 12), np.float32))
    text, negative = (jnp.asarray(rng.standard_normal((1, 7, 32), np.float32)) for _ in range(2))
    inputs, table = Inputs(noise, text, negative), solver_table("unipc", "wan", 3, 5.0)
    seen = []
    errors = calibration.measure(
        TINY, params, inputs, table, plans=PLANS, guidance_scale=4.0, query_tiles=99,
        progress=lambda done, steps: seen.append((done, steps)),
    )  # fmt: skip
    assert errors.shape == (3, TINY.num_layers, len(PLANS))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (errors[:, :, 0] < 1e-6).all(), "dense is dense"
    assert (errors[:, :, 1:] > 1e-4).all()

    # Step 2 again, by hand: the dense model's own q, k and v there, and the outputs of each plan on them.
    short = jax.tree.map(lambda column: column[:1], table)
    x = denoise(TINY, params, inputs, short, guidance_scale=4.0)
    taps = {}
    dit(TINY, params, x, jnp.asarray(table.timestep[1:2]), text, taps=taps)
    for layer in range(TINY.num_layers):
        q, k = (taps[f"blocks.self_attn.rope_{name}"][layer] for name in "qk")
        v = taps["blocks.self_attn.v"][layer].reshape(q.shape)
        outputs = [
            plan.from_tiles(attend(plan.to_tiles(q), plan.to_tiles(k), plan.to_tiles(v), plan=plan)) for plan in PLANS
        ]
        want = [rel_l2(out, outputs[0]) for out in outputs]
        np.testing.assert_allclose(errors[1, layer, 1:], want[1:], rtol=1e-2)


def test_a_part_of_the_queries_stands_for_all():
    rng = np.random.default_rng(0)
    inputs = Inputs(*(jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((1, 16, 3, 8, 12), (1, 7, 32))))
    arguments = (TINY, tiny_dit(), inputs, solver_table("unipc", "wan", 2, 5.0))
    part, whole = (calibration.measure(*arguments, plans=PLANS, query_tiles=n) for n in (4, 99))
    assert part.shape == whole.shape
    assert not np.array_equal(part, whole)
    np.testing.assert_allclose(part[..., 1:], whole[..., 1:], rtol=0.5)


def cheapest_by_trying_all(costs, by_step, budget, max_regimes):
    steps, best = len(by_step), np.inf
    for regimes in range(1, max_regimes + 1):
        for cuts in itertools.combinations(range(1, steps), regimes - 1):
            total = 0.0
            for first, end in itertools.pairwise((0, *cuts, steps)):
                fits = [costs[c] for c in range(len(costs)) if (by_step[first:end, c] <= budget).all()]
                total += min(fits) * (end - first)
            best = min(best, total)
    return best


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 4))
def test_the_choice_is_the_cheapest_that_fits(seed, steps, max_regimes):
    errors = np.random.default_rng(seed).random((steps, 2, len(PLANS)))
    result = calibration.choose_schedule(PLANS, errors, error_budget=0.5, max_regimes=max_regimes)
    by_step = errors.mean(1)
    by_step[:, 0] = 0  # dense
    assert (by_step[np.arange(steps), result.chosen] <= 0.5).all()
    assert result.costs[result.chosen].sum() == pytest.approx(
        cheapest_by_trying_all(result.costs, by_step, 0.5, max_regimes), rel=1e-9
    )
    assert len(result.schedule.regimes) <= max_regimes
    # The schedule says the same when a sampler follows it.
    sigma = solver_table("unipc", "wan", steps, 5.0).sigma
    followed = [a.plan for count, a in result.schedule.segments(sigma, 5.0, GRID, 3) for _ in range(count)]
    assert followed == [PLANS[c] for c in result.chosen]


def test_regimes_of_named_levels_end_where_their_noise_does(monkeypatch):
    """DMD's three steps are at progress 0, 0.72 and 0.88, not at thirds."""
    table = coefficients("lcm", explicit_grid("lcm", 8.0, timesteps=[1000, 757, 522]))
    monkeypatch.setattr(calibration, "attention_cost", lambda plan: plan.density)
    sparse = len(PLANS) - 1
    errors = np.ones((3, 2, len(PLANS)))
    errors[1, :, sparse] = 0  # only the second step may be sparse
    at = progress(table.sigma.astype(np.float64), 8.0)
    np.testing.assert_allclose(at, [0, 0.72, 0.88], atol=1e-6)
    result = calibration.choose_schedule(PLANS, errors, error_budget=0.5, progress=at)
    assert [regime.until for regime in result.schedule.regimes] == [0.72, 0.88, 1.0]
    assert result.chosen.tolist() == [0, sparse, 0]
    followed = [a.plan for count, a in result.schedule.segments(table.sigma, 8.0, GRID, 3) for _ in range(count)]
    assert followed == [PLANS[c] for c in result.chosen]
    assert "steps 2 to 2: " in result.summary(0.5)


def test_a_budget_that_nothing_meets_leaves_attention_dense():
    result = calibration.choose_schedule(PLANS, np.ones((4, 2, len(PLANS))), error_budget=1e-3)
    assert [r.until for r in result.schedule.regimes] == [1.0]
    assert result.schedule.plans(GRID) == (PLANS[0],)
    assert "dense" in result.summary(1e-3)
    assert "gains nothing over --attention dense" in result.summary(1e-3)


def test_a_budget_that_is_too_small_is_told_what_would_do():
    plans = calibration.candidates(TileLayout((21, 45, 80), (7, 9, 4)), (0.2,))
    errors = np.ones((4, 2, len(plans)))
    errors[2, :, -1] = [0.25, 0.35]
    result = calibration.choose_schedule(plans, errors, error_budget=0.2)
    assert "the smallest error of a cheaper plan, at any step, is 0.3000; choose again" in result.summary(0.2)
    enough = calibration.choose_schedule(plans, errors, error_budget=0.31)
    assert "gains nothing" not in enough.summary(0.31)


def test_candidates_hold_dense_first_and_every_granularity():
    layout = TileLayout((21, 30, 52), (7, 6, 6))
    plans = calibration.candidates(layout, (0.2, 0.33))
    assert plans[0] == AttentionPlan(layout, layout.tile_grid, None)
    assert {p.scales_per_tile for p in plans} == {None, 1, 2, 4}
    assert len(plans) == len(set(plans)) == 3 * 4
    with pytest.raises(ValueError, match="density=2 is not"):
        calibration.candidates(layout, (2,))


def test_centring_keys_is_a_choice_that_the_error_decides():
    layout = TileLayout((21, 45, 80), (7, 9, 4))
    plans = calibration.candidates(layout, (0.2,), (False, True))
    centred = [i for i, plan in enumerate(plans) if plan.center_k]
    assert len(plans) == len(set(plans)) == 2 * (1 + 2 * 3)
    assert all(not plans[i - 1].center_k and plans[i - 1].pattern.tokens_per_scale for i in centred)
    errors = np.full((4, 2, len(plans)), 0.15)
    errors[:, :, centred] = 0.05
    result = calibration.choose_schedule(plans, errors, error_budget=0.2)  # all fit, and centring is free
    assert all(regime.center_k for regime in result.schedule.regimes)
    errors[:, :, centred] = 0.18
    result = calibration.choose_schedule(plans, errors, error_budget=0.2)
    assert not any(regime.center_k for regime in result.schedule.regimes)


@pytest.mark.parametrize(("budget", "regimes", "message"), [(0.0, 3, "error_budget=0.0"), (0.1, 0, "max_regimes=0")])
def test_bad_choices_are_refused(budget, regimes, message):
    with pytest.raises(ValueError, match=message):
        calibration.choose_schedule(PLANS, np.ones((2, 2, 4)), error_budget=budget, max_regimes=regimes)


def test_the_budget_that_is_left_out_always_has_room_for_fp8_alone():
    plans = calibration.candidates(TileLayout((21, 45, 80), (7, 9, 4)), (0.2, 1.0))
    rounded = [i for i, plan in enumerate(plans) if plan.whole_grid and plan.quantize]
    errors = np.full((4, 2, len(plans)), 0.9)
    errors[:, :, rounded[-1]] = np.array([0.08, 0.02, 0.05, 0.3])[:, None]
    budget = calibration.measured_budget(plans, errors)
    np.testing.assert_allclose(budget, [0.16, 0.04, 0.1, 0.6])
    result = calibration.choose_schedule(plans, errors, error_budget=budget)
    assert set(result.chosen) == {rounded[-1]}  # what no single budget below 0.3 would choose at every step
    assert "of 0.04 to 0.6 allowed" in result.summary(budget)
    window = next(i for i, plan in enumerate(plans) if not plan.whole_grid and not plan.quantize)
    np.testing.assert_allclose(calibration.measured_budget((plans[0], plans[window]), errors[:, :, [0, window]]), 1.8)
