"""The schedule: progress, regimes of a sampler's steps, its JSON, and what it refuses."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax import FPSSchedule
from fps_jax.attention.attend import PlannedAttention
from fps_jax.attention.schedule import Regime, progress
from fps_jax.sampling.flow import VALID_PAIRS, shift_sigma
from fps_jax.sampling.solvers import solver_table
from pallas_kernels import block_sparse

GRID = (21, 30, 52)
DEFAULT = FPSSchedule.default(GRID)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 16.0])
def test_progress_undoes_the_shift(shift):
    u = np.linspace(0, 1, 101)
    np.testing.assert_allclose(progress(shift_sigma(u, shift), shift), 1 - u, atol=1e-12)
    traced = progress(jnp.asarray(shift_sigma(u, shift), jnp.float32), shift)
    np.testing.assert_allclose(traced, 1 - u, atol=1e-5)


@pytest.mark.parametrize(("solver", "sigma_grid"), VALID_PAIRS)
@pytest.mark.parametrize("shift", [3.0, 5.0, 16.0])
@pytest.mark.parametrize("steps", [1, 4, 8, 50])
def test_step_i_of_n_has_progress_i_over_n_whatever_the_shift(solver, sigma_grid, shift, steps):
    table = solver_table(solver, sigma_grid, steps, shift)
    counts = [count for count, _ in DEFAULT.segments(table.sigma, shift, GRID, 30)]
    assert sum(counts) == steps
    # Spaced evenly in n - 1 parts and shifted twice: near i / n only.
    if sigma_grid == "diffusers" and solver in ("euler", "lcm"):
        return
    regimes = [0 if 4 * i < steps else 1 if 4 * i < 3 * steps else 2 for i in range(steps)]
    assert counts == [n for n in (regimes.count(r) for r in range(3)) if n]


def test_regimes_hold_while_progress_is_below_their_end():
    at = np.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 1.0])
    assert DEFAULT.regime_at(at).tolist() == [0, 0, 1, 1, 2, 2]
    traced = DEFAULT.regime_at(jnp.asarray(at, jnp.float32))
    assert traced.dtype == jnp.int32
    assert traced.tolist() == [0, 0, 1, 1, 2, 2]
    assert FPSSchedule(regimes=(Regime(until=1.0),)).regime_at(np.array([0.5])).tolist() == [0]


def test_the_default_is_coarse_and_sparse_then_fine_and_dense_then_between():
    early, middle, late = DEFAULT.plans(GRID)
    assert (early.scales_per_tile, middle.scales_per_tile, late.scales_per_tile) == (1, 4, 2)
    assert early.density < late.density < middle.density
    for plan, target in ((early, 0.12), (middle, 0.33), (late, 0.20)):
        assert plan.density == pytest.approx(target, rel=0.1)
    assert [r.until for r in DEFAULT.regimes] == [0.25, 0.75, 1.0]
    assert [r.scales_per_tile for r in FPSSchedule.default().regimes] == [1, 4, 2]  # without a grid
    FPSSchedule.default((3, 4, 5)).plans((3, 4, 5))  # any grid has one, with granularities that its tile allows


@pytest.mark.parametrize("grid", [(5, 6, 6), (5, 8, 8), (5, 16, 16), (1, 16, 16), (3, 4, 6), (9, 12, 12), (1, 30, 52)])
def test_on_small_grids_too_each_regime_of_the_default_has_its_own_window(grid):
    early, middle, late = FPSSchedule.default(grid).plans(grid)
    assert 1.2 * early.density < late.density
    assert 1.2 * late.density < middle.density < 0.5


def test_a_schedule_is_one_on_every_device(monkeypatch):
    """Where programs are built for a GPU, tiles are stored as the Hopper kernel takes them; all else is the same."""
    schedule = FPSSchedule.default((5, 6, 6))
    here = schedule.plans((5, 6, 6))
    monkeypatch.setattr(block_sparse, "target_platform", lambda: "gpu")
    there = schedule.plans((5, 6, 6))
    assert {plan.layout.alignment for plan in here} == {8}
    assert {plan.layout.alignment for plan in there} == {64}
    assert tuple(plan.aligned(64) for plan in here) == there


def test_json_round_trip(tmp_path):
    full = FPSSchedule(
        grid=(7, 12, 12),
        tile=(7, 6, 6),
        dense_steps=2,
        dense_layers=(5, 0),
        regimes=(
            Regime(until=0.3, scales_per_tile=4, window=(1, 1, 2)),
            Regime(until=0.9, density=0.5),
            Regime(until=1),
        ),
    )
    for schedule in (full, DEFAULT, DEFAULT.resolve(GRID)):
        schedule.save(tmp_path / "schedule.json")
        assert FPSSchedule.load(tmp_path / "schedule.json") == schedule
    assert list(tmp_path.iterdir()) == [tmp_path / "schedule.json"]
    full.save(tmp_path / "schedule.json")
    assert json.loads((tmp_path / "schedule.json").read_text()) == {
        "version": 1,
        "grid": [7, 12, 12],
        "tile": [7, 6, 6],
        "dense_steps": 2,
        "dense_layers": [0, 5],
        "regimes": [
            {"until": 0.3, "scales_per_tile": 4, "window": [1, 1, 2], "density": None},
            {"until": 0.9, "scales_per_tile": None, "window": None, "density": 0.5},
            {"until": 1, "scales_per_tile": None, "window": None, "density": None},
        ],
    }


def test_entries_that_have_a_default_may_be_left_out():
    assert FPSSchedule.from_dict({"version": 1, "regimes": [{"until": 1, "density": 0.2}]}) == FPSSchedule(
        regimes=(Regime(until=1, density=0.2),)
    )


def test_center_k_is_in_the_file_where_it_is_true(tmp_path):
    """Absent means false, so that a release that doesn't know it reads the schedules that don't need it."""
    regimes = (Regime(until=0.5, scales_per_tile=1, center_k=True), Regime(until=1.0, scales_per_tile=2))
    schedule = FPSSchedule(regimes=regimes)
    written = schedule.to_dict()["regimes"]
    assert written[0]["center_k"] is True
    assert "center_k" not in written[1]
    assert FPSSchedule.from_dict(schedule.to_dict()) == schedule
    first, second = schedule.plans(GRID)
    assert (first.center_k, second.center_k) == (True, False)
    assert first.pattern.center_k
    assert first != dataclasses.replace(first, center_k=False)
    assert "FP8 with 1 scale a tile, centred K" in schedule.describe(GRID)
    assert schedule.setting("fp8").plans(GRID)[0].center_k
    assert not any(plan.center_k for plan in schedule.setting("sparse").plans(GRID))
    assert not first.dense().center_k


def test_resolving_fills_in_what_is_proposed_and_keeps_the_plans():
    resolved = DEFAULT.resolve(GRID)
    assert resolved.grid == GRID
    assert resolved.tile == DEFAULT.plans(GRID)[0].tile
    assert all(r.window is not None and r.density is None for r in resolved.regimes)
    assert resolved.plans(GRID) == DEFAULT.plans(GRID)
    assert resolved.resolve(GRID) == resolved


def test_settings_take_one_half_of_the_schedule():
    fp8, sparse = (DEFAULT.setting(name).plans(GRID) for name in ("fp8", "sparse"))
    assert DEFAULT.setting("fps") == DEFAULT
    assert all(plan.whole_grid and plan.quantize for plan in fp8)
    assert [p.scales_per_tile for p in fp8] == [p.scales_per_tile for p in DEFAULT.plans(GRID)]
    assert not any(plan.quantize for plan in sparse)
    assert [p.window for p in sparse] == [p.window for p in DEFAULT.plans(GRID)]


def test_dense_steps_and_layers():
    schedule = dataclasses.replace(DEFAULT, dense_steps=3, dense_layers=(0, 29))
    sigma = solver_table("unipc", "wan", 8, 5.0).sigma
    (dense, first), (early, second), *_ = schedule.segments(sigma, 5.0, GRID, 30)
    assert (dense, early) == (3, 3)  # steps 0 to 2 dense; of the middle regime's 2 to 5, three are left
    assert isinstance(first, PlannedAttention)
    assert isinstance(second, PlannedAttention)
    assert first.plan == DEFAULT.plans(GRID)[0].dense()
    assert second.dense_layers == (0, 29)
    ((all_steps, only),) = FPSSchedule(regimes=(Regime(until=1.0),), dense_steps=8).segments(sigma, 5.0, GRID, 30)
    assert (all_steps, only.plan) == (8, first.plan)
    with pytest.raises(ValueError, match=r"dense_layers=\[0, 29\] names layer 29; the model has layers 0 to 28"):
        schedule.segments(sigma, 5.0, GRID, 29)


WHOLE = Regime(until=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FPSSchedule(regimes=()), r"regimes=\(\) is not a non-empty list"),
        (lambda: FPSSchedule(regimes=(Regime(until=0.5),)), r"regimes end at \[0.5\]; .* the last must be exactly 1"),
        (lambda: FPSSchedule(regimes=(Regime(until=0.5), Regime(until=0.5), WHOLE)), "until must rise"),
        (lambda: FPSSchedule(regimes=(Regime(until=0.7), Regime(until=0.5), WHOLE)), "until must rise"),
        (lambda: Regime(until=0), "until=0 is not a number in"),
        (lambda: Regime(until=True), "until=True is not a number in"),
        (lambda: Regime(until=float("nan")), "until=nan is not a number in"),
        (lambda: Regime(until=1.1), "until=1.1 is not a number in"),
        (lambda: Regime(until="1"), "until='1' is not a number in"),
        (lambda: Regime(until=1.0, window=(0, 1, 1)), r"window=\(0, 1, 1\) is not three positive"),
        (lambda: Regime(until=1.0, density=0.0), "density=0.0 is not a number in"),
        (lambda: Regime(until=1.0, density=0.2, window=(1, 1, 1)), "both given; give one"),
        (lambda: Regime(until=1.0, scales_per_tile=0), "scales_per_tile=0 is not a whole number"),
        (lambda: Regime(until=1.0, scales_per_tile=1, center_k=1), "center_k=1 is not true or false"),
        (lambda: Regime(until=1.0, center_k=True), "center_k=True without scales_per_tile"),
        (lambda: FPSSchedule(regimes=(WHOLE,), dense_steps=-1), "dense_steps=-1 is not a whole number"),
        (lambda: FPSSchedule(regimes=(WHOLE,), dense_layers=(0, -1)), r"dense_layers=\(0, -1\) is not a list of layers"),
        (lambda: FPSSchedule(regimes=(WHOLE,), grid=(5, 5, 5), tile=(6, 1, 1)), "larger than the grid .*good tiles"),
        (lambda: DEFAULT.resolve((21, 45, 80)), r"is for a grid of \(21, 30, 52\).*this video has \(21, 45, 80\)"),
        (lambda: FPSSchedule(regimes=(Regime(until=1.0, scales_per_tile=3),)).plans(GRID), "scales_per_tile=3 .*allowed: 1, 2, 4"),
        (lambda: FPSSchedule(regimes=(Regime(until=1.0, scales_per_tile=3),)).resolve(GRID), "scales_per_tile=3 .*allowed"),
        (lambda: FPSSchedule(regimes=({"until": 1},)), "are not all Regime"),
        (lambda: Regime(until=10**400), "until=1000.* is not a number in"),
        (lambda: DEFAULT.setting("flash"), "attention='flash' is not one of 'dense', 'fp8', 'sparse', 'fps'"),
        (lambda: FPSSchedule.from_dict({"version": 2}), "version=2 is not 1"),
        (lambda: FPSSchedule.from_dict([1]), "version=None is not 1"),
        (lambda: FPSSchedule.from_dict({"version": 1}), "the schedule lacks 'regimes'"),
        (lambda: FPSSchedule.from_dict({"version": 1, "regimes": [], "tiles": 1}), "unknown entry 'tiles'; it may have "),
        (lambda: FPSSchedule.from_dict({"version": 1, "regimes": [{"til": 1}]}), "regime 0 has an unknown entry 'til'"),
        (lambda: FPSSchedule.from_dict({"version": 1, "regimes": [3]}), r"regimes=\[3\] is not a list of objects"),
    ],
)  # fmt: skip
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "s.json"
    with pytest.raises(FileNotFoundError, match=r"s.json' doesn't exist; fps-calibrate makes one"):
        FPSSchedule.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"s.json' is not JSON"):
        FPSSchedule.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"s.json' is not JSON"):
        FPSSchedule.load(path)
    path.write_text('{"version": 1, "regimes": [{"until": 0.5}]}')
    with pytest.raises(ValueError, match=r"s.json': regimes end at \[0.5\]"):
        FPSSchedule.load(path)
    with pytest.raises(ValueError, match="is not a JSON file"):
        FPSSchedule.load(tmp_path)
