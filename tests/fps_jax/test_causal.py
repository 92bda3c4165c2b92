"""What a causal model is told: blocks, attended frames, levels, and the settings that are refused."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fps_jax.causal import CAUSAL_PRESETS, CausalConfig
from fps_jax.sampling.flow import block_levels


def upstream_levels(causal: CausalConfig) -> tuple[Any, Any]:
    """Self-Forcing's FlowMatchScheduler(sigma_min=0, extra_one_step=True), its warp and its look-up, in float32 as there."""
    s: Any = np.linspace(np.float32(1), np.float32(0), 1001, dtype=np.float32)[:-1]
    c = np.float32(causal.shift)
    sigmas = c * s / (1 + (c - 1) * s)
    times = sigmas * np.float32(1000)
    told = np.asarray(causal.steps, np.float32)
    if causal.warp:
        told = np.append(times, np.float32(0))[1000 - told.astype(int)]
    return told, np.array([sigmas[np.abs(times - t).argmin()] for t in told])


@pytest.mark.parametrize(("preset", "told"), [
    ("self-forcing", [1000, 937.5, 833.33333, 625]),
    ("causvid-3", [1000, 757, 522]),
    ("causvid-4", [1000, 960, 888.88889, 727.27273]),
])  # fmt: skip
def test_presets_have_upstreams_levels(preset, told):
    causal = CAUSAL_PRESETS[preset]
    levels = block_levels(causal)
    want_told, want_sigmas = upstream_levels(causal)
    np.testing.assert_allclose(levels.timesteps, told, rtol=1e-6)
    # Upstream rounds to float32 five times on the way to a level, ours once: 6 x 6e-8.
    np.testing.assert_allclose(levels.timesteps, want_told, rtol=3.6e-7)
    np.testing.assert_allclose(levels.sigmas, np.append(want_sigmas, 0), rtol=3.6e-7)


def test_a_level_off_the_grid_is_looked_up():
    """CausVid's 757 and 522 are no levels of shift 8: the nearest are taken, as upstream, not t / 1000."""
    sigmas = block_levels(CAUSAL_PRESETS["causvid-3"]).sigmas
    assert abs(sigmas[1] - 0.757) > 2e-4
    assert abs(sigmas[2] - 0.522) > 2e-4


def by_definition(causal: CausalConfig, end: int) -> list[int]:
    """The rolling cache frame by frame: append the block, and drop the oldest frames behind the sink."""
    frames: list[int] = []
    for start, stop in causal.blocks(end):
        frames += range(start, stop)
        while causal.window is not None and len(frames) > causal.window:
            del frames[causal.sink]
    return frames


@st.composite
def configs(draw):
    n = draw(st.integers(1, 4))
    sink = draw(st.integers(0, 4))
    window = draw(st.one_of(st.none(), st.integers(sink + n, sink + n + 6)))
    alone = draw(st.booleans())
    return CausalConfig(frames_per_block=n, window=window, sink=0 if window is None else sink, first_frame_alone=alone)


@settings(deadline=None, max_examples=100)
@given(configs(), st.integers(0, 8))
def test_attended_frames_are_those_of_a_cache_that_drops_its_oldest(causal, blocks):
    end = causal.frames_per_block * blocks + causal.first_frame_alone
    if end:
        assert list(causal.attended(end)) == by_definition(causal, end)
        starts = [start for start, _ in causal.blocks(end)]
        assert starts == sorted({0, *range(int(causal.first_frame_alone), end, causal.frames_per_block)})
        assert all(start % causal.slot_frames == 0 for start in [*starts, end, causal.window or 0, causal.sink])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames_per_block": 0}, "frames_per_block=0 is not a whole number of 1 or more"),
        ({"frames_per_block": 3.0}, "frames_per_block=3.0 is not a whole number"),
        ({"steps": ()}, r"steps=\(\) is not a list of timesteps in \(0, 1000\]"),
        ({"steps": (1000, 0)}, "the closing 0 is left out"),
        ({"steps": (500, 750)}, r"steps=\[500, 750\] don't fall"),
        ({"steps": (1000, 757.5)}, "with warp=True are places on a grid of 1000, whole numbers; give warp=False"),
        ({"shift": 0}, "shift=0 is not a positive number"),
        ({"warp": 1}, "warp=1 is not True or False"),
        ({"first_frame_alone": "no"}, "first_frame_alone='no' is not True or False"),
        ({"context_noise": 1000}, r"context_noise=1000 is not a timestep in \[0, 1000\)"),
        ({"window": -1}, "window=-1 is not a whole number of latent frames; None attends all"),
        ({"window": 2}, "window=2 is less than frames_per_block=3, and a block attends itself; use 3 or more"),
        ({"sink": 3}, "sink=3 without a window"),
        ({"sink": -1}, "sink=-1 is not a whole number"),
        ({"window": 6, "sink": 6}, "use window=9 or more, or a sink of 3 or less"),
        ({"window": 6, "sink": 4}, "window=6 counts the sink=4 and the block of 3 frames"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CausalConfig(**changes)


@pytest.mark.parametrize(
    ("alone", "frames", "message"),
    [
        (False, 7, "latent frames=7 are no whole blocks: k blocks of frames_per_block=3; use 6 or 9"),
        (False, 2, "use 3"),
        (True, 6, "one frame and k blocks of frames_per_block=3; use 4 or 7"),
        (False, 0, "latent frames=0 is not a whole number of 1 or more"),
        (False, 3.0, "latent frames=3.0 is not a whole number"),
    ],
)
def test_frames_that_are_no_whole_blocks_are_refused(alone, frames, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CausalConfig(first_frame_alone=alone).blocks(frames)
    assert len(CausalConfig(first_frame_alone=True).blocks(1)) == 1


def test_no_block_starts_inside_another():
    with pytest.raises(ValueError, match="no block starts at latent frame 3; one frame and k blocks"):
        dataclasses.replace(CAUSAL_PRESETS["self-forcing"], first_frame_alone=True).block(3)


def test_settings_that_are_equal_are_one():
    """Plans and programs are kept by it."""
    listed: Any = [1000, 500]
    assert hash(CausalConfig(steps=listed)) == hash(CausalConfig(steps=(1000, 500)))
