"""A cache of FP8 codes: what it holds, that it is half as large, and that streams from it are saved and go on alike."""

import dataclasses
import functools
import json
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax import AttentionPlan
from fps_jax.attention.attend import PlannedAttention
from fps_jax.attention.cache import CacheLayout
from fps_jax.causal import CausalConfig
from fps_jax.models.dit import build_dit, dit
from fps_jax.models.dit_layers import TextKV
from fps_jax.models.params import abstract_params
from fps_jax.models.rope import rope_table
from fps_jax.sampling import rollout
from fps_jax.sampling.flow import block_levels
from fps_jax.sampling.guidance import Inputs
from fps_jax.sampling.rollout import Rollout
from fps_jax.sampling.solvers import coefficients
from pallas_kernels.reference import FP8, over_tokens
from tests.checkpoints import TINY, tiny_dit
from tests.fps_jax.sampling.boat import BOAT, SIZE
from tests.fps_jax.sampling.test_rollout import SPACE, draws, some_text
from tests.reference import rel_l2

CAUSAL = CausalConfig(frames_per_block=2, window=6, sink=2, steps=(1000, 500), context_noise=20.0)
BLOCKS = 6  # twice round a ring of two slots behind a sink


def rolled(scales: int | None) -> tuple[Rollout, np.ndarray]:
    kv = rollout.text_kv(TINY, tiny_dit(), jnp.asarray(some_text()), dtype=jnp.float32)
    layout = CacheLayout.build(CAUSAL, SPACE, tile=(2, 2, 3), scales_per_tile=scales)
    made = Rollout(TINY, tiny_dit(), kv, layout)
    latents = [np.asarray(made.block(*draws(i, made.next_shape(), 2))) for i in range(BLOCKS)]
    return made, np.concatenate(latents, axis=2)


@pytest.fixture(scope="module")
def codes():
    return rolled(1)


def size(cache) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(cache))


def test_the_codes_are_those_that_the_masked_forward_of_the_video_computes(codes):
    """The whole video at once, by a plan in FP8 whose V has a scale for each slot: keys and values to the last rounding."""
    made, latents = codes
    frames = 2 * BLOCKS
    plan = AttentionPlan.build((frames, *SPACE), (2, 2, 3), None, 1, causal=CAUSAL)

    @dataclasses.dataclass(frozen=True)
    class Seen(PlannedAttention):
        def __call__(self, q, k, v, /, *, layer, taps):
            kept = made.layout.kept(k, v)
            assert kept.k_scale is not None
            assert kept.v_scale is not None
            k8, v8 = (jax.lax.bitcast_convert_type(x, FP8).astype(jnp.float32) for x in (kept.k, kept.v))
            taps["k"] = k8 * over_tokens(kept.k_scale, k.shape[1])[..., None]
            taps["v"] = v8 * over_tokens(kept.v_scale, v.shape[1])
            return super().__call__(q, k, v, layer=layer, taps=taps)

    @functools.partial(jax.jit, static_argnums=0)
    def masked(attention, latents):
        taps = {}
        time = jnp.full((1, frames), 20.0)
        dit(TINY, tiny_dit(), latents, time, some_text(), attention=attention, attention_taps=taps)
        return taps

    taps = masked(Seen(plan, implementation="portable"), jnp.asarray(latents))
    attended = np.array(CAUSAL.attended(frames))
    assert attended.tolist() == [0, 1, 8, 9, 10, 11]
    cache = made.cache
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    keys, values = (jax.lax.bitcast_convert_type(x, FP8).astype(jnp.float32) for x in (cache.k, cache.v))
    k = keys * jax.vmap(over_tokens, (0, None))(cache.k_scale, cache.k.shape[2])[..., None]
    v = values * jax.vmap(over_tokens, (0, None))(cache.v_scale, cache.v.shape[2])
    for part, x in (("k", k), ("v", v)):
        whole = jax.vmap(plan.from_tiles)(taps[part]).reshape(3, 1, frames, 6, 2, 32)
        want = np.asarray(whole[:, :, attended].reshape(3, 1, 36, 2, 32))
        got = np.asarray(made.layout.read(x, frames))
        # Sums in another order decide a few roundings the other way: a step of e4m3, a sixteenth
        off = np.abs(got - want) > 1e-5 * np.abs(want).max()
        assert off.mean() < 0.01
        assert rel_l2(got, want) <= 5e-3


