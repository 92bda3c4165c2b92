"""The cache: where frames lie, and that attention to it is bit for bit that of the masked forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from fps_jax import AttentionPlan, attend
from fps_jax.attention.cache import CachedAttention, CacheLayout
from fps_jax.causal import CausalConfig

# Each example compiles its own programs: few examples, and no search for a smaller one that fails.
few = settings(deadline=None, max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@st.composite
def causals(draw):
    n, sink = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    window = draw(st.one_of(st.none(), st.integers(sink + n, sink + n + 4)))
    alone = draw(st.booleans())
    return CausalConfig(frames_per_block=n, window=window, sink=0 if window is None else sink, first_frame_alone=alone)


@settings(deadline=None, max_examples=100)
@given(causals(), st.integers(1, 30))
def test_the_ring_holds_what_a_block_attends(causal, blocks):
    """By the definition of a ring: whoever is written last is there, and a block's own slots hold nothing that it attends."""
    num_frames = causal.frames_per_block * blocks + causal.first_frame_alone
    layout = CacheLayout.build(causal, (1, 2), num_frames=num_frames, tile=(1, 1, 2))
    size, held = causal.slot_frames, {}
    for start, end in causal.blocks(num_frames):
        context = layout.context(start)
        assert context.key_tiles.shape[1] == layout.frames, "one width: one program for all blocks of a size"
        own = list(range(start // size, end // size))
        for index, slot in zip(own, context.slots, strict=True):
            held[int(slot)] = index
        order = [f // size for f in causal.attended(end)[::size]]
        tiles = [held[tile // size] * size + tile % size for tile in context.key_tiles[0][: context.counts[0]]]
        assert tiles == list(causal.attended(end)), "listed in the video's order, each where it was written"
        assert order[-len(own) :] == own


def whole_and_cached(causal, blocks, space, tile, window, heads, dtype, scales=None, seed=0):
    """Attention of a whole video by a masked plan, and block by block from a cache, both in tile order."""
    frames = causal.frames_per_block * blocks + causal.first_frame_alone
    grid = (frames, *space)
    spatial = None if window is None else (frames, *window)
    plan = AttentionPlan.build(grid, tile, spatial, scales, causal=causal)
    r = np.random.default_rng(seed)
    q, k, v = (
        plan.to_tiles(jnp.asarray(r.standard_normal((1, plan.layout.num_tokens, heads, 16)), dtype)) for _ in range(3)
    )
    whole = attend(q, k, v, plan=plan, implementation="portable")
    layout = CacheLayout.build(causal, space, num_frames=frames, tile=tile, window=window, scales_per_tile=scales)
    cache = layout.zeros(1, 1, heads, 16, dtype)
    made = []
    for start, end in causal.blocks(frames):
        context = layout.context(start)
        first, last = (frame * plan.layout.num_stored // frames for frame in (start, end))
        own = [x[:, first:last] for x in (q, k, v)]
        attention = CachedAttention(layout, end - start, cache, context, "portable")
        made.append(attention(*own, layer=jnp.int32(0), taps=None))
        kept = jax.tree.map(lambda x: x[None], layout.kept(*own[1:]))
        cache = layout.write(cache, kept, jnp.asarray(context.slots))
    return np.asarray(whole.astype(jnp.float32)), np.asarray(jnp.concatenate(made, axis=1).astype(jnp.float32))


@st.composite
def cases(draw):
    causal = draw(causals())
    space = (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    along = draw(st.sampled_from([d for d in (1, 2, 3) if causal.slot_frames % d == 0]))
    tile = (along, *(draw(st.integers(1, size)) for size in space))
    window = draw(st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    scales = draw(st.sampled_from([None, 1]))
    return causal, draw(st.integers(2, 6)), space, tile, window, draw(st.integers(1, 2)), dtype, scales


@few
@example((CausalConfig(window=6, sink=1), 4, (2, 3), (1, 1, 2), None, 2, jnp.float32))
@example((CausalConfig(frames_per_block=2, window=6, sink=2), 6, (2, 3), (2, 2, 2), (1, 1), 1, jnp.bfloat16))
@example((CausalConfig(frames_per_block=2, window=6, sink=2), 6, (2, 3), (2, 2, 2), (1, 1), 2, jnp.bfloat16, 1))
@example((CausalConfig(window=6, sink=1), 4, (9, 10), (1, 9, 10), None, 1, jnp.float32, 2))
@given(cases())
def test_a_block_from_the_cache_is_bit_for_bit_its_rows_of_the_masked_forward(case):
    """In every position of the ring: the examples go round it."""
    whole, cached = whole_and_cached(*case)
    assert np.array_equal(whole, cached)


def test_a_sink_that_is_left_out_would_be_seen():
    """The two tests above can fail: another sink gives another attention."""
    causal = CausalConfig(frames_per_block=1, window=3, sink=1)
    other = CausalConfig(frames_per_block=1, window=3)
    space, tile = (1, 2), (1, 1, 2)
    whole, _ = whole_and_cached(causal, 5, space, tile, None, 1, jnp.float32)
    _, cached = whole_and_cached(other, 5, space, tile, None, 1, jnp.float32)
    assert not np.array_equal(whole, cached)


def test_what_a_cache_can_not_hold_is_refused():
    with pytest.raises(ValueError, match=r"attends all frames, so its cache grows.*give num_frames, or a window"):
        CacheLayout.build(CausalConfig(), (2, 3))
    most = CausalConfig(first_frame_alone=True)
    for causal, frames, blocks in (
        (CausalConfig(window=3 * 10**9), None, 1365),
        (CausalConfig(), 3 * 10**9, 1365),
        (CausalConfig(frames_per_block=2), 3 * 10**9, 2048),
        (most, 3 * 10**9 + 1, 1366),
    ):
        message = f"would attend 300000000. latent frames, more than 4096, which {blocks} blocks of . fit into; make fewer, or"
        with pytest.raises(ValueError, match=message):
            CacheLayout.build(causal, (2, 2), num_frames=frames)
    assert CacheLayout.build(most, (2, 2), num_frames=most.blocks(4096)[1365][1]).frames == 4096
    with pytest.raises(ValueError, match=r"num_frames=7 are no whole blocks: .*; use 6 or 9"):
        CacheLayout.build(CausalConfig(), (2, 3), num_frames=7)
    with pytest.raises(ValueError, match=r"tile=\(2, 1, 1\) .* use 1 frame, or a divisor of 3"):
        CacheLayout.build(CausalConfig(), (2, 3), num_frames=6, tile=(2, 1, 1))
    for causal in (CausalConfig(), CausalConfig(window=12, sink=9)):
        layout = CacheLayout.build(causal, (2, 3), num_frames=6)
        with pytest.raises(
            ValueError, match="room for 6 latent frames and the next block ends at 9; begin with a larger"
        ):
            layout.context(6)


def test_a_video_shorter_than_the_window_takes_no_more_room_than_it_needs():
    causal = CausalConfig(window=12, sink=3)
    assert CacheLayout.build(causal, (30, 52), num_frames=6).slots == 2
    endless = CacheLayout.build(causal, (30, 52))
    assert endless.slots == 4
    for frames, space in ((3, (30, 52)), (1, (30, 52)), (3, (45, 80)), (3, (80, 45)), (3, (2, 3))):
        slot = CacheLayout.build(CausalConfig(frames_per_block=frames, window=21), space, alignment=64).slot
        assert slot.waste <= 0.07 or slot.num_tiles == 1, "tiles of little padding are proposed"
    values = 4 * 30 * endless.slot.num_stored * 12 * 128 * 2

    def size(layout: CacheLayout) -> int:
        cache = jax.eval_shape(lambda: layout.zeros(30, 1, 12, 128, jnp.bfloat16))
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))

    assert size(endless) == 2 * values
    codes = size(CacheLayout.build(causal, (30, 52), scales_per_tile=1))
    # A byte each; four for each tile and head of K, and for each slot, head and channel of V
    assert codes == values + 4 * 30 * 4 * 12 * (endless.slot.num_tiles + 128)
    assert codes < 1.001 * values


def test_a_cache_in_fp8_takes_a_granularity_that_its_tiles_have():
    with pytest.raises(ValueError, match=r"scales_per_tile=3 doesn't share out evenly"):
        CacheLayout.build(CausalConfig(window=6), (2, 3), scales_per_tile=3)
