"""Calibration: what is measured is the attention error, what is chosen is the cheapest fit; the command, whole."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fps_jax import AttentionPlan, FPSSchedule, attend
from fps_jax.attention.cost import attention_cost
from fps_jax.attention.tiles import TileLayout
from fps_jax.commands import calibrate as calibrate_cli
from fps_jax.models.dit import dit
from fps_jax.sampling.denoise import denoise
from fps_jax.sampling.solvers import solver_table
from fps_jax.tuning import calibration
from pallas_kernels import tuning
from tests.checkpoints import T2V, TINY, tiny_dit
from tests.reference import rel_l2

GRID = (3, 4, 6)
LAYOUT = TileLayout(GRID, (2, 2, 3))
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
    table = solver_table("unipc", "wan", 3, 5.0)
    seen = []
    errors = calibration.measure(
        TINY, params, noise, table, text, negative, plans=PLANS, guidance_scale=4.0, query_tiles=99,
        progress=lambda done, steps: seen.append((done, steps)),
    )  # fmt: skip
    assert errors.shape == (3, TINY.num_layers, len(PLANS))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (errors[:, :, 0] < 1e-6).all(), "dense is dense"
    assert (errors[:, :, 1:] > 1e-4).all()

    # Step 2 again, by hand: the dense model's own q, k and v there, and the outputs of each plan on them.
    short = table._replace(**{name: getattr(table, name)[:1] for name in table._fields})
    x = denoise(TINY, params, noise, short, text, negative, guidance_scale=4.0)
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
    arguments = (
        TINY, tiny_dit(), jnp.asarray(rng.standard_normal((1, 16, 3, 8, 12), np.float32)), solver_table("unipc", "wan", 2, 5.0),
        jnp.asarray(rng.standard_normal((1, 7, 32), np.float32)),
    )  # fmt: skip
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


def tuned(path, monkeypatch, **tflops: tuple[str, float]) -> None:
    """A tuned table with entries 'dense0=(GPU, TFLOP/s)': density class and scales."""
    keys = {n: tuning.TuningKey(head_dim=128, density=n[:-1], scales=int(n[-1])) for n in tflops}
    table = {
        keys[name]: tuning.TunedEntry(config=tuning.ForwardConfig(), seconds=1.0, tflops=rate, measured_on={"gpu": gpu})
        for name, (gpu, rate) in tflops.items()
    }
    tuning.write_tuned_table(table, path=path)
    monkeypatch.setenv("FPS_TUNED_TABLE", str(path))


def test_cost_takes_measured_rates_where_both_sides_were_measured_on_one_gpu(tmp_path, monkeypatch):
    h200, h100 = "NVIDIA H200", "NVIDIA H100"
    tuned(tmp_path / "t.json", monkeypatch, dense0=(h200, 600.0), sparse1=(h200, 900.0), dense1=(h100, 1100.0))
    plan = AttentionPlan.build((21, 45, 80), window=(3, 3, 4))
    stored = 36 / 300 * (76800 / 75600) ** 2
    assert attention_cost(plan) == pytest.approx(stored * 600 / 900 + 0.005)
    # Not measured: two scales, sparse bf16. Measured on another GPU: the whole grid in FP8.
    assert attention_cost(AttentionPlan(plan.layout, plan.window, 4)) == pytest.approx(stored / 2 * 1.01 + 0.005)
    assert attention_cost(AttentionPlan(plan.layout, plan.window, None)) == pytest.approx(stored)
    whole = AttentionPlan(plan.layout, plan.layout.tile_grid, 1)
    assert attention_cost(whole) == pytest.approx((76800 / 75600) ** 2 / 2 + 0.005)
    assert attention_cost(plan.dense()) == pytest.approx(76800 / 75600)
    # Nothing to compare with.
    tuned(tmp_path / "u.json", monkeypatch, sparse1=(h200, 900.0))
    assert attention_cost(plan) == pytest.approx(stored / 2 + 0.005)


def test_cost_is_the_stated_formula_where_nothing_was_measured(tmp_path, monkeypatch):
    tuned(tmp_path / "t.json", monkeypatch)
    plan = AttentionPlan.build((21, 45, 80), window=(3, 3, 4))  # 36 of 300 tiles
    stored = 36 / 300 * (76800 / 75600) ** 2
    assert attention_cost(plan) == pytest.approx(stored / 2 + 0.005)
    assert attention_cost(AttentionPlan(plan.layout, plan.window, 4)) == pytest.approx(stored / 2 * 1.01 + 0.005)
    assert attention_cost(AttentionPlan(plan.layout, plan.window, None)) == pytest.approx(stored)
    heads = AttentionPlan(plan.layout, ((3, 3, 4), plan.layout.tile_grid), None)
    assert attention_cost(heads) == pytest.approx((stored + (76800 / 75600) ** 2) / 2)
    assert attention_cost(plan.dense()) == pytest.approx(76800 / 75600)


def test_candidates_hold_dense_first_and_every_granularity():
    layout = TileLayout((21, 30, 52), (7, 6, 6))
    plans = calibration.candidates(layout, (0.2, 0.33))
    assert plans[0] == AttentionPlan(layout, layout.tile_grid, None)
    assert {p.scales_per_tile for p in plans} == {None, 1, 2, 4}
    assert len(plans) == len(set(plans)) == 3 * 4
    with pytest.raises(ValueError, match="density=2 is not"):
        calibration.candidates(layout, (2,))


@pytest.mark.parametrize(("budget", "regimes", "message"), [(0.0, 3, "error_budget=0.0"), (0.1, 0, "max_regimes=0")])
def test_bad_choices_are_refused(budget, regimes, message):
    with pytest.raises(ValueError, match=message):
        calibration.choose_schedule(PLANS, np.ones((2, 2, 4)), error_budget=budget, max_regimes=regimes)


ARGUMENTS = [
    str(T2V), "--height", "64", "--width", "96", "--num-frames", "9", "--num-inference-steps", "3", "--dtype", "float32",
    "--tile", "2", "2", "3", "--densities", "0.3", "1.0",
]  # fmt: skip


def run(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        calibrate_cli.main([*ARGUMENTS, *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out + captured.err


def test_the_command_writes_a_schedule_that_the_pipeline_takes(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A cat walks in the snow.\n\nA red panda.\n")
    out = tmp_path / "s.json"
    code, said = run(capsys, "--prompts", prompts, "--output", out, "--error-budget", "0.5")
    assert code == 0, said
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "prompts.txt", "s.choice.png", "s.errors.json", "s.errors.png", "s.json",
    ]  # fmt: skip
    schedule = FPSSchedule.load(out)
    assert schedule.grid == (3, 4, 6)
    assert schedule.tile == (2, 2, 3)
    record = json.loads((tmp_path / "s.errors.json").read_text())
    assert record["prompts"] == ["A cat walks in the snow.", "A red panda."]
    assert np.shape(record["errors"]) == (3, 3, len(record["candidates"]))
    assert "estimated by the cost formula" in said
    for picture in ("s.errors.png", "s.choice.png"):
        assert (tmp_path / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # Another budget from the same measurement, without the model.
    code, said = run(
        capsys, "--prompts", prompts, "--output", tmp_path / "dense.json", "--error-budget", "1e-6",
        "--reuse", tmp_path / "s.errors.json",
    )  # fmt: skip
    assert code == 0, said
    assert FPSSchedule.load(tmp_path / "dense.json").plans((3, 4, 6))[0].density == 1.0
    code, said = run(
        capsys, "--prompts", prompts, "--output", out, "--densities", "0.5", "--reuse", tmp_path / "s.errors.json"
    )
    assert code == 2
    assert "measured other candidates" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.txt"], "error: prompts='none.txt' doesn't exist; it is a text file with one prompt a line"),
        (["--prompts", "empty.txt"], "error: prompts='empty.txt' holds no prompt"),
        (["--prompts", "one.txt", "--output", "s.txt"], "error: output='s.txt' must end in .json"),
        (["--prompts", "one.txt", "--output", "nowhere/s.json"], "doesn't exist; make it first"),
        (["--prompts", "one.txt", "--error-budget", "-1"], "error: error_budget=-1.0 is not a positive number"),
        (["--prompts", "one.txt", "--densities", "3"], "error: density=3.0 is not a number in (0, 1]"),
        (["--prompts", "one.txt", "--tile", "9", "1", "1"], "error: tile=(9, 1, 1) is larger than the grid (3, 4, 6)"),
        (["--prompts", "one.txt", "--query-tiles", "0"], "error: query_tiles=0 is less than 1"),
        (["--prompts", "one.txt", "--reuse", "one.txt"], "error: reuse='one.txt' is no .errors.json that fps-calibrate wrote"),
        (["--prompts", "one.txt", "--num-frames", "10"], "error: num_frames=10 is not 4k+1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_the_model_is_read(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("A cat.\n")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("fps_jax.WanPipeline.from_pretrained", lambda *a, **k: pytest.fail("it was read"))
    code, said = run(capsys, *arguments)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_tuned_table_that_cannot_be_read_is_found_before_the_measurement(tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "one.txt"
    prompts.write_text("A cat.\n")
    monkeypatch.setenv("FPS_TUNED_TABLE", str(tmp_path / "none.json"))
    monkeypatch.setattr("fps_jax.WanPipeline.from_pretrained", lambda *a, **k: pytest.fail("it was read"))
    code, said = run(capsys, "--prompts", prompts, "--output", tmp_path / "s.json")
    assert code == 2
    assert "none.json' doesn't exist; run fps-tune to write it" in said