def test_latents_are_as_far_off_as_fp8_makes_them_and_the_cache_is_a_quarter_of_float32s(codes):
    made, latents = codes
    plain, exact = rolled(None)
    error = rel_l2(latents, exact)
    assert 1e-4 < error < 0.1
    assert made.cache.k.dtype == made.cache.v.dtype == jnp.uint8
    scales = size(made.cache.k_scale) + size(made.cache.v_scale)
    assert size(made.cache) - scales == size(plain.cache) // 4


def test_the_cache_of_codes_is_donated_and_no_second_one_is_made():
    """What is beside it doesn't grow with the layers, but for the block's own keys and values, of one frame in 64."""
    causal = CausalConfig(frames_per_block=1, window=64, steps=(1000, 500))
    layout = CacheLayout.build(causal, SPACE, tile=(1, 2, 3), scales_per_tile=1)
    spec: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    place = rope_table((1, *SPACE), 32), layout.context(0)

    def compiled(layers: int) -> tuple[int, int]:
        """(bytes of the cache, bytes beside it)."""
        config = dataclasses.replace(TINY, num_layers=layers)
        cache = jax.eval_shape(lambda: layout.zeros(layers, 1, 2, 32, jnp.float32))
        text = TextKV(*(spec((layers, 1, 512, 2, 32)),) * 2)
        lowered = rollout._denoise_block.lower(
            abstract_params(build_dit(config)),
            Inputs(spec((1, 16, 1, 4, 6)), text, step_noise=spec((2, 1, 16, 1, 4, 6))),
            cache,
            *place,
            coefficients("lcm", block_levels(causal)),
            spec(()),
            config=config,
            layout=layout,
            dtype=jnp.dtype("float32"),
        )
        memory: Any = lowered.compile().memory_analysis()
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))
        assert memory.alias_size_in_bytes >= held
        return held, memory.temp_size_in_bytes

    (less, beside_less), (more, beside_more) = compiled(4), compiled(24)
    assert beside_more - beside_less < (more - less) / 4


def test_a_session_with_codes_is_saved_and_goes_on_with_the_same_bits(pipe, tmp_path):
    session = pipe.session(BOAT, seed=3, kv_cache="fp8", **SIZE)
    for _ in range(3):
        next(session)
    session.save(tmp_path / "boat.npz")
    want = next(session)
    again = pipe.load_session(tmp_path / "boat.npz")
    assert again.rollout.cache.k.dtype == jnp.uint8
    got = next(again)
    assert np.array_equal(got.latents, want.latents)
    assert np.array_equal(got.frames, want.frames)
    plain = pipe.session(BOAT, seed=3, **SIZE)
    for _ in range(4):
        other = next(plain)
    assert 0 < rel_l2(want.latents, other.latents) < 0.1


def test_a_session_that_an_earlier_version_saved_is_read(pipe, boat, tmp_path):
    """Version 2 knew no codes."""
    session = pipe.session(BOAT, seed=3, blocks=4, **SIZE)
    for _ in range(3):
        next(session)
    session.save(tmp_path / "new.npz")
    with zipfile.ZipFile(tmp_path / "new.npz") as new, zipfile.ZipFile(tmp_path / "old.npz", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name == "record.npy":
                with new.open(name) as member:
                    record = json.loads(np.lib.format.read_array(member).tobytes())
                del record["arguments"]["kv_cache"]
                with old.open(name, "w") as member:
                    text = json.dumps(record | {"version": 2}).encode()
                    np.lib.format.write_array(member, np.frombuffer(text, np.uint8), allow_pickle=False)
                continue
            old.writestr(name, content)
    assert np.array_equal(next(pipe.load_session(tmp_path / "old.npz")).latents, boat[3].latents)


def test_another_format_is_refused(pipe):
    with pytest.raises(ValueError, match="kv_cache='int4' is not one of 'same', 'fp8'"):
        pipe.session(BOAT, kv_cache="int4", **SIZE)
