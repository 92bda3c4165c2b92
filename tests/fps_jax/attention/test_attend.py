"""`attend` against NumPy's float64 definition in raster order, the specification in FP8, and its gradients; what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from fps_jax import AttentionPlan, attend
from fps_jax.attention.attend import dense_attention
from tests import windows_by_definition as definition
from tests.reference import rel_l2
from tests.tile_by_tile import portable_takes

# Each example compiles its own programs (seconds): few beside the written ones, and no search for a smaller one that fails.
few = settings(deadline=None, max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])

ROUNDING = 2e-6  # float32 against float64: measured 2e-7 on these sizes


def arrays(plan, heads=2, dim=16, batch=2, seed=0, count=4, scale=1.0):
    rng = np.random.default_rng(seed)
    shape = (batch, plan.layout.num_tokens, heads, dim)
    return [jnp.asarray(scale * rng.standard_normal(shape).astype(np.float32)) for _ in range(count)]


# How 'portable' takes heads of few tokens, and of many.
TILE_BY_TILE = "portable, tile by tile"


@functools.partial(jax.jit, static_argnames=("plan", "implementation"))
def out_and_gradients(q, k, v, d_out, *, plan, implementation):
    """In tile order. One program: differentiated outside jit, forward and backward would be compiled apart."""
    heads, name = ("tile by tile", "portable") if implementation == TILE_BY_TILE else ("whole", implementation)
    with portable_takes(heads):
        out, vjp = jax.vjp(functools.partial(attend, plan=plan, implementation=name), q, k, v)
        return out, *vjp(d_out)


def run(plan, implementation, q, k, v, d_out, poison=False):
    """Output and gradients in raster order. `poison`: NaN in every padded slot of operands and of the output's cotangent."""

    def tiled(x):
        x = plan.to_tiles(x)
        return jnp.where(plan.layout.valid[None, :, None, None], x, jnp.nan) if poison else x

    got = out_and_gradients(*map(tiled, (q, k, v, d_out)), plan=plan, implementation=implementation)
    padding = ~plan.layout.valid
    for x in got:
        assert not np.asarray(x, np.float32)[:, padding].any(), "padding is 0 in outputs and gradients, never NaN"
    return [np.asarray(plan.from_tiles(x), np.float32) for x in got]


