"""Block-causal plans: their tables by definition and against the original's masks, and the masked forward of the whole model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from fps_jax import AttentionPlan
from fps_jax.attention.attend import PlannedAttention, TokenAttention, attend
from fps_jax.causal import CausalConfig
from fps_jax.models.dit import build_dit, dit
from fps_jax.models.params import bind
from fps_jax.models.rope import rope_table
from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.pattern import TilePattern
from tests.checkpoints import TINY, tiny_dit
from tests.fps_jax.attention.test_windows import tokens_attended
from tests.reference import golden, rel_l2
from tests.windows_by_definition import attended

CASES = {
    "train_blockcausal": CausalConfig(),
    "train_local6": CausalConfig(window=6),
    "train_first_frame": CausalConfig(first_frame_alone=True),
}


def case(name: str) -> dict[str, np.ndarray]:
    """One of the cases of Self-Forcing's numbers."""
    return {k.removeprefix(f"{name}."): v for k, v in golden("self_forcing").items() if k.startswith(f"{name}.")}


def plan_of(grid, causal, tile=(1, 1, 2), window=None) -> AttentionPlan:
    return AttentionPlan.build(grid, tile, window, quantize=False, causal=causal)


@st.composite
def causal_plans(draw):
    n, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sink = draw(st.integers(0, 3))
    window = draw(st.one_of(st.none(), st.integers(sink + n, sink + n + 5)))
    alone = draw(st.booleans())
    causal = CausalConfig(
        frames_per_block=n, window=window, sink=0 if window is None else sink, first_frame_alone=alone
    )
    grid = (n * blocks + alone, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    divisors = [d for d in range(1, 5) if causal.slot_frames % d == 0]
    tile = (draw(st.sampled_from(divisors)), *(draw(st.integers(1, size)) for size in grid[1:]))
    spatial = draw(st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4))))
    return plan_of(grid, causal, tile, spatial and (grid[0], *spatial))


@settings(deadline=None, max_examples=60)
@given(causal_plans())
def test_tables_and_density_are_those_of_the_definition(plan):
    """Token by token: the frames that the query's block attends, and in them the window along rows and columns."""
    frames, rows, columns = plan.grid
    sees = np.zeros((frames, frames), bool)
    for start, end in plan.causal.blocks(frames):
        sees[start:end, list(plan.causal.attended(end))] = True
    by_token = np.repeat(np.repeat(sees, rows * columns, 0), rows * columns, 1)
    want = by_token & attended(plan.grid, plan.tile, plan.window)
    assert np.array_equal(tokens_attended(plan), want)
    assert plan.density == pytest.approx(want.mean(), rel=1e-12)
    for row, count in zip(plan.key_tiles, plan.counts, strict=True):
        assert (np.diff(row[:count]) > 0).all()
        assert not row[count:].any()


@pytest.mark.parametrize("name", CASES)
def test_tables_are_the_masks_that_models_are_trained_with(name):
    g = case(name)
    assert np.array_equal(tokens_attended(plan_of((g["in.t"].shape[1], 2, 3), CASES[name])), g["mask"].astype(bool))


@pytest.mark.parametrize("name", CASES)
def test_the_masked_forward_with_a_time_a_frame_is_the_originals(name):
    g = case(name)
    tile = (CASES[name].slot_frames, 1, 2)
    attention = PlannedAttention(plan_of((g["in.t"].shape[1], 2, 3), CASES[name], tile), implementation="portable")
    out = dit(TINY, tiny_dit(), *(jnp.asarray(g[f"in.{part}"]) for part in ("x", "t", "context")), attention=attention)
    assert rel_l2(out.velocity[:, ::4], g["out.flow"]) <= 1e-5


