"""Rollouts from a cache against the original code, call by call, and against the masked forward of the whole video."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax import AttentionPlan
from fps_jax.attention.attend import PlannedAttention
from fps_jax.attention.cache import CacheLayout
from fps_jax.causal import CAUSAL_PRESETS, CausalConfig
from fps_jax.config import DiTConfig
from fps_jax.models.dit import build_dit, dit
from fps_jax.models.dit_layers import TextKV
from fps_jax.models.params import abstract_params
from fps_jax.models.rope import rope_table
from fps_jax.sampling import rollout
from fps_jax.sampling.flow import block_levels
from fps_jax.sampling.guidance import Inputs, guided_velocity
from fps_jax.sampling.rollout import Rollout
from fps_jax.sampling.solvers import coefficients
from tests.checkpoints import TINY, TINY_I2V, tiny_dit
from tests.fps_jax.attention.test_block_causal import case
from tests.reference import rel_l2

SPACE = (2, 3)  # tokens of the original's frames


def begin(
    causal: CausalConfig, text, num_frames=None, tile=None, config: DiTConfig = TINY, params=None, **kwargs
) -> Rollout:
    layout = CacheLayout.build(causal, SPACE, num_frames=num_frames, tile=tile or (causal.slot_frames, 2, 3))
    params = tiny_dit() if params is None else params
    kv = rollout.text_kv(TINY, params, jnp.asarray(text), dtype=jnp.float32)
    return Rollout(config, params, kv, layout, **kwargs)


def draws(seed: int, shape: tuple[int, ...], steps: int = 4):
    """Noise of a block, and what is added after each step."""
    r = np.random.default_rng(seed)
    return r.standard_normal(shape, np.float32), r.standard_normal((steps, *shape), np.float32)


def some_text(seed=1, batch=1):
    return np.random.default_rng(seed).standard_normal((batch, 7, 32), np.float32)


@pytest.fixture
def velocities(monkeypatch):
    """The model's, of each call while the test runs."""
    seen: list[np.ndarray] = []

    def record(*args, **kwargs):
        out = guided_velocity(*args, **kwargs)
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), out.velocity, ordered=True)
        return out

    monkeypatch.setattr(rollout, "guided_velocity", record)
    for block in (rollout.denoise_block, rollout.keep_block):  # in programs of this test alone
        own = jax.jit(functools.partial(block), static_argnames=rollout._STATIC)
        monkeypatch.setattr(rollout, f"_{block.__name__}", own)
    return seen


