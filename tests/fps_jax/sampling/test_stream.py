"""Streams of the tiny checkpoint: frames as they are made, prompts that change, and what is refused."""

import dataclasses
import logging
import os
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax import CausalPipeline
from fps_jax.causal import CAUSAL_PRESETS
from fps_jax.checkpoints.open import open_model
from fps_jax.config import WAN_T2V_1_3B, WAN_T2V_14B, WanConfig
from fps_jax.media.video import video_to_uint8
from fps_jax.models import vae
from fps_jax.models.vae import DecodeStream
from fps_jax.sampling import rollout
from fps_jax.sampling import session as session_module
from fps_jax.sampling import stream as stream_module
from fps_jax.sampling.block_noise import block_noise
from fps_jax.sampling.pipeline import WanPipeline
from fps_jax.sampling.rollout import Rollout
from fps_jax.sampling.stream_plan import causal_of
from tests.checkpoints import T2V, TINY_I2V
from tests.fps_jax.attention.test_block_causal import case
from tests.fps_jax.sampling.boat import BOAT, CAUSAL, SIZE, STORM
from tests.fps_jax.sampling.broken import break_off
from tests.reference import rel_l2


def test_a_stream_is_the_video_of_its_latents(pipe, boat):
    """Block after block gives the bits of the whole latents decoded at once."""
    assert [block.frames.shape for block in boat] == [(5, 32, 48, 3)] + [(8, 32, 48, 3)] * 3
    assert [block.index for block in boat] == [0, 1, 2, 3]
    assert all(block.prompt == BOAT and set(block.seconds) == {"denoise", "decode"} for block in boat)
    latents = np.concatenate([block.latents for block in boat], axis=1)
    whole = video_to_uint8(pipe.wan.decode(jnp.asarray(latents[None]), tiling=False))
    assert np.array_equal(np.concatenate([block.frames for block in boat]), whole)


def test_blocks_and_window_do_not_change_what_is_made_before_they_matter(pipe, boat):
    """Made a second time, without end: the same bits."""
    session = pipe.session(BOAT, seed=3, **SIZE)
    for block in boat[:2]:
        assert np.array_equal(next(session).latents, block.latents)
    other = next(pipe.stream(BOAT, seed=4, blocks=4, **SIZE))
    assert rel_l2(other.latents, boat[0].latents) > 1e-3


def test_noise_is_of_seed_frame_and_step_alone():
    three = np.asarray(block_noise(7, 3, 4, (1, 16, 3, 4, 6)))
    one = np.asarray(block_noise(7, 4, 4, (1, 16, 1, 4, 6)))
    assert three.shape == (5, 1, 16, 3, 4, 6)
    assert np.array_equal(three[:, :, :, 1:2], one)
    assert not three[4].any()
    drawn = three[:4].transpose(0, 3, 1, 2, 4, 5).reshape(12, -1)
    assert abs(np.corrcoef(drawn) - np.eye(12)).max() < 0.2, "all draws differ"
    with jax.threefry_partitionable(True):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), 5), 2)
        assert np.array_equal(jax.random.normal(key, (16, 4, 6)), three[2, 0, :, 2])


def test_a_prompt_that_changes_is_a_splice(pipe, boat):
    """The blocks before it are as they were; those behind it are the new text's, from the old cache."""
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    latents = [next(session).latents for _ in range(2)]
    session.prompt = "never seen"
    session.prompt = STORM  # the newest wins
    assert session.prompt == STORM
    blocks = list(session)
    assert [block.prompt for block in blocks] == [STORM, STORM]
    for got, want in zip(latents, boat, strict=False):
        assert np.array_equal(got, want.latents)
    assert rel_l2(blocks[0].latents, boat[2].latents) > 1e-4
    kv = [
        rollout.text_kv(pipe.wan.config.dit, pipe.wan.params["dit"], pipe.wan.encode_prompt(p), dtype=jnp.float32)
        for p in (BOAT, STORM)
    ]
    spliced = Rollout(pipe.wan.config.dit, pipe.wan.params["dit"], kv[0], session.rollout.layout)
    for i in range(3):
        spliced.text = kv[i == 2]
        noise = block_noise(3, 2 * i, 2, spliced.next_shape())
        made = spliced.block(noise[0], noise[1:])
    assert np.array_equal(np.asarray(made)[0], blocks[0].latents)