def test_teacher_forcing_is_the_originals_mask_and_numbers():
    """The video twice, clean and noisy, both rotated for the same frames."""
    g = case("train_teacher_forcing")
    frames = g["in.t"].shape[1]
    plan = AttentionPlan.build(
        (2 * frames, 2, 3), (3, 1, 2), quantize=False, causal=CausalConfig(), teacher_forcing=True
    )
    assert np.array_equal(tokens_attended(plan), g["mask"].astype(bool))
    rope = rope_table((frames, 2, 3), 32)
    out = dit(
        TINY,
        tiny_dit(),
        jnp.concatenate([g["in.clean_x"], g["in.x"]], axis=2),
        jnp.concatenate([jnp.zeros_like(g["in.t"]), g["in.t"]], axis=1),
        jnp.asarray(g["in.context"]),
        rope=jnp.concatenate([rope, rope], axis=1),
        attention=PlannedAttention(plan, implementation="portable"),
    )
    assert rel_l2(out.velocity[:, ::4, frames:], g["out.flow"]) <= 1e-5
    assert plan.dense() == plan
    assert plan.brief().endswith("block-causal with teacher forcing, not quantized")


def test_a_time_a_frame_is_frames_as_a_batch():
    """Another way to the same, which the model needs nothing for: each frame a sample, and attention puts them together."""
    g = case("train_local6")
    frames = g["in.t"].shape[1]
    plan = plan_of((frames, 2, 3), CASES["train_local6"])

    @dataclasses.dataclass(frozen=True)
    class Unfolded(TokenAttention):
        layout = None

        def __call__(self, q, k, v, /, *, layer, taps):
            q, k, v = (plan.to_tiles(rearrange(a, "(b f) s n h -> b (f s) n h", f=frames)) for a in (q, k, v))
            out = plan.from_tiles(attend(q, k, v, plan=plan, implementation="portable"))
            return rearrange(out, "b (f s) n h -> (b f) s n h", f=frames)

    patches = rearrange(g["in.x"], "b c f (y py) (x px) -> (b f) (y x) (c py px)", py=2, px=2)
    rope = rearrange(rope_table((frames, 2, 3), 32), "two (f s) h -> two f s h", f=frames)
    text = np.repeat(g["in.context"], frames, axis=0)
    with jax.default_matmul_precision("highest"):
        out, _ = bind(build_dit(TINY), tiny_dit()).tokens(
            *map(jnp.asarray, (patches, g["in.t"][0], text, rope)), attention=Unfolded()
        )
    velocity = rearrange(np.asarray(out), "f (y x) (py px c) -> 1 c f (y py) (x px)", y=2, py=2, px=2)
    assert rel_l2(velocity[:, ::4], g["out.flow"]) <= 1e-5


def test_one_block_without_a_window_is_the_bidirectional_model():
    r = np.random.default_rng(5)
    latents = jnp.asarray(r.standard_normal((1, 16, 3, 4, 4), np.float32))
    text = jnp.asarray(r.standard_normal((1, 7, 32), np.float32))
    attention = PlannedAttention(plan_of((3, 2, 2), CausalConfig()), implementation="portable")
    causal = dit(TINY, tiny_dit(), latents, jnp.full((1, 3), 437.5), text, attention=attention).velocity
    assert rel_l2(causal, dit(TINY, tiny_dit(), latents, jnp.array([437.5]), text).velocity) <= 2e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bits_of_a_row_depend_on_the_tiles_that_it_lists_alone(dtype):
    """Not on where they lie, on other tiles, on the table's width or on how many queries there are: what a cache needs."""
    size, heads, dim, tiles = 8, 2, 16, 5
    r = np.random.default_rng(11)
    q, k, v = (jnp.asarray(r.standard_normal((1, tiles * size, heads, dim)), dtype) for _ in range(3))
    valid = np.ones(tiles * size, bool)
    valid[6:8] = False
    listed, others = np.array([0, 3, 1]), np.array([3, 4, 2, 0, 1])

    def run(q, k, v, table, valid, q_valid):
        pattern = TilePattern.build(
            key_tiles=table,
            counts=np.full(len(table), 3, np.int32),
            valid=valid,
            q_valid=q_valid,
            ordered=True,
        )
        out = block_sparse_attention(q, k, v, pattern, implementation="portable")
        return np.asarray(out.astype(jnp.float32))

    whole = run(q, k, v, np.tile(listed, (tiles, 1)), valid, valid)

    def moved(x):  # tile t lies where others[t] says, in twice as many
        out = jnp.full((1, 2 * tiles, size, heads, dim), 3.0, x.dtype)
        return out.at[:, others].set(x.reshape(1, tiles, size, heads, dim)).reshape(1, -1, heads, dim)

    some = np.zeros((2, 9), np.int32)
    some[:, :3] = others[listed]
    moved_valid = np.ones((2 * tiles, size), bool)
    moved_valid[others] = valid.reshape(tiles, size)
    part = run(q[:, : 2 * size], moved(k), moved(v), some, moved_valid.reshape(-1), valid[: 2 * size])
    assert np.array_equal(part, whole[:, : 2 * size])