@pytest.mark.parametrize(("name", "causal", "tile"), [
    ("global_b2", CausalConfig(), None),
    ("global_init3", CausalConfig(), (3, 1, 2)),
    ("local6_sink0", CausalConfig(window=6), (1, 2, 3)),
    ("local6_sink1", CausalConfig(window=6, sink=1), None),
    ("local6_sink3", CausalConfig(window=6, sink=3), None),
])  # fmt: skip
def test_rollouts_are_the_originals(name, causal, tile, velocities):
    """Every call's flow, the latents, and the keys and values that are left, from one end to the other."""
    g = case(name)
    frames = g["out.latents"].shape[1]
    made = begin(causal, g["in.prompt_embeds_first32"], None if causal.window else frames, tile)
    latents = []
    if "in.initial_latent" in g:
        latents.append(np.moveaxis(g["in.initial_latent"], 1, 2))
        made.give(jnp.asarray(latents[0]))
    noise = np.moveaxis(g["in.noise"], 1, 2)
    batch, _, count = noise.shape[:3]
    for block in range(count // 3):
        fresh = [g[f"renoise{3 * block + i:02d}"].reshape(batch, 3, 16, 4, 6) for i in range(3)]
        fresh = np.stack([*(np.moveaxis(x, 1, 2) for x in fresh), np.zeros((batch, 16, 3, 4, 6), np.float32)])
        latents.append(np.asarray(made.block(noise[:, :, 3 * block : 3 * block + 3], fresh)))
    assert rel_l2(np.concatenate(latents, axis=2), np.moveaxis(g["out.latents"], 1, 2)) <= 1e-5
    jax.effects_barrier()
    assert len(velocities) == sum(name.startswith("flow") for name in g)
    for call, v in enumerate(velocities):
        assert rel_l2(np.moveaxis(v[:, ::4], 2, 1), g[f"flow{call:02d}"]) <= 1e-5, call
    kept = {"k": made.cache.k, "v": made.cache.v}
    for layer in (0, 2):
        for part, x in kept.items():
            got = made.layout.read(x, frames)[layer][..., ::2]
            assert rel_l2(got, g[f"out.layer{layer}.{part}"]) <= 1e-5


@pytest.fixture(scope="module")
def rolled():
    """Ten blocks of two frames that go round a ring of two slots behind a sink: (rollout, latents, the last block's noise)."""
    causal = CausalConfig(frames_per_block=2, window=6, sink=2, steps=(1000, 500), context_noise=20.0)
    made = begin(causal, some_text())
    latents = [np.asarray(made.block(*draws(i, made.next_shape(), 2))) for i in range(10)]
    return made, latents


def masked_keys(made, latents, text, earlier=None, since=0):
    """Keys and values `[L, 1, F, tokens, N, H]` of a whole video at once, each block told the time of the pass that filled the
    cache; and as they are stored.

    earlier: of another such forward, those of the frames before `since`, which the others attend in place of their own.
    """
    causal, frames = made.causal, latents.shape[2]
    plan = AttentionPlan.build((frames, *SPACE), (causal.slot_frames, 2, 3), quantize=False, causal=causal)
    before = plan.layout.to_tiles(jnp.repeat(jnp.arange(frames) < since, SPACE[0] * SPACE[1])[None, :, None])[..., None]

    class Seen(PlannedAttention):
        def __call__(self, q, k, v, /, *, layer, taps):
            if earlier is not None:
                k, v = (jnp.where(before, whole[layer], own) for whole, own in zip(earlier, (k, v), strict=True))
            taps["k"], taps["v"] = k, v
            return super().__call__(q, k, v, layer=layer, taps=taps)

    @jax.jit
    def masked(latents):
        taps, attention = {}, Seen(plan, implementation="portable")
        time = jnp.full((1, frames), float(causal.context_noise))
        dit(TINY, tiny_dit(), latents, time, text, attention=attention, attention_taps=taps)
        return taps["k"], taps["v"]

    stored = masked(latents)
    return stored, [jax.vmap(plan.from_tiles)(x).reshape(3, 1, frames, 6, 2, 32) for x in stored]


def assert_cached(made, keys, frames):
    attended = np.array(made.causal.attended(frames))
    for x, whole in zip((made.cache.k, made.cache.v), keys, strict=True):
        want = whole[:, :, attended].reshape(3, 1, -1, 2, 32)
        assert rel_l2(made.layout.read(x, frames), want) <= 2e-6


def test_the_cache_holds_what_the_masked_forward_of_the_video_computes(rolled):
    made, latents = rolled
    assert list(made.causal.attended(20)) == [0, 1, 16, 17, 18, 19]
    assert_cached(made, masked_keys(made, jnp.concatenate(latents, axis=2), some_text())[1], 20)


@pytest.mark.parametrize(
    ("causal", "blocks", "frames"),
    [
        (CausalConfig(frames_per_block=1, window=4, sink=1, steps=(1000,)), 60, 60),
        (CausalConfig(frames_per_block=3, window=7, sink=1, steps=(1000, 500), first_frame_alone=True), 5, 13),
        (dataclasses.replace(CAUSAL_PRESETS["causvid-3"], window=6), 4, 12),
    ],
    ids=["60 blocks", "a first frame alone", "causvid-3"],
)
def test_so_it_does_after_many_blocks_behind_a_first_frame_and_at_causvid_s_steps(causal, blocks, frames):
    made, steps = begin(causal, some_text()), len(causal.steps)
    latents = [made.block(*draws(i, made.next_shape(), steps)) for i in range(blocks)]
    assert_cached(made, masked_keys(made, jnp.concatenate(latents, axis=2), some_text())[1], frames)


def test_a_prompt_that_changes_is_a_splice_of_two_masked_forwards():
    """Frames before the change are the first prompt's; those behind it are the second's, and attend the first's keys."""
    causal = CausalConfig(frames_per_block=2, window=6, sink=2, steps=(1000, 500))
    one, other = some_text(), some_text(2)
    made, second = begin(causal, one), begin(causal, other)
    latents = []
    for i in range(6):
        made.text = made.text if i < 4 else second.text
        latents.append(made.block(*draws(i, made.next_shape(), 2)))
    whole = jnp.concatenate(latents, axis=2)
    first, _ = masked_keys(made, whole, one)
    _, spliced = masked_keys(made, whole, other, earlier=first, since=8)
    assert_cached(made, spliced, 12)
    _, alone = masked_keys(made, whole, other)
    assert rel_l2(spliced[0][:, :, 8:], alone[0][:, :, 8:]) > 1e-4


def test_one_program_makes_every_block_whatever_the_ring_and_the_fill():
    causal = CausalConfig(frames_per_block=2, window=6, sink=2, steps=(1000, 500))
    # Bound to a device, as weights of a checkpoint are: results are bound then, and so has to be the first cache.
    bound = jax.device_put(tiny_dit(), jax.devices()[0])
    made = begin(causal, some_text(2), params=bound)
    made.block(*draws(0, made.next_shape(), 2))
    programs = rollout._denoise_block._cache_size()
    for i in range(1, 7):
        made.block(*draws(i, made.next_shape(), 2))
    assert rollout._denoise_block._cache_size() == programs


def test_what_is_compiled_after_the_first_block():
    """The first block of more frames than one, and the first pass over given blocks: each size once."""
    made = begin(CausalConfig(frames_per_block=2, window=4, steps=(1000, 300), first_frame_alone=True), some_text())

    def programs() -> tuple[int, int]:
        return rollout._denoise_block._cache_size(), rollout._keep_block._cache_size()

    blocks, kept = programs()
    latents, counts = [], []
    for i in range(4):
        latents.append(made.block(*draws(i, made.next_shape(), 2)))
        counts.append(programs())
    assert counts == [(blocks + 1, kept), *[(blocks + 2, kept)] * 3]
    for _ in range(2):
        made.recache(jnp.concatenate(latents[2:], axis=2), 3)
        assert programs() == (blocks + 2, kept + 1)


def test_slots_lie_as_the_picture_in_the_docs_shows():
    layout = CacheLayout.build(CausalConfig(window=12, sink=3), SPACE, tile=(3, 2, 3))
    context = layout.context(12)
    assert layout.slots == 4
    assert context.slots.tolist() == [1]
    assert context.key_tiles[0, : context.counts[0]].tolist() == [0, 2, 3, 1], "slots have one tile each"


def test_the_cache_is_donated_and_no_second_one_is_made():
    """The compiled program writes into what it is given; beside it there is room for a few layers of it, of 24, at a time."""
    config = dataclasses.replace(TINY, num_layers=24)
    layout = CacheLayout.build(CausalConfig(frames_per_block=1, window=64, steps=(1000, 500)), SPACE, tile=(1, 2, 3))
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = abstract_params(build_dit(config))
    kv = TextKV(*(spec((24, 1, 512, 2, 32)),) * 2)
    cache = jax.eval_shape(lambda: layout.zeros(24, 1, 2, 32, jnp.float32))
    noise: Any = spec((1, 16, 1, 4, 6))
    inputs = Inputs(noise, kv, step_noise=spec((2, 1, 16, 1, 4, 6)))
    place = rope_table((1, *SPACE), 32), layout.context(0)
    table = coefficients("lcm", block_levels(layout.causal))
    lowered = rollout._denoise_block.lower(
        params, inputs, cache, *place, table, spec(()), config=config, layout=layout, dtype=jnp.dtype("float32")
    )
    memory = lowered.compile().memory_analysis()
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


def test_later_noise_and_prompts_leave_earlier_blocks_alone(rolled):
    """And a rollout that is begun again makes the same bits."""
    made, latents = rolled
    again = begin(made.causal, some_text())
    for i in range(3):
        assert np.array_equal(again.block(*draws(i, again.next_shape(), 2)), latents[i])
    other = rollout.text_kv(TINY, tiny_dit(), jnp.asarray(some_text(9)), dtype=jnp.float32)
    again.text = other
    assert rel_l2(again.block(*draws(3, again.next_shape(), 2)), latents[3]) > 1e-3
    again.restart()
    again.text = made.text
    assert np.array_equal(again.block(*draws(0, again.next_shape(), 2)), latents[0])


def test_given_frames_are_as_good_as_made_ones():
    causal = CausalConfig(frames_per_block=2, window=4, steps=(1000, 500), first_frame_alone=True)
    made = begin(causal, some_text())
    latents = [np.asarray(made.block(*draws(i, made.next_shape(), 2))) for i in range(3)]
    assert [x.shape[2] for x in latents] == [1, 2, 2]
    given = begin(causal, some_text())
    given.give(np.concatenate(latents[:2], axis=2))
    assert given.next_frame == 3
    assert rel_l2(given.block(*draws(2, given.next_shape(), 2)), latents[2]) <= 1e-6


def test_what_does_not_fit_is_refused():
    causal = CausalConfig(steps=(1000, 500))
    made = begin(causal, some_text(), 6)
    noise, fresh = draws(0, made.next_shape(), 2)
    with pytest.raises(
        ValueError, match=r"noise has shape \(1, 16, 1, 4, 6\); the next block needs \(1, 16, 3, 4, 6\)"
    ):
        made.block(noise[:, :, :1], fresh)
    with pytest.raises(ValueError, match=r"step_noise has shape .* needs \(2, 1, 16, 3, 4, 6\)"):
        made.block(noise, fresh[:1])
    with pytest.raises(ValueError, match=r"given latent frames=4 are no whole blocks.*use 3 or 6"):
        made.give(jnp.zeros((1, 16, 4, 4, 6)))
    with pytest.raises(ValueError, match=r"given latents have shape .*; this video needs"):
        made.give(jnp.zeros((1, 16, 3, 4, 8)))
    with pytest.raises(NotImplementedError, match="a i2v model isn't causal"):
        Rollout(TINY_I2V, {}, made.text, made.layout)


def test_a_recache_that_does_not_fit_is_refused_before_anything_moves():
    causal = CausalConfig(frames_per_block=2, window=4, steps=(1000, 500))
    made = begin(causal, some_text())
    for i in range(2):
        made.block(*draws(i, made.next_shape(), 2))
    before = np.asarray(made.cache.k)
    for shape, start, message in (
        ((1, 16, 2, 4, 6), 0, "from latent frame 0 on this video has 4 so far"),
        ((1, 16, 3, 4, 6), 1, "no block starts at latent frame 1"),
        ((1, 16, 4, 4, 8), 0, "this video needs"),
    ):
        with pytest.raises(ValueError, match=message):
            made.recache(np.ones(shape, np.float32), start)
    assert made.next_frame == 4
    assert np.array_equal(made.cache.k, before)


def test_a_restart_makes_no_second_cache_but_where_the_first_is_not_finite(monkeypatch):
    made = begin(CausalConfig(frames_per_block=2, window=4, steps=(1000, 500)), some_text())
    first = np.asarray(made.block(*draws(0, made.next_shape(), 2)))
    empty = made._empty
    monkeypatch.setattr(made, "_empty", None)
    made.restart()
    assert np.array_equal(made.block(*draws(0, made.next_shape(), 2)), first)
    noise, fresh = draws(1, made.next_shape(), 2)
    with pytest.raises(FloatingPointError):
        made.block(np.full_like(noise, np.nan), fresh)
    monkeypatch.setattr(made, "_empty", empty)
    made.restart()
    assert np.array_equal(made.block(*draws(0, made.next_shape(), 2)), first)


def test_a_nan_in_given_frames_is_of_the_clean_pass():
    made = begin(CausalConfig(steps=(1000, 500)), some_text(), 6)
    with pytest.raises(
        FloatingPointError, match="frames 0 to 2, in the pass over the finished block, first in the emb"
    ):
        made.give(np.full((1, 16, 3, 4, 6), np.nan, np.float32))


def test_a_nan_names_block_step_and_stage():
    made = begin(CausalConfig(steps=(1000, 500)), some_text(), 6)
    noise, fresh = draws(0, made.next_shape(), 2)
    made.block(noise, fresh)
    fresh[0, 0, 0, 0, 0, 0] = np.nan
    with pytest.raises(
        FloatingPointError, match="block of latent frames 3 to 5, in step 2 of 2, first in the embeddings"
    ):
        made.block(noise, fresh)