def test_recache_is_a_cache_that_the_new_prompt_made(pipe):
    """Nothing has left the window yet: the next block is that of a video given under the new prompt."""
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    first = next(session).latents
    session.switch(STORM, "recache")
    got = next(session).latents
    fresh = pipe.session(STORM, seed=3, blocks=4, **SIZE)
    fresh.rollout.give(first[None])
    noise = block_noise(3, 2, 2, fresh.rollout.next_shape())
    assert np.array_equal(fresh.rollout.block(noise[0], noise[1:])[0], got)
    session.switch(BOAT, "recache")  # the window has left the first block behind: only the second is computed again
    assert np.isfinite(next(session).latents).all()
    assert session.rollout.next_frame == 6


def test_a_cut_begins_another_video(pipe):
    session = pipe.session(BOAT, seed=3, **SIZE)
    next(session)
    session.switch(STORM, "cut")
    block = next(session)
    assert len(block.frames) == 5, "the VAE begins again too"
    assert session.rollout.next_frame == 2
    other = next(pipe.stream(STORM, seed=3, blocks=4, **SIZE))
    assert rel_l2(block.latents, other.latents) > 1e-3, "its noise is not that of the first video"


def test_a_bad_prompt_leaves_the_stream_as_it_was(pipe, boat):
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    next(session)
    with pytest.raises(ValueError, match="prompt='  ' is not a text; give a few words"):
        session.prompt = "  "
    with pytest.raises(ValueError, match="how='fade' is not one of 'continue', 'recache', 'cut'"):
        session.switch(STORM, "fade")
    assert np.array_equal(next(session).latents, boat[1].latents)


def test_the_decoded_video_is_the_originals(pipe):
    g = case("global_init3")
    decoder = DecodeStream(pipe.wan.config.vae, pipe.wan.params["vae"])
    parts = np.split(np.moveaxis(g["out.latents"], 1, 2), 3, axis=2)
    video = 0.5 * np.concatenate([decoder.push(part) for part in parts]) + 0.5
    assert rel_l2(np.moveaxis(video, -1, 1)[[0, 1, 16, 32]], g["out.video"][0]) <= 1e-5


def test_a_model_without_a_window_has_one_where_there_is_no_end(pipe, caplog):
    endless = CausalPipeline.of(pipe.wan, dataclasses.replace(CAUSAL, window=None))
    with caplog.at_level(logging.INFO, "fps_jax"):
        layout = endless.session(BOAT, **SIZE).rollout.layout
    assert layout.frames == layout.causal.window == 20, "whole blocks of two in the 21 frames of training"
    assert "a block attends the last 20 latent frames" in caplog.text
    assert endless.session(BOAT, blocks=12, **SIZE).rollout.layout.frames == 24


def test_a_prompt_that_comes_while_another_is_applied_is_not_lost(pipe, monkeypatch):
    """It may come from another thread."""
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    session.switch("on the way", "continue")
    real = session._kv

    def kv(text):
        session.switch(STORM)
        return real(text)

    session.switch("on the way", "cut")
    monkeypatch.setattr(session, "_kv", kv)
    assert next(session).prompt == "on the way"
    monkeypatch.undo()
    assert session.pending == (STORM, "continue")
    assert next(session).prompt == STORM
    assert session.pending is None


def test_a_cut_that_another_prompt_follows_is_a_cut_still(pipe, boat):
    session = pipe.session("Nothing.", seed=3, blocks=4, **SIZE)
    next(session)
    session.switch(STORM, "cut")
    session.switch(BOAT)
    assert session.pending == (BOAT, "cut")
    assert next(session).frames.shape[0] == 5  # a video's first
    session.switch(STORM)
    assert session.pending == (STORM, "continue")


