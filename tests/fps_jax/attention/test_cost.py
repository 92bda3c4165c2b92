"""The estimated time of an attention call: measured rates where there are some, else the stated formula."""

import pytest

from fps_jax import AttentionPlan
from fps_jax.attention.cost import attention_cost
from pallas_kernels.sm90.config import ForwardConfig
from pallas_kernels.sm90.tuned import TunedEntry, TuningKey, write_tuned_table


def tuned(path, monkeypatch, **tflops: tuple[str, float]) -> None:
    """A tuned table with entries 'dense0=(GPU, TFLOP/s)': density class and scales."""
    keys = {n: TuningKey(head_dim=128, density=n[:-1], scales=int(n[-1])) for n in tflops}
    table = {
        keys[name]: TunedEntry(config=ForwardConfig(), seconds=1.0, tflops=rate, measured_on={"gpu": gpu})
        for name, (gpu, rate) in tflops.items()
    }
    write_tuned_table(table, path=path)
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
