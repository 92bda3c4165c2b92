"""Streams that begin with frames they are given: a clip that goes on, a picture, latents of another stream."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fps_jax import CausalConfig, CausalPipeline
from fps_jax.causal import CAUSAL_PRESETS
from fps_jax.media.images import load_image
from fps_jax.media.video import video_to_uint8
from fps_jax.models.vae import encode
from fps_jax.sampling import rollout
from fps_jax.sampling.given import latent_frames
from tests.fps_jax.sampling.boat import BOAT, CAUSAL, SIZE, STORM


@pytest.fixture(scope="module")
def clip():
    """Thirteen frames, four latent ones, smooth and of another size than the video."""
    t, y, x = np.mgrid[0:13, 0:40, 0:80].astype(np.float32)
    return np.stack([np.sin(x / 9 + t / 3), np.cos(y / 7 - t / 5), np.sin((x + y) / 11)], axis=-1) / 2 + 0.5


def same(got, want) -> bool:
    return np.array_equal(got.latents, want.latents) and np.array_equal(got.frames, want.frames)


@pytest.mark.parametrize("given", [1, 3])
def test_given_latents_are_as_if_they_had_been_made(pipe, boat, given):
    """Cache, noise, the VAE and what is forgotten go on from them: the rest has the bits of the stream that made them."""
    latents = np.concatenate([block.latents for block in boat[:given]], axis=1)
    blocks = list(pipe.stream(BOAT, seed=3, blocks=4 - given, given=latents, **SIZE))
    assert [block.given for block in blocks] == [True] * given + [False] * (4 - given)
    assert [block.index for block in blocks] == [0, 1, 2, 3]
    assert all(same(got, want) for got, want in zip(blocks, boat, strict=True))


def test_a_clip_goes_on(pipe, clip):
    """Its latents are the encoder's of the frames at the video's size; the whole video is the decoder's of all latents."""
    blocks = list(pipe.stream(BOAT, seed=3, blocks=1, given=clip, **SIZE))
    vae, params = pipe.wan.config.vae, pipe.wan.params["vae"]
    want = encode(vae, params, 2 * load_image(clip, 32, 48)[None] - 1)
    assert np.array_equal(np.concatenate([block.latents for block in blocks[:2]], axis=1), want[0])
    latents = np.concatenate([block.latents for block in blocks], axis=1)
    whole = video_to_uint8(pipe.wan.decode(jnp.asarray(latents[None]), tiling=False))
    assert np.array_equal(np.concatenate([block.frames for block in blocks]), whole)
    uint8 = pipe.session(BOAT, given=video_to_uint8(clip), **SIZE)
    assert np.abs(uint8.given - want).max() < 0.1
    assert not np.array_equal(uint8.given, want)


def test_a_picture_is_a_first_frame_that_is_a_block_of_its_own(pipe, clip, tmp_path):
    alone = CausalPipeline(pipe.wan, dataclasses.replace(CAUSAL, first_frame_alone=True))
    Image.fromarray(video_to_uint8(clip)[0]).save(tmp_path / "boat.png")
    first, second = alone.stream(BOAT, seed=3, blocks=1, given=tmp_path / "boat.png", **SIZE)
    assert (first.given, len(first.frames), first.latents.shape[1]) == (True, 1, 1)
    assert (second.given, len(second.frames), second.latents.shape[1]) == (False, 8, 2)
    again = list(alone.stream(BOAT, seed=3, blocks=1, given=video_to_uint8(clip)[0], **SIZE))
    assert same(again[1], second)
    session = alone.session(BOAT, seed=3, blocks=2, **SIZE)  # without a picture blocks are as ever
    assert [next(session).latents.shape[1] for _ in range(2)] == [1, 2]
    assert session.blocks == 2


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_session_is_saved_before_during_and_after_what_is_given(pipe, clip, tmp_path, done):
    session = pipe.session(BOAT, seed=3, blocks=3, given=clip, **SIZE)
    for _ in range(done):
        next(session)
    session.save(tmp_path / "boat.npz")
    want = list(session)
    assert len(want) == 5 - done
    got = list(pipe.load_session(tmp_path / "boat.npz"))
    assert [(b.index, b.given) for b in got] == [(b.index, b.given) for b in want]
    assert all(map(same, got, want))


def test_a_session_of_before_there_were_given_frames_goes_on(pipe, boat, tmp_path):
    """What version 1 wrote."""
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    next(session)
    session.save(tmp_path / "boat.npz")
    with np.load(tmp_path / "boat.npz") as file:
        arrays = dict(file)
    record = json.loads(arrays["record"].tobytes()) | {"version": 1}
    for name in ("given", "waiting", "blocks"):
        del record[name]
    np.savez(tmp_path / "boat.npz", **{**arrays, "record": np.frombuffer(json.dumps(record).encode(), np.uint8)})
    assert all(map(same, list(pipe.load_session(tmp_path / "boat.npz")), boat[1:]))