def test_a_paused_stream_makes_no_block_until_it_is_resumed(pipe, boat, tmp_path):
    session, made = pipe.session(BOAT, seed=3, blocks=4, **SIZE), []
    assert np.array_equal(next(session).latents, boat[0].latents)
    session.pause()
    asks = threading.Thread(target=lambda: made.extend(session), daemon=True)
    asks.start()
    asks.join(0.3)
    assert asks.is_alive()
    assert not made
    session.save(tmp_path / "paused.npz")
    session.resume()
    asks.join(120)
    assert [block.index for block in made] == [1, 2, 3]
    assert np.array_equal(made[-1].latents, boat[3].latents)
    assert np.array_equal(next(pipe.load_session(tmp_path / "paused.npz")).latents, boat[1].latents)  # it isn't paused


SOAK = """
import ctypes, gc, pathlib, resource, sys, jax
from fps_jax import CausalConfig, CausalPipeline
causal = CausalConfig(frames_per_block=2, window=4, steps=(1000, 500))
pipe = CausalPipeline.from_pretrained(sys.argv[1], causal=causal, dtype="float32")
for block in pipe.session("A boat sails.", height=32, width=48):
    if block.index in (4, 100, 200):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept for later isn't held
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        print(sum(array.nbytes for array in jax.live_arrays()), resident)
    if block.index == 200:
        break
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="what a process holds is read from /proc, and glibc is asked to trim it"
)
def test_two_hundred_blocks_take_the_memory_of_four():
    """Of the device to the byte, once the window has gone round twice; of the host less than 1 MB for 100 blocks.

    In a process of its own: with the hundreds of threads that our eight devices take, malloc's arenas grow for long.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    env["MALLOC_ARENA_MAX"] = "1"
    done = subprocess.run([sys.executable, "-c", SOAK, str(T2V)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    (device, _), (_, before), (later, after) = ([int(n) for n in line.split()] for line in done.stdout.splitlines())
    assert later == device
    assert after - before < 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt='' is not a text"),
        ({"prompt": ["a", "b"]}, "is not a text; give a few words"),
        ({"blocks": 0}, "blocks=0 is not a whole number of 1 or more; None is a stream without end"),
        ({"seed": -1}, "seed=-1 is not in"),
        ({"seed": [3]}, r"seed=\[3\] is not a whole number"),
        ({"height": 40}, "height=40 is not a positive multiple of 16"),
        ({"tile": (3, 1, 1)}, "is larger than the grid"),
    ],
)
def test_bad_requests_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.session(**{"prompt": BOAT, **SIZE, **arguments})


def test_a_checkpoint_says_how_it_makes_blocks_or_somebody_has_to(pipe, monkeypatch):
    with pytest.raises(ValueError, match="doesn't say how it makes blocks; give causal='self-forcing' or"):
        CausalPipeline.of(pipe.wan)
    monkeypatch.setattr(WanPipeline, "from_pretrained", None)  # what follows is told before any weights are read
    with pytest.raises(ValueError, match="doesn't say how it makes blocks"):
        CausalPipeline.from_pretrained(T2V)
    with pytest.raises(ValueError, match="this is a i2v model; block diffusion is for t2v models"):
        causal_of(WanConfig(dit=TINY_I2V), CAUSAL)
    with pytest.raises(ValueError, match="causal='wan' is not one of 'self-forcing'"):
        CausalPipeline.from_pretrained(T2V, causal="wan")  # pyright: ignore[reportArgumentType]
    config = dataclasses.replace(pipe.wan.config, causal=CAUSAL)
    assert CausalPipeline.of(dataclasses.replace(pipe.wan, config=config)).causal == CAUSAL
    assert "causal" not in pipe.wan.config.to_dict()
    record = config.to_dict()
    record["causal"]["steps"] = list(record["causal"]["steps"])  # as JSON has it
    assert WanConfig.from_dict(record) == config
    with pytest.raises(ValueError, match="causal is set for a i2v model"):
        WanConfig(dit=TINY_I2V, causal=CAUSAL)


