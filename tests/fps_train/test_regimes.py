"""Regimes by noise level: the share of each, the levels inside it, and their order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.attention.schedule import FPSSchedule, Regime, progress
from fps_train.config import FlowOptions
from fps_train.regimes import draw_sigma, regime_of, training_regimes

GRID = (4, 4, 4)
SCHEDULE = FPSSchedule(
    tile=(2, 2, 4),
    regimes=(
        Regime(until=0.25, scales_per_tile=1, window=(1, 1, 1)),
        Regime(until=0.75, scales_per_tile=1, window=(2, 2, 1)),
        Regime(until=1.0, scales_per_tile=1, window=(1, 2, 1)),
    ),
)
FLOWS = {
    "uniform": FlowOptions(distribution="uniform"),
    "uniform shifted": FlowOptions(distribution="uniform", shift=3.0),
    "logit-normal": FlowOptions(distribution="logit-normal", mean=0.3, std=0.8),
    "wan": FlowOptions(),
}


def regimes(flow, schedule=SCHEDULE, shift=5.0, steps=50):
    return training_regimes(schedule, flow, grid=GRID, num_layers=2, sampling_shift=shift, sampling_steps=steps)


def direct_sigmas(flow, count):
    """Noise levels by the distribution's definition, regimes nowhere in it. float64."""
    rng = np.random.default_rng(0)
    t = (
        rng.random(count)
        if flow.distribution == "uniform"
        else 1 / (1 + np.exp(-rng.normal(flow.mean, flow.std, count)))
    )
    return flow.shift * t / (1 + (flow.shift - 1) * t)


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_regime_is_as_likely_as_its_noise_levels(flow, shift):
    sigma = direct_sigmas(flow, 400_000)
    share = np.bincount(SCHEDULE.regime_at(progress(sigma, shift)), minlength=3) / len(sigma)
    found = {r.name: r.probability for r in regimes(flow, shift=shift)}
    # Three deviations of a share that 400,000 draws give: at most 3 * .5 / 632.
    np.testing.assert_allclose([found[f"regime{i}"] for i in range(3)], share, atol=2.4e-3)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
def test_noise_levels_of_all_regimes_together_have_the_distribution_of_t(flow):
    count = 40_000
    uniform = jnp.asarray((np.random.default_rng(1).random(count)), jnp.float32)
    drawn = []
    for regime in regimes(flow):
        sigma = np.asarray(draw_sigma(uniform, regime.low, regime.high, flow), np.float64)
        own = progress(sigma, 5.0)
        # float32 quantiles: 6e-8, times dsigma/dquantile and the sampler's shift
        assert own.min() >= regime.start - 1e-4
        assert own.max() <= regime.end + 1e-4
        drawn.append(sigma[: round(count * regime.probability)])
    together = np.sort(np.concatenate(drawn))
    direct = np.sort(direct_sigmas(flow, 400_000))
    at = np.linspace(0.02, 0.98, 25)
    # Deviation of a quantile: sqrt(q (1 - q) / n) / density, at most .0025 / .15 in the tails of these; three of them.
    np.testing.assert_allclose(np.quantile(together, at), np.quantile(direct, at), atol=0.02)
    assert together.mean() == pytest.approx(direct.mean(), abs=4e-3)


def test_uniform_sigma_inside_an_interval_would_be_told_apart():
    """The tempting rule, sigma uniform between a regime's ends, moves the mean by more than the test above allows."""
    flow, wrong = FLOWS["logit-normal"], 0.0
    for regime in regimes(flow, shift=5.0):
        ends = [5 * u / (1 + 4 * u) for u in (1 - regime.start, 1 - regime.end)]
        wrong += regime.probability * sum(ends) / 2
    assert abs(wrong - direct_sigmas(flow, 400_000).mean()) > 0.05