def test_prompts_change_over_given_frames_too(pipe, boat):
    """A recache computes them again under the new prompt, as it does frames that were made."""
    latents = np.concatenate([block.latents for block in boat[:1]], axis=1)
    made = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    given = pipe.session(BOAT, seed=3, blocks=3, given=latents, **SIZE)
    for session in (made, given):
        next(session)
        session.switch(STORM, "recache")
    assert same(next(given), next(made))


def test_a_cut_drops_what_is_still_to_be_given(pipe, clip, tmp_path):
    """It is of the video that ends."""
    session = pipe.session(BOAT, seed=3, blocks=2, given=clip, **SIZE)
    assert next(session).given
    session.switch(STORM, "cut")
    session.save(tmp_path / "boat.npz")
    blocks = list(session)
    assert [(block.given, block.prompt) for block in blocks] == [(False, STORM)] * 2
    assert len(blocks[0].frames) == 5, "the VAE begins again"
    assert all(map(same, pipe.load_session(tmp_path / "boat.npz"), blocks))
    session = pipe.session(BOAT, seed=3, blocks=2, given=clip, **SIZE)
    next(session)
    session.switch(STORM, "cut")
    next(session)
    session.save(tmp_path / "boat.npz")
    assert [block.index for block in pipe.load_session(tmp_path / "boat.npz")] == [2]


def test_a_given_block_that_is_broken_off_is_given_again(pipe, clip, monkeypatch):
    want = list(pipe.stream(BOAT, seed=3, blocks=1, given=clip, **SIZE))
    session = pipe.session(BOAT, seed=3, blocks=1, given=clip, **SIZE)
    real, calls = rollout._first_bad, []

    def broken_off(bad):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(bad)

    monkeypatch.setattr(rollout, "_first_bad", broken_off)
    got = [next(session)]
    with pytest.raises(KeyboardInterrupt):
        next(session)
    assert all(map(same, got + list(session), want))


@pytest.mark.parametrize(
    ("frames", "n", "alone", "latents"),
    [(9, 3, False, 3), (21, 3, False, 6), (81, 3, False, 21), (1, 3, True, 1), (13, 3, True, 4), (5, 1, False, 2)],
)  # fmt: skip
def test_frames_that_are_whole_blocks(frames, n, alone, latents):
    causal = CausalConfig(frames_per_block=n, first_frame_alone=alone)
    assert latent_frames(frames, 4, causal) == latents
    assert causal.blocks(latents)[-1][1] == latents


@pytest.mark.parametrize(
    ("frames", "alone", "message"),
    [
        (1, False, "given is one frame, which is one latent frame, and this model's first block has 3; give first_frame_alone=True "
         r"\(--first-frame-alone\), or 9 frames"),
        (5, False, "given has 5 frames, and this model's blocks end at 9, 21, 33, ... of them; give 9"),
        (13, False, "given has 13 frames, and .* 9, 21, 33, ... of them; give the last 9 of them"),
        (80, False, "give the last 69 of them"),
        (82, False, r"give the last 81 of them \(--video-frames 81\)"),
        (9, True, "given has 9 frames, and this model's blocks end at 1, 13, 25, ... of them; give the last 1 of them"),
        (26, True, "give the last 25 of them"),
    ],
)  # fmt: skip
def test_frames_that_are_no_whole_blocks_are_refused_with_those_that_are(frames, alone, message):
    causal = dataclasses.replace(CAUSAL_PRESETS["self-forcing"], first_frame_alone=alone)
    with pytest.raises(ValueError, match=message):
        latent_frames(frames, 4, causal)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((16, 3, 4, 6), np.float32), "given latent frames=3 are no whole blocks: k blocks of .*=2; use 2 or 4"),
        (np.zeros((16, 2, 4, 4), np.float32), r"given latents have shape \(16, 2, 4, 4\); this video needs \[16, frames, 4, 6\]"),
        (np.full((16, 2, 4, 6), np.nan, np.float32), "given latents hold NaN or inf"),
        (np.zeros((6, 32, 48, 3), np.uint8), "given has 6 frames, and this model's blocks end at 5, 13, 21"),
        (np.zeros((5, 32, 48, 4), np.uint8), r"given has shape \(5, 32, 48, 4\); it must be \[H, W, 3\] or \[B, H, W, 3\]"),
        (np.zeros((5, 48, 48, 1), np.float32), r"given has shape \(5, 48, 48, 1\); it must be"),
        (np.full((5, 32, 48, 3), 2.0, np.float32), r"given has values in \[2, 2\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_given_is_refused(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe.session(BOAT, given=given, **SIZE)


def test_nan_in_what_is_given_names_the_pass(pipe):
    """What isn't finite is refused at the door; this is of a model that makes it so."""
    huge = np.full((16, 2, 4, 6), 3e38, np.float32)
    with pytest.raises(FloatingPointError, match="latent frames 0 to 1, in the pass over the finished block"):
        next(pipe.session(BOAT, given=huge, **SIZE))
