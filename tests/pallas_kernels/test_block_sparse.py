"""The public op: what it refuses, what 'auto' picks, and the Hopper kernel through it (interpreted, and lowered for CUDA)."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fps_jax import AttentionPlan, attend
from pallas_kernels import block_sparse, platform
from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.interpret import interpret
from pallas_kernels.pattern import TilePattern
from pallas_kernels.portable import head
from pallas_kernels.portable.backward import backward
from pallas_kernels.portable.forward import forward
from pallas_kernels.sm90 import forward as fwd_sm90
from tests.pallas_kernels import interpreted
from tests.reference import rel_l2
from tests.tile_by_tile import portable_takes

PLAN = AttentionPlan.build((4, 8, 16), (4, 8, 8), (1, 1, 1))  # two tiles of 256 slots
TABLE = {"key_tiles": PLAN.key_tiles, "counts": PLAN.counts, "valid": PLAN.layout.valid}
X = jnp.zeros((1, 512, 2, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_tiles": np.zeros((2, 0), np.int32)}, r"key_tiles \(2, 0\) and counts \(2,\) must be"),
        ({"key_tiles": np.zeros((3, 2, 1), np.int32), "counts": np.ones((3, 2), np.int32)}, "tables for 3 heads, q has 2 heads"),
        ({"counts": np.ones((3,), np.int32)}, r"counts \(3,\) must be \[Tq, K\] and \[Tq\]"),
        ({"counts": np.ones((2,), np.float32)}, "counts is float32; pass int32"),
        ({"counts": np.array([1, 0], np.int32)}, r"counts lie in \[0, 1\]; each must be in \[1, 1\]"),
        ({"counts": np.array([1, 2], np.int32)}, r"counts lie in \[1, 2\]"),
        ({"key_tiles": np.array([[0], [2]], np.int32)}, "key_tiles holds tile 2; k has 2 tiles, numbered from 0"),
        ({"key_tiles": np.array([[0], [-1]], np.int32)}, "key_tiles holds tile -1"),
        ({"key_tiles": np.array([[0, 0], [0, 1]], np.int32), "counts": np.array([2, 2], np.int32)}, "lists a tile twice in a row"),
        ({"valid": np.ones(100, bool)}, r"valid \(100,\) .* must be one bool for each of 512 keys"),
        ({"valid": np.ones((2, 256), bool)}, r"valid \(2, 256\) .* must be one bool for each key and each query"),
        ({"valid": np.ones(0, bool)}, "q has 0 tokens for 2 rows of key_tiles"),
        ({"valid": np.arange(512) < 256}, "valid has no valid key in tile 1"),
        ({"tokens_per_scale": 100}, "tokens_per_scale=100 doesn't divide the 256 stored tokens of a tile"),
        ({"tokens_per_scale": 0}, "tokens_per_scale=0 doesn't divide"),
        ({"key_tiles": np.zeros((3, 1), np.int32), "counts": np.ones(3, np.int32)}, "q has 512 tokens for 3 rows of key_tiles"),
        ({"implementation": "fast"}, "implementation='fast' is not one of 'auto', 'reference', 'portable', 'sm90'"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(change, message):
    table = {**TABLE, **change}
    keywords = {"implementation": table.pop("implementation")} if "implementation" in table else {}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(X, X, X, TilePattern.build(**table), **keywords)


def test_attend_says_what_is_missing_and_names_all_that_there_is():
    for arguments, message in (
        ({"plan": None}, "plan is a NoneType; make one with AttentionPlan.build"),
        (
            {"q": X[:0], "k": X[:0], "v": X[:0]},
            r"q \(0, 512, 2, 64\).*: there is nothing to attend; batch, tokens, heads",
        ),
        ({"implementation": "fast"}, "is not one of 'auto', 'dense', 'reference', 'portable', 'sm90'"),
        ({"implementation": ["dense"]}, r"implementation=\['dense'\] is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(**{"q": X, "k": X, "v": X, "plan": PLAN, **arguments})


def test_queries_and_keys_may_be_different_tokens():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 2, 16), np.float32)) for n in (64, 192, 192))
    table = {"key_tiles": np.array([[0, 2]], np.int32), "counts": np.array([2], np.int32), "valid": np.ones(192, bool)}
    pattern = TilePattern.build(**table, q_valid=np.ones(64, bool))
    outs = [block_sparse_attention(q, k, v, pattern, implementation=name) for name in ("portable", "reference")]
    assert rel_l2(*outs) <= 2e-6
    one_tile = TilePattern.build(**{**table, "key_tiles": np.array([[0]], np.int32), "counts": np.array([1], np.int32)})
    with pytest.raises(ValueError, match="q has 64 tokens and k 192; pass q_valid"):
        block_sparse_attention(q, k, v, one_tile)


def test_the_hopper_kernel_is_refused_with_the_reason():
    with pytest.raises(
        NotImplementedError, match=r"implementation='sm90': needs an NVIDIA GPU .*found cpu; use 'portable'"
    ):
        block_sparse_attention(X, X, X, TilePattern.build(**TABLE, tokens_per_scale=256), implementation="sm90")


@pytest.fixture
def hopper(monkeypatch):
    """This machine, taken for one with a Hopper GPU. Programs are only lowered, never run."""
    monkeypatch.setattr(block_sparse, "target_platform", lambda: "gpu")
    monkeypatch.setattr(platform, "target_platform", lambda: "gpu")
    monkeypatch.setattr(fwd_sm90, "missing_device", lambda: None)
    block_sparse._logged.cache_clear()


def lowered(function, *specs) -> str:
    return jax.jit(function).trace(*specs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("head_dim", "dtype", "quantize", "picked", "why"),
    [
        (128, jnp.bfloat16, True, "sm90", "the Hopper kernel"),
        (64, jnp.float32, True, "sm90", "the Hopper kernel"),
        (128, jnp.bfloat16, False, "sm90", "the Hopper kernel"),
        (128, jnp.float32, False, "portable", "float32 without quantization"),
        (32, jnp.bfloat16, True, "portable", "head dim 32 is not 64 or 128"),
    ],
)
def test_auto_picks_the_kernel_where_it_can_run_and_says_so(hopper, caplog, head_dim, dtype, quantize, picked, why):
    plan = AttentionPlan.build(PLAN.grid, PLAN.tile, PLAN.window, quantize=quantize)
    spec = jax.ShapeDtypeStruct((1, 512, 2, head_dim), dtype)
    with caplog.at_level(logging.INFO):
        text = lowered(functools.partial(attend, plan=plan), spec, spec, spec)
    assert ("mosaic_gpu" in text) == (picked == "sm90")
    assert f"block-sparse attention runs as {picked!r}: {why}" in caplog.text


def test_the_kernel_lowers_under_scan_grad_and_shard_map(hopper):
    spec = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)
    one = functools.partial(attend, plan=PLAN, implementation="sm90")

    def scanned(q, k, v):
        return jax.lax.scan(lambda q, _: (one(q, k, v), None), q, None, length=3)[0]

    def loss(q, k, v):
        return one(q, k, v).astype(jnp.float32).sum()

    assert "mosaic_gpu" in lowered(scanned, spec, spec, spec)
    assert "mosaic_gpu" in lowered(jax.grad(loss, argnums=(0, 1, 2)), spec, spec, spec)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("batch", "heads"))
    axes = PartitionSpec("batch", None, "heads", None)
    sharded = jax.shard_map(one, mesh=mesh, in_specs=(axes,) * 3, out_specs=axes, check_vma=False)
    text = lowered(sharded, spec, spec, spec)
    assert "mosaic_gpu" in text
    assert "1x512x1x64" in text, "each device computes its own sample and head"


def _attend_interpreted(scales) -> tuple[float, float]:
    """Errors of output and gradients of 'sm90' against 'portable', in interpret mode. Runs in a process of its own."""
    plan = AttentionPlan.build((4, 8, 15), (4, 8, 8), (1, 1, 2), scales)  # the second tile has 32 padded slots
    rng = np.random.default_rng(0)
    q, k, v, d_out = (plan.to_tiles(jnp.asarray(rng.standard_normal((1, 480, 1, 64)), jnp.bfloat16)) for _ in range(4))
    fwd_sm90.missing_device = lambda: None
    results = []
    for implementation in ("sm90", "portable"):
        with interpret():
            out, vjp = jax.vjp(functools.partial(attend, plan=plan, implementation=implementation), q, k, v)
        results.append([np.asarray(x, np.float32) for x in (out, *vjp(d_out))])
    out, *grads = (rel_l2(a, b) for a, b in zip(*results, strict=True))
    return out, max(grads)


@pytest.mark.parametrize("scales", [2, None])
def test_the_kernel_through_attend_forward_and_backward(scales):
    out, grads = interpreted.run(_attend_interpreted, scales)
    # Each rounds P against its own running maximum (steps of 128 keys, a chunk of 512) and so lies within 2e-2 of the
    # specification; sm90/test_forward.py holds the kernel to its own rounding. Without FP8 the difference is bf16's.
    assert out <= (4e-2 if scales else 5e-3)
    assert grads <= 2e-2


def test_gradients_with_16_bit_operands_are_as_good_in_fp8_as_without(monkeypatch):
    """As a GPU multiplies. Scores of dequantized operands, rounded to bf16, made each gradient 1.5e-2 wrong, thrice the others."""
    monkeypatch.setattr(head, "_matmul_dtype", lambda dtype: jnp.bfloat16 if dtype.itemsize == 1 else dtype)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 1, 512, 2, 64), np.float32)
    x[:2, ..., :2] *= 4  # outlier channels
    q, k, v, d_out = (jnp.asarray(a, jnp.bfloat16) for a in x)

    def errors(tokens_per_scale):
        def gradients(implementation):
            pattern = TilePattern.build(**TABLE, tokens_per_scale=tokens_per_scale)
            attention = functools.partial(block_sparse_attention, pattern=pattern, implementation=implementation)
            return jax.vjp(attention, q, k, v)[1](d_out)

        return [rel_l2(a, b) for a, b in zip(gradients("portable"), gradients("reference"), strict=True)]

    # Without quantization it is the rounding of P and dS to bf16 alone, of which dS is a difference.
    plain = errors(None)
    assert max(plain) < 1e-2
    assert all(fp8 < 1.5 * bf16 for fp8, bf16 in zip(errors(128), plain, strict=True))


@pytest.mark.parametrize("heads", ["whole", "tile by tile"])
def test_p_that_the_backward_makes_again_is_at_most_what_the_forward_could_have_rounded(heads):
    """Large scores that differ in their last bits make exp(score - lse) as large as they like. Here lse is lowered by 30 in their
    place: P is then 17/16 everywhere, so that dV of a key is 17/16 of the sum of dO over the queries that attend it."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((1, 64, 2, 16), np.float32)) for _ in range(4))
    pattern = TilePattern.build(
        key_tiles=np.array([[0, 1], [1, 0]], np.int32), counts=np.array([2, 1], np.int32), valid=np.ones(64, bool)
    )
    with portable_takes(heads):
        out, lse = forward(q, k, v, pattern)
        _, _, dv = backward(q, k, v, out, lse - 30, d_out, pattern)
    sums = np.asarray(d_out)[0].reshape(2, 32, 2, 16).sum(1)  # of each query tile
    want = (
        17 / 16 * np.stack([sums[0], sums.sum(0)])
    )  # the first tile of keys is attended by the first tile of queries alone
    np.testing.assert_allclose(
        np.asarray(dv)[0].reshape(2, 32, 2, 16), np.repeat(want[:, None], 32, 1), rtol=1e-5, atol=1e-4
    )