@st.composite
def plans(draw, quantize):
    grid = tuple(draw(st.integers(1, 7)) for _ in range(3))
    # At most 8 tiles: the specification holds all pairs of slots.
    tile = tuple(draw(st.integers((n + 1) // 2, n)) for n in grid)
    windows = st.tuples(*(st.integers(1, 3),) * 3)
    window = draw(st.one_of(windows, st.tuples(windows, windows), st.none()))
    plan = AttentionPlan.build(grid, tile, window, quantize=quantize)
    if quantize:
        scales = draw(st.sampled_from(plan.layout.allowed_scales))
        plan = AttentionPlan.build(grid, tile, window, scales)
    return plan


@few
@example(AttentionPlan.build((5, 7, 6), (3, 4, 3), ((1, 2, 1), (3, 1, 2)), quantize=False), 0)  # a window a head
@example(AttentionPlan.build((1, 1, 1), (1, 1, 1), quantize=False), 0)  # one key
@given(plans(quantize=False), st.integers(0, 100))
def test_sparse_attention_and_its_gradients_are_the_definitions(plan, seed):
    q, k, v, d_out = arrays(plan, seed=seed)
    mask = np.stack([definition.attended(plan.grid, plan.tile, w) for w in plan.windows])
    want = [definition.attention(q, k, v, mask), *definition.gradients(q, k, v, mask, d_out)]
    for implementation in ("portable", TILE_BY_TILE, "reference"):
        got = run(plan, implementation, q, k, v, d_out)
        assert rel_l2(got[0], want[0]) <= ROUNDING
        for gradient, wanted in zip(got[1:], want[1:], strict=True):
            # with one key in reach dq and dk are exactly 0
            assert np.abs(gradient - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())


@few
@example(AttentionPlan.build((7, 6, 4), (6, 6, 2), ((1, 1, 1), (1, 1, 1)), 2), 23, 3.0)  # one such value, tile by tile
@example(AttentionPlan.build((5, 7, 6), (5, 4, 6), (1, 2, 1), 2), 0, 1.0)  # two scales a tile, over two tiles, padding
@given(plans(quantize=True), st.integers(0, 100), st.sampled_from([0.3, 1.0, 3.0]))
def test_portable_fp8_agrees_with_the_specification(plan, seed, scale):
    operands = arrays(plan, seed=seed, scale=scale)
    want = run(plan, "reference", *operands)
    for implementation in ("portable", TILE_BY_TILE):
        got = run(plan, implementation, *operands)
        assert rel_l2(got[0], want[0]) <= 2e-3  # a value at the middle of two e4m3 numbers may fall to either side
        for gradient, wanted in zip(got[1:], want[1:], strict=True):
            # Such a value moves its row's sum, and the row's gradient, by up to 1/16 where it is most of the row.
            error = np.abs(gradient - wanted).max(-1) / max(1, np.abs(wanted).max())
            assert error.max() <= 1 / 14
            assert (error > 2e-3).sum() <= max(2, 0.01 * error.size)


def test_portable_fp8_with_one_chunk_of_keys_differs_by_float32_alone():
    plan = AttentionPlan.build((4, 8, 8), (2, 4, 8), (1, 2, 1), 1)
    operands = arrays(plan, dim=64)
    for a, b in zip(run(plan, TILE_BY_TILE, *operands), run(plan, "reference", *operands), strict=True):
        assert rel_l2(a, b) <= 2e-3  # a value at the middle of two e4m3 numbers may fall to either side


def test_portable_fp8_with_many_chunks_of_keys_rounds_alike():
    """Maxima are rounded up to powers of two, so a chunk's running maximum puts P on the same grid of e4m3 as the row's."""
    plan = AttentionPlan.build((6, 16, 32), (3, 8, 8), None, 3)  # 16 tiles of 192 slots: two chunks
    operands = arrays(plan, heads=1, dim=64, batch=1, scale=1.5)
    got, want = run(plan, "portable", *operands), run(plan, "reference", *operands)
    errors = [rel_l2(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= 2e-3


@pytest.mark.parametrize(
    ("grid", "tile", "scales", "implementation"),
    [
        ((3, 5, 5), (2, 2, 3), 1, "portable"),  # one part
        ((4, 5, 14), (4, 4, 7), 2, TILE_BY_TILE),  # two
        ((4, 5, 14), (4, 4, 7), 2, "reference"),  # two
        ((5, 5, 7), (5, 5, 5), 2, "reference"),  # two, in raster order
    ],
)
def test_how_tiles_are_stored_changes_nothing_but_the_order_of_sums(grid, tile, scales, implementation):
    plan = AttentionPlan.build(grid, tile, (2, 1, 2), scales, alignment=8)
    operands = arrays(plan)
    narrow, wide = (run(p, implementation, *operands) for p in (plan, plan.aligned(64)))
    for a, b in zip(narrow, wide, strict=True):
        assert rel_l2(a, b) <= ROUNDING


def test_fp8_attention_rounds_and_stays_near_exact_attention():
    """e4m3 has 3 bits of mantissa, an error of up to 2^-4 a value: far from float32's, and averaged over many keys."""
    grid, tile = (4, 8, 8), (4, 8, 8)
    operands = arrays(AttentionPlan.build(grid, tile), dim=64, heads=1, batch=1)
    exact = run(AttentionPlan.build(grid, tile, quantize=False), "portable", *operands)
    for scales in (1, 4):
        got = run(AttentionPlan.build(grid, tile, None, scales), "portable", *operands)
        for a, b in zip(got, exact, strict=True):
            assert 2e-3 < rel_l2(a, b) < 0.08


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("implementation", ["portable", TILE_BY_TILE, "reference", "auto"])
@pytest.mark.parametrize("window", [(1, 2, 2), None])
def test_poisoned_padding_never_shows(quantize, implementation, window):
    plan = AttentionPlan.build((3, 5, 7), (2, 3, 4), window, quantize=quantize)
    assert not plan.layout.valid.all()
    operands = arrays(plan)
    clean = run(plan, implementation, *operands)
    poisoned = run(plan, implementation, *operands, poison=True)
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("quantize", [False, True])
def test_repeated_runs_are_bitwise_equal(quantize):
    plan = AttentionPlan.build((6, 12, 16), (3, 6, 8), (1, 2, 2), quantize=quantize)
    operands = arrays(plan, seed=3)
    first = run(plan, "portable", *operands)
    for again in (run(plan, "portable", *operands) for _ in range(3)):
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


def test_dense_attention_in_tile_order_is_dense_attention_in_raster_order():
    plan = AttentionPlan.build((5, 6, 7), (2, 3, 4), quantize=False)
    q, k, v, d_out = arrays(plan)
    want, vjp = jax.vjp(dense_attention, q, k, v)
    for implementation in ("dense", "portable", TILE_BY_TILE, "reference"):
        got = run(plan, implementation, q, k, v, d_out)
        for a, b in zip(got, (want, *vjp(d_out)), strict=True):
            assert rel_l2(a, b) <= ROUNDING


def test_bf16_in_bf16_out_and_near_float32():
    plan = AttentionPlan.build((4, 8, 8), (2, 4, 8), (1, 2, 1))
    operands = arrays(plan, dim=64)
    exact = run(plan, "portable", *operands)
    t = plan.to_tiles
    q, k, v = (t(x.astype(jnp.bfloat16)) for x in operands[:3])
    for implementation in ("portable", "reference"):
        out = attend(q, k, v, plan=plan, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        assert rel_l2(plan.from_tiles(out).astype(jnp.float32), exact[0]) < 0.05  # e4m3 of inputs that bf16 has moved


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    ("implementation", "heads"), [("portable", "whole"), ("portable", "tile by tile"), ("reference", "")]
)
def test_a_bad_token_is_never_silent(bad, operand, quantize, implementation, heads):
    plan = AttentionPlan.build((4, 4, 8), (2, 4, 4), None, quantize=quantize)
    operands = arrays(plan)[:3]
    operands[operand] = operands[operand].at[0, 17, 1, 3].set(bad)
    with portable_takes(heads or "whole"):
        out = attend(*(plan.to_tiles(x) for x in operands), plan=plan, implementation=implementation)
    out = plan.from_tiles(out)
    assert not np.isfinite(np.asarray(out[0, :, 1])).all()
    if quantize:
        assert np.isnan(np.asarray(out[0, :, 1])).any(), "an infinite scale is no scale"
    assert np.isfinite(np.asarray(out[1])).all(), "other samples are untouched"
    assert np.isfinite(np.asarray(out[0, :, 0])).all(), "and other heads"


@pytest.mark.parametrize("implementation", ["portable", TILE_BY_TILE, "reference"])
@pytest.mark.parametrize("size", [1e-30, 12.0, 1e3])
def test_finite_inputs_give_finite_outputs_and_gradients(implementation, size):
    """Logits of 0, some thousand, and some ten million. The last tile is short: three of its four groups are padding alone."""
    plan = AttentionPlan.build((1, 1, 280), (1, 1, 256), None, 4)
    q, k, v, d_out = arrays(plan, dim=64, batch=1)
    for x in run(plan, implementation, size * q, size * k, v, d_out):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("heads", ["whole", "tile by tile"])
def test_inside_shard_map_over_batch_and_heads(heads):
    from jax.sharding import Mesh, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("batch", "heads"))
    axes = PartitionSpec("batch", None, "heads", None)
    for quantize in (False, True):
        plan = AttentionPlan.build((2, 4, 8), (2, 4, 4), (1, 1, 1), quantize=quantize)
        operands = [plan.to_tiles(x) for x in arrays(plan, heads=4)]

        def both(q, k, v, d_out, plan=plan):
            out, vjp = jax.vjp(functools.partial(attend, plan=plan, implementation="portable"), q, k, v)
            return out, *vjp(d_out)

        sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(axes,) * 4, out_specs=(axes,) * 4))
        with portable_takes(heads):
            got, want = sharded(*operands), jax.jit(both)(*operands)
        for a, b in zip(got, want, strict=True):
            assert rel_l2(a, b) <= ROUNDING


def test_under_jit_vmap_and_scan():
    plan = AttentionPlan.build((2, 4, 8), (2, 4, 4), (1, 1, 2))
    q, k, v, _ = (plan.to_tiles(x) for x in arrays(plan))
    one = functools.partial(attend, plan=plan)
    want = one(q, k, v)
    assert rel_l2(jax.jit(one)(q, k, v), want) <= ROUNDING
    stacked = [jnp.stack([x, x]) for x in (q, k, v)]
    assert rel_l2(jax.vmap(one)(*stacked)[1], want) <= ROUNDING
    _, scanned = jax.lax.scan(lambda c, x: (c, one(*x)), None, tuple(stacked))
    assert rel_l2(scanned[1], want) <= ROUNDING


PLAN = AttentionPlan.build((3, 4, 4), (3, 4, 2), (1, 1, 1), alignment=64)  # two tiles of 64 slots


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


X = zeros(1, 128, 2, 16)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "error", "message"),
    [
        (zeros(1, 48, 2, 16),) * 3 + ({}, ValueError, r"q has 48.*stores 128: pass plan.to_tiles"),
        (X[0], X[0], X[0], {}, ValueError, r"must be \[batch, tokens, heads, head dim\]"),
        (X, X, zeros(1, 128, 2, 32), {}, ValueError, "k and v must have one shape"),
        (X, zeros(1, 128, 1, 16), zeros(1, 128, 1, 16), {}, ValueError, "k and v must have one shape"),
        (X, X.astype(jnp.bfloat16), X, {}, ValueError, "q, k, v are float32, bfloat16, float32; pass one of"),
        (X.astype(jnp.int32),) * 3 + ({}, ValueError, "q, k, v are int32"),
        (zeros(1, 128, 2, 24),) * 3 + ({}, ValueError, "head dim 24 is not a multiple of 16"),
        (X, X, X, {"implementation": "sm90"}, NotImplementedError, "implementation='sm90'"),
        (X, X, X, {"implementation": "flash"}, ValueError, "implementation='flash' is not one of"),
        (X, X, X, {"implementation": "dense"}, ValueError, "'dense' attends everything unrounded, and this plan quantizes"),
        (X, X, X, {"plan": dataclasses.replace(PLAN, window=((1, 1, 1),) * 3)}, ValueError, "windows for 3 heads, q has 2"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused(q, k, v, options, error, message):
    with pytest.raises(error, match=message):
        attend(q, k, v, **{"plan": PLAN, **options})