def test_a_preset_of_a_smaller_model_is_refused_before_weights_are_read(monkeypatch):
    """All presets are of models that were made from the 1.3B; a CausalConfig is for any."""
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda *args, **kwargs: None)
    model = dataclasses.replace(open_model(T2V), config=WAN_T2V_14B)
    monkeypatch.setattr(stream_module, "open_model", lambda path: model)
    message = (
        "^preset='self-forcing' is of Wan2.1-T2V-1.3B, and this DiT has 40 layers of width 5120; leave it out, and give "
        "CausalPipeline.from_pretrained a CausalConfig$"
    )
    with pytest.raises(ValueError, match=message):
        CausalPipeline.from_pretrained("14B", causal="self-forcing")
    assert CausalPipeline.from_pretrained("14B", causal=CAUSAL).causal == CAUSAL
    assert causal_of(WAN_T2V_1_3B, "self-forcing") == CAUSAL_PRESETS["self-forcing"]
    deeper = WanConfig(dit=dataclasses.replace(WAN_T2V_1_3B.dit, num_layers=31))
    with pytest.raises(ValueError, match="this DiT has 31 layers of width 1536"):
        causal_of(deeper, "self-forcing")


def test_guidance_is_answered_with_the_distilled_models_way(pipe):
    for name, value in (("guidance_scale", 5), ("negative_prompt", "blurred"), ("cfg", 5)):
        with pytest.raises(
            TypeError, match=f"^{name} is no argument of a stream; leave it out: guidance is distilled in"
        ):
            pipe.stream(BOAT, **{name: value})
    for name, answer in (
        ("frame_num", ""),
        ("widht", "; did you mean width?"),
        ("cpu", ""),
        ("generator", "; use seed"),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is no argument of a stream{re.escape(answer)}"):
            pipe.session(BOAT, **{name: 5})


def test_a_saved_checkpoint_says_how_it_makes_blocks(pipe, boat, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = CausalPipeline.from_pretrained(tmp_path / "model", dtype="float32")
    assert again.causal == CAUSAL
    assert np.array_equal(next(again.stream(BOAT, seed=3, blocks=4, **SIZE)).latents, boat[0].latents)


@pytest.mark.parametrize("where", ["denoise", "second latent frame", "bytes"])
def test_a_block_that_is_broken_off_leaves_no_gap(pipe, boat, tmp_path, monkeypatch, where):
    """Whatever breaks off (Ctrl-C, no memory), the next call goes on with that block."""
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    next(session)
    module, name = {
        "denoise": (rollout, "_first_bad"),
        "second latent frame": (vae, "_decode_chunk"),
        "bytes": (session_module, "video_to_uint8"),
    }[where]
    break_off(monkeypatch, module, name, 2 if where == "second latent frame" else 1)
    with pytest.raises(KeyboardInterrupt):
        next(session)
    if where != "denoise":
        with pytest.raises(ValueError, match=r"block 1 is not decoded yet; take it with next\(\) before you save"):
            session.save(tmp_path / "boat.npz")
    for got, want in zip(session, boat[1:], strict=True):
        assert got.index == want.index
        assert np.array_equal(got.latents, want.latents)
        assert np.array_equal(got.frames, want.frames)


def test_a_recache_that_is_broken_off_is_made_whole(pipe, monkeypatch):
    def begin():
        session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
        list(zip(range(2), session, strict=False))
        session.switch(STORM, "recache")
        return session

    want = begin()
    session = begin()
    real, calls = rollout._first_bad, []

    def broken_off(bad):
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(bad)

    monkeypatch.setattr(rollout, "_first_bad", broken_off)
    with pytest.raises(KeyboardInterrupt):
        next(session)
    assert session.pending == (STORM, "recache")
    assert session.rollout.next_frame == 4
    got = next(session)
    assert got.prompt == STORM
    assert np.array_equal(got.latents, next(want).latents)
