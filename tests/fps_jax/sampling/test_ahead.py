"""Blocks that begin while the one before is decoded: the same ones, in whatever way the loop is left."""

import dataclasses
import functools

import numpy as np
import pytest

from fps_jax.models import vae
from fps_jax.sampling import rollout
from fps_jax.sampling import session as session_module
from fps_jax.sampling.rollout import Rollout
from fps_jax.sampling.session import Session
from tests.fps_jax.sampling.boat import BOAT, SIZE, STORM
from tests.fps_jax.sampling.broken import break_off, break_off_at_line


def assert_same(got, want):
    assert (got.index, got.prompt, got.given) == (want.index, want.prompt, want.given)
    assert np.array_equal(got.latents, want.latents)
    assert np.array_equal(got.frames, want.frames)


def test_blocks_made_ahead_are_those_made_in_turn(pipe, boat):
    for got, want in zip(pipe.session(BOAT, seed=3, blocks=4, **SIZE).ahead(), boat, strict=True):
        assert_same(got, want)


def test_given_frames_come_first(pipe, boat):
    given = np.concatenate([block.latents for block in boat[:2]], axis=1)
    turn, ahead = (pipe.session(BOAT, seed=3, blocks=2, given=given, **SIZE) for _ in range(2))
    for got, want in zip(ahead.ahead(), turn, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("how", ["continue", "recache", "cut"])
def test_a_change_before_a_block_is_the_same_change(pipe, how):
    turn, ahead = (pipe.session(BOAT, seed=3, blocks=4, **SIZE) for _ in range(2))
    told = []

    def before():
        told.append((ahead.index, ahead.begun_frames))
        if ahead.index == 2:
            ahead.switch(STORM, how)

    blocks = list(ahead.ahead(before))
    for got in blocks:
        if got.index == 2:
            turn.switch(STORM, how)
        assert_same(got, next(turn))
    # Of a video's first two latent frames there are five frames, of others eight.
    assert told == [(0, 0), (1, 5), (2, 8), (3, 5 if how == "cut" else 8)]


def test_the_next_block_begins_between_telling_the_vae_and_waiting_for_it(pipe, monkeypatch):
    session, order = pipe.session(BOAT, seed=3, blocks=3, **SIZE), []
    for owner, name, label in ((session.rollout, "block", "denoise"), (session.decoder, "begin", "decode"),
                               (session.decoder, "frames", "frames")):  # fmt: skip
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, real=real, label=label, **kw: (order.append(label), real(*args, **kw))[1]
        )
    list(session.ahead())
    assert order == ["denoise", "decode", "denoise", "frames", "decode", "denoise", "frames", "decode", "frames"]


def test_a_prompt_is_of_the_next_block_to_begin(pipe):
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    blocks = session.ahead()
    next(blocks)
    session.prompt = STORM
    assert [block.prompt for block in blocks] == [BOAT, STORM, STORM]


@pytest.mark.parametrize("where", ["denoise", "begin", "second latent frame", "bytes"])
@pytest.mark.parametrize("on", ["next", "ahead"])
def test_what_is_broken_off_leaves_no_gap(pipe, boat, monkeypatch, where, on):
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    blocks = session.ahead()
    next(blocks)
    module, name = {
        "denoise": (rollout, "_first_bad"),
        "begin": (rollout, "_denoise_block"),
        "second latent frame": (vae, "_decode_chunk"),
        "bytes": (session_module, "video_to_uint8"),
    }[where]
    break_off(monkeypatch, module, name, 2 if where == "second latent frame" else 1)
    with pytest.raises(KeyboardInterrupt):
        next(blocks)
    for got, want in zip(session if on == "next" else session.ahead(), boat[1:], strict=True):
        assert_same(got, want)


# All that changes where a session is, but for the lines that hand a block over.
CHANGES = [getattr(Session, name) for name in ("_begin", "_decode", "_denoise", "_counted", "_finish")]
CHANGES += [Rollout.block, Rollout._advance, Rollout.check, vae.DecodeStream.begin]


def test_ctrl_c_before_a_line_leaves_no_gap(pipe):
    """In each block before a later one of the lines that make it, until there is none."""
    broken, whole = (pipe.session(BOAT, seed=3, **SIZE) for _ in range(2))
    for line in range(1, 500, 4):
        blocks = broken if line % 8 == 1 else broken.ahead()
        got = break_off_at_line(functools.partial(next, blocks), CHANGES, line)
        assert_same(next(broken) if got is None else got, next(whole))
        if got is not None:
            break
    assert line > 40


@pytest.mark.parametrize("window", [4, 2])
def test_a_nan_is_told_when_its_block_is_asked_for_and_a_cut_goes_on(pipe, monkeypatch, window):
    """Also where the window is one block, and none is kept for the next."""
    pipe = dataclasses.replace(pipe, causal=dataclasses.replace(pipe.causal, window=window))
    first, real = next(pipe.session(BOAT, seed=3, blocks=4, **SIZE)), session_module.block_noise
    monkeypatch.setattr(
        session_module,
        "block_noise",
        lambda seed, start, *rest: real(seed, start, *rest) * (np.nan if start == 2 else 1),
    )
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    blocks = session.ahead()
    assert_same(next(blocks), first)
    before = session.finished
    with pytest.raises(FloatingPointError, match="NaN or inf in the block of latent frames 2 to 3, in step 1 of 2"):
        next(blocks)
    assert (session.index, session.made, session.rollout.next_frame) == (1, 2, 2)
    assert len(session.finished) <= len(before)
    monkeypatch.setattr(session_module, "block_noise", real)
    session.switch(STORM, "cut")
    block = next(session)
    assert (block.index, len(block.frames)) == (1, 5)
    assert np.isfinite(block.latents).all()


def test_a_block_that_is_made_is_handed_out_before_the_error_of_the_next(pipe, boat, monkeypatch):
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    real = rollout._keep_block

    def no_room(*args, **kwargs):
        raise MemoryError("no room for a recache")

    monkeypatch.setattr(rollout, "_keep_block", no_room)
    got, before = [], lambda: session.switch(STORM, "recache") if session.index == 2 else None
    with pytest.raises(MemoryError, match="no room"):
        got.extend(session.ahead(before))
    for _ in range(2):  # block by block though it goes on
        with pytest.raises(MemoryError, match="no room"):
            next(session.ahead())
    monkeypatch.setattr(rollout, "_keep_block", real)
    turn = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    want = [next(turn), next(turn)]
    turn.switch(STORM, "recache")
    got2 = [*session.ahead()]
    for a, b in zip([*got, *got2], [*want, *turn], strict=True):
        assert_same(a, b)


def test_a_session_is_saved_once_what_is_begun_is_handed_out(pipe, boat, tmp_path):
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    next(session.ahead())
    with pytest.raises(ValueError, match=r"block 1 is not decoded yet; take it with next\(\) before you save"):
        session.save(tmp_path / "boat.npz")
    assert_same(next(session), boat[1])
    session.save(tmp_path / "boat.npz")
    for got, want in zip(pipe.load_session(tmp_path / "boat.npz"), boat[2:], strict=True):
        assert_same(got, want)
