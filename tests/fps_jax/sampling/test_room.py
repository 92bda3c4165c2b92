"""What a device has no room for: told before it is tried, as far as that is known, and in one line where XLA finds it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.models import vae
from fps_jax.sampling import rollout
from fps_jax.sampling import session as session_module
from tests.fps_jax.sampling.boat import BOAT, CAUSAL, SIZE


def test_a_cache_that_the_device_has_no_room_for_is_refused_with_what_fits(pipe, monkeypatch):
    longer = dataclasses.replace(pipe, causal=dataclasses.replace(CAUSAL, window=40))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(longer.session(BOAT, **SIZE).rollout.cache))
    monkeypatch.setattr(rollout, "memory_limit", lambda device: whole + 1000 - 1)
    monkeypatch.setattr(rollout, "memory_used", lambda device: 1000)
    message = r"cache of 40 latent frames takes .* GB left, which 19 blocks of 2 fit into; give a window, of 38 frames or less"
    with pytest.raises(ValueError, match=message):
        longer.session(BOAT, **SIZE)
    shorter = dataclasses.replace(pipe, causal=dataclasses.replace(CAUSAL, window=38))
    assert shorter.session(BOAT, **SIZE).rollout.layout.frames == 38


def no_memory(*args, **kwargs):
    """As the device says it."""
    return jnp.zeros(2**50, jnp.uint8).block_until_ready()


NO_MEMORY = (
    r"^a stream of 32 x 48 pixels: no memory left on a device, which has \d+\.\d GB \(Out of memory allocating 1125899906842624 "
    r"bytes\.\); use a window below 4 latent frames or kv_cache='fp8' or a smaller height and width$"
)


@pytest.mark.parametrize("where", ["denoise", "decode", "prompt"])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_the_device_finds_no_room_for_is_one_line_and_the_stream_goes_on(pipe, boat, monkeypatch, where, ahead):
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    blocks = [next(session)]
    module, name = {
        "denoise": (rollout, "_denoise_block"),
        "decode": (vae, "_decode_chunk"),
        "prompt": (session_module, "text_kv"),
    }[where]
    if where == "prompt":
        session.switch(BOAT)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, no_memory)
        with pytest.raises(MemoryError, match=NO_MEMORY):
            next(session.ahead() if ahead else session)
    for got, want in zip([*blocks, *session], boat, strict=True):
        assert np.array_equal(got.frames, want.frames)


def test_so_it_is_before_the_first_block_and_of_the_one_behind_it(pipe, boat, monkeypatch):
    monkeypatch.setattr(session_module, "text_kv", no_memory)
    with pytest.raises(MemoryError, match=NO_MEMORY):
        pipe.session(BOAT, **SIZE)
    monkeypatch.undo()
    narrow = dataclasses.replace(pipe, causal=dataclasses.replace(CAUSAL, window=2))
    session = narrow.session(BOAT, seed=3, kv_cache="fp8", **SIZE)
    real, calls = rollout._denoise_block, []

    def second(*args, **kwargs):
        calls.append(None)
        return no_memory() if len(calls) == 2 else real(*args, **kwargs)

    monkeypatch.setattr(rollout, "_denoise_block", second)
    blocks = session.ahead()
    next(blocks)
    with pytest.raises(MemoryError, match=r"bytes\.\); use a smaller height and width$"):
        next(blocks)
