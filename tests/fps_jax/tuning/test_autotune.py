"""The autotuner's engine: the keys that attention asks for, plain kernels first, and only what is right is timed."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import pytest

from fps_jax.tuning import autotune, autotune_run
from pallas_kernels.sm90 import forward
from pallas_kernels.sm90.config import ForwardConfig
from pallas_kernels.sm90.tuned import TuningKey


def test_the_keys_are_those_that_attention_asks_for():
    tasks = autotune.tasks((21, 45, 80), heads=40)
    assert [(t.key.density, t.key.scales) for t in tasks] == [
        ("sparse", 1), ("dense", 1), ("sparse", 2), ("dense", 2), ("sparse", 0), ("dense", 0),
    ]  # fmt: skip
    for task in tasks:
        plan = task.plan
        assert (plan.tokens_per_scale is None) == (task.key.scales == 0)
        assert plan.whole_grid == (task.key.density == "dense")
        # FLOP by hand: QK and PV, 2 each, 128 channels, 40 heads, attended pairs.
        assert task.flop == pytest.approx(4 * 128 * 40 * plan.density * 75600**2)
    # Another number of scales a tile, the same key: 128 stored tokens, and 384 in two groups that share a block.
    for grid in ((21, 30, 52), (8, 8, 64)):
        assert {t.key.scales for t in autotune.tasks(grid, heads=12)} == {0, 1, 2}
    head64 = autotune.tasks((21, 30, 52), heads=24, head_dim=64, classes=["dense"], scales=[1])
    assert [t.key for t in head64] == [TuningKey(head_dim=64, density="dense", scales=1)]


@dataclass(frozen=True, kw_only=True)
class Switched:
    """A config as it may be one day."""

    stages: int = 4
    cluster: int = 1
    persistent: bool = False
    ordered: bool = True


def test_plain_kernels_come_first_and_one_that_hangs_takes_only_those_like_it(monkeypatch):
    monkeypatch.setattr(autotune_run, "ForwardConfig", Switched)
    configs: list[Any] = [
        Switched(persistent=True, ordered=False),
        Switched(persistent=True),
        Switched(cluster=2),
        Switched(stages=2, persistent=True),
        Switched(stages=2),
        Switched(),
    ]
    plain, pair, persistent, both = autotune_run.groups(configs)
    assert plain.configs == (Switched(), Switched(stages=2))
    assert pair.configs == (Switched(cluster=2),)
    assert persistent.configs == (Switched(persistent=True), Switched(stages=2, persistent=True))
    assert both.configs == (Switched(persistent=True, ordered=False),)
    assert [str(g) for g in (plain, pair, persistent)] == ["cluster=1", "cluster=2", "cluster=1 persistent"]
    like = [[g.is_like(hung) for g in (plain, pair, persistent, both)] for hung in (plain, pair, persistent)]
    assert like == [[True, False, True, True], [False, True, False, False], [False, False, True, True]]


def test_the_engine_times_what_agrees_with_the_safe_config_and_what_is_slow_only_shortly(monkeypatch):
    task = autotune.Task(grid=(2, 8, 16), heads=1, density=1, scales_per_tile=None)
    factors = {ForwardConfig(stages=2): 1.0, ForwardConfig(stages=4): 1.009, ForwardConfig(cluster=2): 1.011}
    factors[ForwardConfig(stages=8)] = math.nan

    def attention(operands, pattern, *, config, **arguments):
        return jnp.full((1, 256, 1, 128), factors[config], jnp.float32), None

    monkeypatch.setattr(forward, "attention", attention)
    limits, begun, seconds = [], [], iter([2.0, 1.0])

    def measure(call, limit):
        limits.append(limit)
        return {"seconds": next(seconds)}

    results = list(autotune.sweep(task, list(factors), best=3.0, measure=measure, starting=begun.append))
    assert [r["ok"] for r in results] == [True, True, False, False]
    assert begun == list(factors)
    assert limits == [4.5, 3.0]  # 1.5 times the best so far, known before or found
    assert results[1]["rel_l2_safe"] == pytest.approx(0.009, rel=1e-3)
    assert results[0]["tflops"] == pytest.approx(4 * 256 * 256 * 128 / 2.0 / 1e12)
    assert "seconds" not in results[2]
    assert results[0]["measured_on"] | {"grid": (2, 8, 16), "heads": 1, "gpu": "cpu"} == results[0]["measured_on"]