def test_first_dense_steps_are_their_share_of_progress():
    schedule = dataclasses.replace(SCHEDULE, dense_steps=5)
    first, *others = regimes(FLOWS["uniform"], schedule, shift=1.0, steps=50)
    assert (first.name, first.start, first.end) == ("dense", 0.0, 0.1)
    assert first.probability == pytest.approx(0.1)
    assert first.attention.plan.whole_grid
    assert others[0].start == 0.1
    swallowed = dataclasses.replace(SCHEDULE, dense_steps=20)
    assert [r.name for r in regimes(FLOWS["uniform"], swallowed)] == ["dense", "regime1", "regime2"]
    with pytest.raises(ValueError, match="dense_steps=60 is more than sampling_steps=50"):
        regimes(FLOWS["uniform"], dataclasses.replace(SCHEDULE, dense_steps=60))
    with pytest.raises(ValueError, match="dense_layers names layer 2; the model has layers 0 to 1"):
        regimes(FLOWS["uniform"], dataclasses.replace(SCHEDULE, dense_layers=(2,)))


def test_without_a_schedule_there_is_one_dense_regime():
    (only,) = training_regimes(None, FlowOptions(), grid=GRID, num_layers=2, sampling_shift=5.0, sampling_steps=50)
    assert (only.name, only.probability, only.attention.layout) == ("dense", 1.0, None)


def test_the_order_of_regimes_is_even_and_a_function_of_seed_and_number():
    own = regimes(FLOWS["wan"])
    order = [regime_of(own, 7, n) for n in range(2000)]
    assert order == [regime_of(own, 7, n) for n in range(2000)]
    assert order != [regime_of(own, 8, n) for n in range(2000)]
    share = [r.probability for r in own]
    counts = np.array([np.bincount(order[:n], minlength=3) for n in range(1, 2001)])
    # Any stretch of a golden-ratio sequence misses an interval's share by O(log n) points; drawn at random it would be sqrt(n).
    worst = np.abs(counts - np.arange(1, 2001)[:, None] * share).max()
    assert worst < 4
    later = [regime_of(own, 7, 10**12 + n) for n in range(1000)]  # no rounding of large numbers
    np.testing.assert_allclose(np.bincount(later, minlength=3) / 1000, share, atol=0.004)


@pytest.mark.parametrize("flow", ["uniform", "wan"])
def test_the_order_of_regimes_takes_most_of_what_random_ones_add_to_adam_s_first_moment(flow):
    """Of a gradient that is one number in each regime, steps of a microbatch. Drawn at random it leaves an average of decay b1 the
    variance (1 - b1) / (1 + b1) of the gradient's own."""
    own, b1 = regimes(FLOWS[flow]), 0.9
    share = np.array([r.probability for r in own])
    rng = np.random.default_rng(0)

    def variances(order, gradients):
        """Of the average of each of several gradients `[n, regimes]`."""
        average, seen = np.zeros(len(gradients)), []
        for regime in order:
            average = b1 * average + (1 - b1) * gradients[:, regime]
            seen.append(average)
        return np.var(seen[100:], axis=0)  # 0.9**100 of the start is left

    # One that grows with progress, as gradients do, then each regime's alone
    gradients = np.stack([[(r.start + r.end) / 2 for r in own], *np.eye(len(own))])
    random = (1 - b1) / (1 + b1) * (gradients**2 @ share - (gradients @ share) ** 2)
    even = np.mean([variances([regime_of(own, s, n) for n in range(2000)], gradients) for s in range(4)], axis=0)
    drawn = np.mean([variances(rng.choice(len(own), 4000, p=share), gradients) for _ in range(4)], axis=0)
    # About 16,000 / 19 independent averages, whose variance is good to sqrt(2 / 842) = .05, and more where regimes are rare
    np.testing.assert_allclose(drawn, random, rtol=0.3)
    common = np.array([True, *(share > 0.1)])
    assert common.sum() == 3
    assert (even[common] < random[common] / 4).all()
    assert (even < 0.8 * random).all()


def test_drawing_is_differentiable_nowhere_but_finite_everywhere():
    flow = FLOWS["wan"]
    sigma = jax.jit(lambda u: draw_sigma(u, 0.0, 1.0, flow))(jnp.array([0.0, 1e-7, 0.5, 1 - 6e-8], jnp.float32))
    assert np.isfinite(sigma).all()
    assert ((sigma > 0) & (sigma < 1)).all()
    assert sigma[2] == pytest.approx(2 / 3, abs=1e-6)  # logit-normal's median is a half, shifted by 2
