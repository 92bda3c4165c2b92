"""Pixels, latents and tokens: Wan's VAE takes 4k + 1 frames, of 8 x 8 pixels a latent; the DiT's patches are 1 x 2 x 2."""

import math

import pytest

from fps_jax.sizes import (
    MAX_LATENTS,
    check_frame,
    check_integer_up_to,
    latent_grid,
    most_frames,
    token_grid,
    video_size,
)


@pytest.mark.parametrize(
    ("video", "latents", "tokens"),
    [
        ((480, 832, 81), (21, 60, 104), (21, 30, 52)),
        ((720, 1280, 81), (21, 90, 160), (21, 45, 80)),
        ((16, 32, 1), (1, 2, 4), (1, 1, 2)),
        ((16, 16, 5), (2, 2, 2), (2, 1, 1)),
    ],
)
def test_sizes_of_one_video(video, latents, tokens):
    assert latent_grid(*video) == latents
    assert video_size(latents) == video
    assert token_grid(latents) == tokens


def test_the_most_frames_are_the_last_number_that_the_vae_takes():
    for frames in range(1, 30):
        assert most_frames(frames) == max(n for n in range(1, frames + 1, 4))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ((480, 832, 0), r"num_frames=0 is not 4k\+1 .*; use 1$"),
        ((480, 832, 4), r"num_frames=4 is not 4k\+1 .*; use 5$"),
        ((480, 832, 6), r"num_frames=6 is not 4k\+1 .*; use 5$"),
        ((8, 832, 1), r"height=8 is not a positive multiple of 16 .*; use 16$"),
        ((480, 840, 1), r"width=840 is not a positive multiple of 16 .*; use 832$"),
    ],
)
def test_a_frame_that_cant_be_says_the_nearest(frame, message):
    with pytest.raises(ValueError, match=message):
        check_frame(*frame)


def test_the_smallest_frame_and_the_most_latents_are_taken():
    check_frame(16, 16, 1)
    side = 8 * math.isqrt(MAX_LATENTS)
    check_frame(side, side, 1)
    with pytest.raises(ValueError, match="latents, more than 16,777,216"):
        check_frame(side, side + 16, 1)


def test_a_bound_is_itself_allowed():
    check_integer_up_to("num_frames", 5, 5, "a bound")
    with pytest.raises(ValueError, match="num_frames=6 is above 5, a bound; use fewer"):
        check_integer_up_to("num_frames", 6, 5, "a bound")
