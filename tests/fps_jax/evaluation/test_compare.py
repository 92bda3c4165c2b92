"""Two videos side by side: decoded alike, shown with their difference, and what is said of equal ones and of speed."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_jax.config import WAN_T2V_14B
from fps_jax.evaluation import compare
from fps_jax.evaluation.compare import Comparison, Run, plot, side_by_side
from fps_jax.evaluation.quality import psnr, ssim
from fps_jax.sampling.request import Request

SECONDS = {"sampling_first_call": 1.0, "denoising_step": 0.1, "decoding_first_call": 0.5}


def comparison(dense: np.ndarray, other: np.ndarray, **changes) -> Comparison:
    """Of two videos, as if they had been sampled."""
    runs = [Run(latents=np.zeros((1, 16, 1, 2, 2)), video=video, seconds=dict(SECONDS)) for video in (dense, other)]
    measured = {"psnr": psnr(other, dense), "ssim": ssim(other, dense), "latents_relative_l2": 0.25}
    return Comparison(attention="fps", dense=runs[0], other=runs[1], **measured | changes)


class Pipe:
    """Notes what it is asked for; its videos have one brightness."""

    config = WAN_T2V_14B
    show_progress = False

    def __init__(self, brightness=0.0, schedule=None):
        self.brightness, self.schedule, self.seen = brightness, schedule, []
        self.free = iter([True, False, False])

    def needs_tiling(self, *_):
        return next(self.free)

    def sample(self, request, callback):
        self.seen.append((request.setting(self.schedule), request.vae_tiling))
        return np.ones((1, 16, 1, 4, 4), np.float32)

    def decode(self, latents, *, tiling):
        self.seen.append(tiling)
        return np.full((1, 1, 32, 32, 3), self.brightness, np.float32)


def test_both_videos_are_decoded_alike_whatever_memory_is_free():
    pipe: Any = Pipe()
    compare.compare(pipe, Request(prompt="x", height=32, width=32, attention="fp8"))
    assert pipe.seen == [("dense", True), True, ("fp8", True), True]


def test_the_second_video_may_be_another_model_s_by_its_own_schedule():
    first: Any = Pipe()
    second: Any = Pipe(0.5, FPSSchedule(regimes=(Regime(until=1.0),)))
    found = compare.compare(first, Request(prompt="x", height=32, width=32), other=second)
    assert first.seen == [("dense", True), True]
    assert second.seen == [("fps", True), True]
    assert (found.attention, found.other.video.max(), found.dense.video.max()) == ("fps", 0.5, 0.0)


def test_one_prompt_at_a_time():
    with pytest.raises(ValueError, match=r"prompt=\['a', 'b'\] is not one text"):
        compare.compare(None, Request(prompt=["a", "b"]))  # pyright: ignore[reportArgumentType]


def test_side_by_side_shows_both_and_four_times_their_difference():
    rng = np.random.default_rng(0)
    dense = rng.integers(0, 256, (2, 32, 64, 3), np.uint8)
    other = np.clip(dense + rng.integers(-100, 100, dense.shape), 0, 255).astype(np.uint8)
    shown = side_by_side(comparison(dense, other))
    assert shown.shape == (2, 184, 968, 3)  # 64 pixels are enlarged to 320, beside gaps of 4 and below a bar of 24
    panels = [shown[:, 24:, left : left + 320 : 5][:, ::5] for left in (0, 324, 648)]
    np.testing.assert_array_equal(panels[0], dense)
    np.testing.assert_array_equal(panels[1], other)
    np.testing.assert_array_equal(panels[2], np.minimum(4 * np.abs(dense.astype(int) - other), 255))
    bars = [shown[:, :24, left : left + 320] for left in (0, 324, 648)]
    assert all(bar.max() > 150 for bar in bars)  # there is something written
    assert not np.array_equal(bars[0][0], bars[0][1])  # the frame's number
    assert np.array_equal(bars[2][0], bars[2][1])


@pytest.mark.parametrize("size", [(480, 832), (832, 480), (16, 16)])
def test_labels_do_not_run_into_each_other(size):
    video = np.zeros((1, *size, 3), np.uint8)
    setting = dataclasses.replace(comparison(video, video + np.uint8(128)), attention="sparse")
    shown = side_by_side(setting)
    width = (shown.shape[2] - 8) // 3
    bar = shown[0, : shown.shape[1] - size[0] * (width // size[1]), width + 4 : 2 * width + 4]
    written = np.flatnonzero((bar > 60).any(axis=(0, 2)))
    assert written[0] > 4
    assert written[-1] < width - 4
    assert np.diff(written).max() > 0.15 * width  # between setting and numbers


def test_equal_videos_are_said_to_be_equal(tmp_path):
    video = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)
    same = comparison(video, video, latents_relative_l2=0.0)
    assert "the same 3 frames, bit for bit" in same.summary()
    record = json.loads(json.dumps(same.record(), allow_nan=False))
    assert record["quality"]["psnr"]["frames"] == [None] * 3
    assert record["quality"]["ssim"] == {"mean": 1, "worst": 1, "worst_frame": 1, "frames": [1, 1, 1]}
    plot(same, tmp_path / "a.png")


def test_one_equal_frame_is_left_out_of_the_mean_in_words(tmp_path):
    dense = np.zeros((3, 16, 16, 3), np.float32)
    other = dense.copy()
    other[1], other[2] = 0.1, 0.01
    mixed = comparison(dense, other)
    assert "PSNR 30.00 dB over the 2 frames that differ (worst 20.00, frame 2)" in mixed.summary()
    assert mixed.record()["quality"]["psnr"]["mean"] is None
    plot(mixed, tmp_path / "a.png")


def test_seconds_of_a_step_leave_the_first_out():
    assert compare._seconds_a_step([(1, 60.0), (2, 61.0), (4, 66.0)]) == 2.0
    assert compare._seconds_a_step([(1, 60.0)]) is None
    video = np.zeros((1, 16, 16, 3), np.float32)
    slow = comparison(video, video + np.float32(0.1))
    slow.other.seconds["denoising_step"] = 0.4
    assert slow.speedup == 0.25
    assert ": 4.00 times slower (mean" in slow.summary()
    assert "These are times of a CPU, and say nothing of a GPU." in slow.summary()
    slow.dense.seconds["denoising_step"] = slow.other.seconds["denoising_step"] = None
    assert slow.record()["speedup_of_a_denoising_step"] is None
    assert "denoising step" not in slow.summary()