def test_plans_that_blocks_cut_are_refused():
    build = functools.partial(AttentionPlan.build, (6, 4, 4), quantize=False)
    with pytest.raises(ValueError, match=r"tile=\(2, 2, 2\) has 2 latent frames and would cross .* 3 frames"):
        build((2, 2, 2), causal=CausalConfig())
    with pytest.raises(ValueError, match="1 frames of these blocks, window and sink; use 1 frame"):
        build((3, 2, 2), causal=CausalConfig(window=6, sink=1))
    with pytest.raises(ValueError, match="latent frames=6 are no whole blocks: k blocks of frames_per_block=4"):
        build((2, 2, 2), causal=CausalConfig(frames_per_block=4))
    with pytest.raises(NotImplementedError, match=r"window=\(1, 2, 2\) narrows the time axis.*use 2 for its first"):
        build((3, 2, 2), (1, 2, 2), causal=CausalConfig())
    with pytest.raises(ValueError, match="teacher_forcing=True without causal"):
        build((3, 2, 2), teacher_forcing=True)
    with pytest.raises(ValueError, match=r"grid=\(7, 4, 4\) has an odd number of frames"):
        AttentionPlan.build((7, 4, 4), (1, 2, 2), quantize=False, causal=CausalConfig(), teacher_forcing=True)
    with pytest.raises(NotImplementedError, match="one window for all heads"):
        build((3, 2, 2), [(2, 1, 1), (2, 2, 2)], causal=CausalConfig())
    with pytest.raises(NotImplementedError, match="center_k=True takes the mean of all frames off the keys"):
        AttentionPlan.build((6, 4, 4), (3, 2, 2), causal=CausalConfig(), center_k=True)


def test_in_fp8_v_has_a_scale_for_what_enters_and_leaves_a_cache_together():
    def tokens(causal, frames=6, tile=(1, 2, 2), **keywords):
        plan = AttentionPlan.build((frames, 4, 4), tile, causal=causal, alignment=8, **keywords)
        assert plan.pattern.tokens_per_value_scale == plan.tokens_per_value_scale
        return plan.tokens_per_value_scale

    frame = 4 * 8  # tiles of 4 tokens, padded to 8
    assert tokens(CausalConfig()) == 3 * frame
    assert tokens(CausalConfig(window=5, sink=2)) == frame
    assert tokens(CausalConfig(), tile=(3, 4, 4)) == 48
    assert tokens(CausalConfig(), frames=12, teacher_forcing=True) == 3 * frame
    assert tokens(CausalConfig(), quantize=False) is tokens(None) is None


def test_what_stays_dense_stays_causal():
    plan = plan_of((6, 2, 2), CausalConfig(), window=(6, 1, 1))
    assert plan.dense().causal == plan.causal
    assert not plan.dense().whole_grid
    assert plan.brief() == "window (6, 1, 1), density 0.375, block-causal, not quantized"
