"""The claim's paired losses, and its table and pictures from what was measured. Nothing is trained or sampled."""

import json

import jax
import numpy as np
import pytest

from benchmarks.claim import report
from benchmarks.claim.judge import FACTS, captions, share
from benchmarks.claim.losses import attentions, level_losses, paired_losses
from benchmarks.claim.measure import LAST
from benchmarks.claim.rows import FLAT, ROWS, STEPAWARE
from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_jax.attention.windows import window_tiles
from fps_jax.checkpoints.format import save_checkpoint
from fps_jax.checkpoints.open import open_model
from tests.fps_train.conftest import WAN
from tests.fps_train.models import CONFIG, params
from tests.fps_train.sample_data import write_data

GRID, LAYERS = (5, 6, 8), 4


@pytest.mark.parametrize("path", [STEPAWARE, FLAT], ids=lambda path: path.stem)
def test_schedules_hold_for_the_world_s_grid_and_leave_much_out(path):
    """Tiles of 16 tokens or more, but for those that the grid's edge cuts, and a dozen or more of them."""
    plans = FPSSchedule.load(path).plans(GRID)
    assert all(
        plan.layout.num_tiles >= 12 and np.prod(plan.layout.tile) >= 16 and plan.density <= 0.6 for plan in plans
    )


def test_windows_meet_along_every_axis_in_some_regime():
    """From any tile to any other, by the windows of the regimes together: else halves of a frame never hear of each other."""
    reaches = np.eye(20, dtype=bool)
    for plan in FPSSchedule.load(STEPAWARE).plans(GRID):
        for query, keys in enumerate(window_tiles(plan.layout, plan.window).tiles):
            reaches[query, keys] = True
    for _ in range(4):
        reaches = reaches @ reaches
    assert reaches.all()


def test_one_regime_is_no_narrower_than_three_are_on_the_mean():
    three, one = (next(r for r in ROWS if r.letter == letter).density(12) for letter in "dg")
    assert (round(three, 3), round(one, 3)) == (0.55, 0.6)


