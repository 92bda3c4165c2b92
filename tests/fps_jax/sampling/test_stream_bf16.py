"""Streams in bf16, as they are made unless float32 is asked for, with a cache in bf16 and with one of FP8 codes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax import CausalPipeline
from fps_jax.media.video import video_to_uint8
from fps_jax.sampling import rollout
from tests.checkpoints import T2V
from tests.fps_jax.sampling.boat import BOAT, CAUSAL, SIZE
from tests.reference import rel_l2


@pytest.fixture(scope="module")
def bf16() -> CausalPipeline:
    return CausalPipeline.from_pretrained(T2V, causal=CAUSAL)


@pytest.fixture(scope="module", params=["same", "fp8"])
def made(bf16, request, tmp_path_factory):
    """Five blocks that go round the ring twice, saved after the third: blocks, the file, programs after each block."""
    path = tmp_path_factory.mktemp("bf16") / "boat.npz"
    session, blocks, programs = bf16.session(BOAT, seed=3, kv_cache=request.param, **SIZE), [], []
    for i in range(5):
        if i == 3:
            session.save(path)
        blocks.append(next(session))
        programs.append(rollout._denoise_block._cache_size())
    return types.SimpleNamespace(session=session, blocks=blocks, path=path, programs=programs, kv_cache=request.param)


def test_the_cache_is_of_its_kind_and_no_program_is_compiled_after_the_second_block(made, bf16, boat):
    cache = made.session.rollout.cache
    assert {cache.k.dtype, cache.v.dtype} == {jnp.dtype(jnp.bfloat16 if made.kv_cache == "same" else jnp.uint8)}
    assert (cache.k_scale is None) == (made.kv_cache == "same")
    assert made.session.rollout.text.k.dtype == jnp.bfloat16
    assert made.programs[1:] == made.programs[1:2] * 4
    assert 1e-5 < rel_l2(made.blocks[0].latents, boat[0].latents) < 0.1, (
        "the same video as in float32, but for rounding"
    )


def test_a_stream_is_the_whole_video_decoded_at_once(made, bf16):
    """And made ahead, or by a second session, it has the same bits."""
    latents = np.concatenate([block.latents for block in made.blocks], axis=1)
    assert latents.dtype == np.float32
    whole = video_to_uint8(bf16.wan.decode(jnp.asarray(latents[None]), tiling=False))
    assert np.array_equal(np.concatenate([block.frames for block in made.blocks]), whole)
    again = bf16.session(BOAT, seed=3, kv_cache=made.kv_cache, **SIZE)
    for got, want in zip(again.ahead(), made.blocks, strict=False):
        assert np.array_equal(got.latents, want.latents)
        assert np.array_equal(got.frames, want.frames)
    assert rollout._denoise_block._cache_size() == made.programs[-1]


def test_a_saved_session_goes_on_with_the_same_bits(made, bf16):
    loaded = bf16.load_session(made.path)
    for want in made.blocks[3:]:
        got = next(loaded)
        assert np.array_equal(got.latents, want.latents)
        assert np.array_equal(got.frames, want.frames)
    for got, want in zip(*(jax.tree.leaves(s.rollout.cache) for s in (loaded, made.session)), strict=True):
        assert got.dtype == want.dtype
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    assert rollout._denoise_block._cache_size() == made.programs[-1]