def test_the_attention_of_an_interval_is_the_schedule_s():
    own = FPSSchedule.load(STEPAWARE)
    found = attentions(own, [(0.0, 0.25), (0.25, 0.75), (0.75, 1.0)], GRID, LAYERS)
    assert [attention.plan for attention in found] == list(own.plans(GRID))
    assert len(set(attentions(FPSSchedule.load(FLAT), [(0.0, 0.25), (0.25, 1.0)], GRID, LAYERS))) == 1
    with pytest.raises(ValueError, match=r"changes between 0.0 and 0.5"):
        attentions(own, [(0.0, 0.5)], GRID, LAYERS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, data, schedule) of tokens (2, 4, 4)."""
    folder = tmp_path_factory.mktemp("tiny")
    save_checkpoint(folder / "model", WAN, {"dit": jax.device_get(params())})
    write_data(folder / "data", {"64x64x5": 5}, text_len=CONFIG.text_len, text_dim=CONFIG.text_dim, prompts=True)
    regimes = (Regime(until=0.4, window=(1, 1, 1)), Regime(until=1.0, window=(2, 2, 1)))
    return (
        open_model(folder / "model"),
        folder / "data",
        FPSSchedule(grid=(2, 4, 4), tile=(1, 2, 4), regimes=regimes),
    )


def test_losses_are_paired_and_regimes_go_by_their_own_windows(tiny):
    model, data, schedule = tiny
    dense = paired_losses(model, None, schedule, data, batch_size=4)
    assert {name: values.shape for name, values in dense.items()} == {"regime0": (5,), "regime1": (5,)}
    again = paired_losses(model, None, schedule, data, batch_size=3)
    for name, values in dense.items():
        assert len(set(values)) == 5
        np.testing.assert_allclose(again[name], values, rtol=1e-5)  # sums of float32 in another order
    sparse = paired_losses(model, schedule, schedule, data, batch_size=4)
    assert np.abs(sparse["regime0"] - dense["regime0"]).min() > 1e-5
    np.testing.assert_allclose(sparse["regime1"], dense["regime1"], rtol=1e-5)  # its window is the whole grid


def test_a_level_is_the_limit_of_a_narrow_regime(tiny):
    model, data, schedule = tiny
    sigmas, shift = (0.96, 0.5), model.config.flow_shift
    dense = level_losses(model, None, sigmas, data, batch_size=4)
    for sigma in sigmas:
        progress = 1 - sigma / (
            shift - (shift - 1) * sigma
        )  # sigma = shift s / (1 + (shift - 1) s) at s = 1 - progress
        ends = (progress - 1e-4, progress + 1e-4, 1.0)
        narrow = FPSSchedule(regimes=tuple(Regime(until=end) for end in ends))
        near = paired_losses(model, None, narrow, data, batch_size=4)["regime1"]
        np.testing.assert_allclose(dense[f"{sigma:g}"], near, rtol=1e-3)
    sparse = level_losses(model, schedule, sigmas, data, batch_size=4)
    assert np.abs(sparse["0.96"] - dense["0.96"]).min() > 1e-5  # in regime0
    np.testing.assert_allclose(sparse["0.5"], dense["0.5"], rtol=1e-5)  # in regime1, the whole grid


def fake(folder, name, right, losses, seed):
    """What `measure` writes of 6 clips, with the facts of the first of which are as given."""
    place = folder / "measured" / name
    place.mkdir(parents=True)
    facts, _ = captions(6, 100)
    judged = {"clips": 6, "seed": 100, "trained": False, "steps": 12, "right": right.astype(int).tolist()}
    judged["motions"] = {kind: 0.5 for kind in {f.motion for f in facts}}
    (place / "judged.json").write_text(json.dumps(judged))
    rng = np.random.default_rng(seed)
    np.save(place / "clips.npy", rng.integers(0, 256, (6, 17, 48, 64, 3)).astype(np.uint8))
    (place / LAST).write_text(json.dumps({"losses": {"regime0": list(losses)}}))


def test_the_report_says_what_was_measured(tmp_path, capsys):
    all_right = np.ones((6, len(FACTS)), bool)
    two_wrong = all_right.copy()
    two_wrong[:2, FACTS.index("motion")] = False
    fake(tmp_path, "a", all_right, np.arange(6) / 10, 0)
    fake(tmp_path, "d", two_wrong, np.arange(6) / 10 + 0.25, 1)
    fake(tmp_path, "e0", all_right, np.arange(6) / 10 + 0.1, 0)
    fake(tmp_path, "e1", two_wrong, np.arange(6) / 10 + 0.3, 1)
    rows = report.summary(report.read(tmp_path))
    assert list(rows) == ["a", "d", "e"]
    assert rows["a"]["whole"] == {"right": 1.0, "interval": [1.0, 1.0]}
    assert rows["d"]["whole"]["right"] == pytest.approx(4 / 6, abs=1e-4)
    assert rows["d"]["right"] == pytest.approx(22 / 24, abs=1e-4)
    # Paired: every clip is off by as much, so the interval has no width, though losses differ from clip to clip.
    assert rows["d"]["loss_over_a"]["regime0"] == {"mean": 0.25, "interval": [0.25, 0.25]}
    assert rows["e"]["whole_by_seed"] == [1.0, pytest.approx(4 / 6, abs=1e-4)]
    assert rows["e"]["loss_over_a"]["regime0"]["mean"] == pytest.approx(0.2)
    assert rows["d"]["quality"]["psnr"]["mean"] < 20
    (tmp_path / "recover_e0").mkdir()
    lines = [{"step": s, "validation": {"raw": {"mean": 1 / (1 + s)}}} for s in range(3)]
    lines.append({"step": 3, "seconds": 36.0, "loss": 0.1})
    (tmp_path / "recover_e0" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 0
    assert "| d FP8 + sparse, untrained | 0." in capsys.readouterr().out
    written = json.loads((tmp_path / "report" / "claim.json").read_text())
    assert written["hours"] == {"recover_e0": 0.01}
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "claim.json", "claim_density.png", "claim_steps.png", "claim_strips.png"
    }  # fmt: skip


def test_nothing_measured_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "has no measured/a; run the measure stage first" in capsys.readouterr().err


def test_an_interval_covers_its_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        low, high = share(rng.random(100) < 0.8)["interval"]
        covered.append(low <= 0.8 <= high)
    assert 0.89 <= np.mean(covered) <= 0.99
