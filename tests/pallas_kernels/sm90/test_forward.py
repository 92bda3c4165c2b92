"""The Hopper forward kernel without a GPU: numerics and races in interpret mode, layouts by lowering for CUDA."""

import functools
import time
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.attention.plan import AttentionPlan
from pallas_kernels.pattern import TilePattern
from pallas_kernels.reference import FP8
from pallas_kernels.sm90 import forward as fwd_sm90
from pallas_kernels.sm90 import quantize as quantize_sm90
from pallas_kernels.sm90.config import CONSUMERS, ForwardConfig
from pallas_kernels.sm90.work import Problem, load_next, scratch
from tests.pallas_kernels import interpreted
from tests.pallas_kernels.sm90 import attention_cases
from tests.pallas_kernels.sm90.attention_cases import Case

CASES = {
    # Coverage, and the tile sizes and granularities: groups of 64, 128, 192, 256 and 384 tokens.
    "one_scale": Case(padding="tail"),
    "two_scales": Case(scales=2, padding="tail"),
    "four_scales": Case(scales=4, padding="scattered", inputs="outliers"),
    "tile_128": Case(tile=128, tiles=4, padding="tail"),
    "tile_128_two_scales": Case(tile=128, tiles=3, scales=2, padding="groups"),
    "tile_384": Case(tile=384, padding="scattered"),
    "tile_384_two_scales": Case(tile=384, scales=2, padding="tail"),
    "tile_384_three_scales": Case(tile=384, scales=3, tiles=1, padding="groups"),
    "tile_384_six_scales": Case(tile=384, scales=6, tiles=1, padding="tail"),
    # Padding of every kind, NaN in all of it.
    "one_token_a_tile": Case(tile=128, tiles=3, padding="single"),
    "padding_by_groups": Case(scales=4, padding="groups"),
    "scores_far_below_zero": Case(scales=2, padding="groups", inputs="low"),
    # Tables.
    "one_block_a_row": Case(tile=128, tiles=3, table="one", padding="tail"),
    "every_tile": Case(tile=128, tiles=5, table="all"),
    "table_per_head": Case(tile=128, tiles=3, heads=3, table="per_head"),
    "more_keys_than_queries": Case(tile=128, tiles=4, query_tiles=2, table="all", padding="tail"),
    # The ring of stages: longer than the work, just as long, wrapping.
    "four_stages": Case(tile=128, tiles=5, config=ForwardConfig(stages=4)),
    "four_stages_wrapping": Case(tile=128, tiles=6, table="all", config=ForwardConfig(stages=4)),
    "eight_stages": Case(tile=128, tiles=2, head_dim=64, config=ForwardConfig(stages=8)),
    # Shapes.
    "head_dim_64": Case(head_dim=64, scales=4, padding="tail"),
    "batch_and_heads": Case(tile=128, tiles=2, batch=2, heads=3, scales=2, padding="scattered"),
    "float32": Case(tile=128, tiles=2, dtype="float32"),
    "float16": Case(tile=128, tiles=2, dtype="float16"),
    # Without quantization.
    "bf16": Case(scales=None, padding="scattered"),
    "bf16_wrapping": Case(scales=None, tile=128, tiles=5, table="all", padding="tail"),
    "bf16_scores_far_below_zero": Case(scales=None, padding="groups", inputs="low"),
    "bf16_head_dim_64": Case(
        scales=None, tile=128, tiles=3, head_dim=64, heads=2, table="per_head", config=ForwardConfig(stages=4)
    ),
    "bf16_cluster": Case(scales=None, padding="tail", config=ForwardConfig(stages=2, cluster=2)),
    "f16": Case(scales=None, tile=128, tiles=2, dtype="float16", batch=2),
    # Clusters: two blocks of a tile share K and V.
    "cluster": Case(padding="tail", config=ForwardConfig(stages=2, cluster=2)),
    "cluster_two_scales_per_block": Case(scales=4, padding="groups", config=ForwardConfig(stages=2, cluster=2)),
    "cluster_wrapping": Case(tiles=3, table="all", heads=1, config=ForwardConfig(stages=2, cluster=2)),
    # Maxima that move, and sums that stay with the tensor cores for some steps.
    "rising": Case(tile=128, tiles=5, table="all", inputs="rising"),
    "bf16_rising": Case(scales=None, tile=128, tiles=5, table="all", inputs="rising"),
    "mixed_two_scales": Case(tile=128, tiles=3, scales=2, table="all", inputs="mixed"),
    "bf16_mixed": Case(scales=None, tile=128, tiles=3, table="all", inputs="mixed"),
    "polynomial_32_mixed": Case(
        tile=128, tiles=3, table="all", inputs="mixed", config=ForwardConfig(stages=2, polynomial_columns=32)
    ),
    "promoted_every_2_mixed": Case(
        tile=128, tiles=3, table="all", inputs="mixed", config=ForwardConfig(stages=2, promote_every=2)
    ),
    "polynomial_16": Case(padding="tail", config=ForwardConfig(stages=4, polynomial_columns=16)),
    "polynomial_48_two_scales": Case(
        scales=4, padding="groups", inputs="low", config=ForwardConfig(stages=2, polynomial_columns=48)
    ),
    "promoted_every_2": Case(tile=128, tiles=5, table="all", config=ForwardConfig(stages=2, promote_every=2)),
    "promoted_every_4_rising": Case(
        tile=128, tiles=6, table="all", inputs="rising", config=ForwardConfig(stages=2, promote_every=4)
    ),
    "promoted_every_8": Case(tile=128, tiles=4, scales=2, heads=2, config=ForwardConfig(stages=4, promote_every=8)),
    "promoted_every_4_jumping": Case(
        tile=128, tiles=4, table="all", inputs="jumping", config=ForwardConfig(stages=2, promote_every=4)
    ),
    "bf16_jumping": Case(scales=None, tile=128, tiles=4, table="all", inputs="jumping"),
    # As many blocks as run at a time, each for several blocks of rows.
    "persistent": Case(
        tile=128, tiles=3, heads=3, padding="tail", config=ForwardConfig(stages=2, persistent=True), multiprocessors=2
    ),
    "persistent_single": Case(
        tile=128, tiles=3, batch=2, table="all", config=ForwardConfig(persistent=True), multiprocessors=1
    ),
    "persistent_cluster": Case(
        heads=3,
        scales=4,
        padding="groups",
        config=ForwardConfig(stages=2, cluster=2, persistent=True),
        multiprocessors=4,
    ),
    "persistent_bf16": Case(
        tile=128,
        tiles=3,
        heads=2,
        scales=None,
        table="per_head",
        config=ForwardConfig(stages=2, persistent=True),
        multiprocessors=3,
    ),
    "persistent_promoted": Case(
        tile=128,
        tiles=4,
        heads=2,
        inputs="rising",
        config=ForwardConfig(stages=2, persistent=True, promote_every=2),
        multiprocessors=3,
    ),
    # Consumers that take turns.
    "turns": Case(tile=128, tiles=5, table="all", config=ForwardConfig(stages=2, take_turns=True)),
    "turns_ragged_persistent_cluster": Case(
        heads=3,
        scales=2,
        # More stages than some rows have steps: the next item starts in the middle of the ring.
        config=ForwardConfig(stages=4, cluster=2, persistent=True, take_turns=True),
        multiprocessors=4,
    ),
    "turns_bf16": Case(scales=None, tile=128, tiles=3, config=ForwardConfig(stages=2, take_turns=True)),
    # V with scales of groups of tiles: more and fewer blocks than a group has, groups in any order, sums that move between them.
    "value_groups": Case(tile=128, tiles=6, table="all", value_tiles=2, padding="tail"),
    "value_groups_of_a_tile": Case(tiles=3, heads=2, scales=2, table="per_head", value_tiles=1, inputs="rising"),
    "value_groups_persistent": Case(
        tile=128,
        tiles=4,
        heads=2,
        batch=2,
        value_tiles=2,
        inputs="outliers",
        padding="groups",
        config=ForwardConfig(stages=2, persistent=True, promote_every=2),
        multiprocessors=3,
    ),
    "cluster_head_dim_64": Case(head_dim=64, heads=2, table="per_head", config=ForwardConfig(stages=4, cluster=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_computes_the_specification(name):
    case = CASES[name]
    got = interpreted.run(attention_cases.errors, case)
    # A bf16 output is rounded by up to 2**-9. Without FP8, P is rounded to 16 bits too, which the specification leaves out. In FP8
    # a P becomes another e4m3 number where the two float32 scores straddle a rounding boundary, which is rare.
    assert max(got["out"], got["channel"]) <= 4e-3
    assert got["reference"] <= (4e-3 if case.scales is None else 2e-3)
    assert max(got["lse"], got["reference_lse"]) <= 1e-4
    assert got["padding_is_0"]
    assert got["dtype"] == case.dtype


@pytest.mark.parametrize(
    ("inputs", "scales", "polynomial_columns"), [("broken", 1, 0), ("broken_query", 2, 48), ("broken_query", None, 0)]
)
def test_non_finite_inputs_show_in_the_output_where_the_specification_has_them(inputs, scales, polynomial_columns):
    """A polynomial loses a NaN, but not the row's maximum, nor the other columns."""
    config = ForwardConfig(stages=2, polynomial_columns=polynomial_columns)
    got = interpreted.run(attention_cases.broken_inputs, inputs, scales, config)
    assert got["spec"].any()
    assert not got["spec"].all()
    np.testing.assert_array_equal(got["kernel"], got["spec"])


def test_repeated_runs_are_bitwise_equal():
    assert interpreted.run(attention_cases.repeated)


@pytest.mark.parametrize("name", ["cluster", "persistent", "persistent_cluster"])
def test_a_block_waits_for_every_arrival_at_its_barriers(name):
    """One that ended earlier would be gone when its peer's last arrivals or a copy come. Simulated blocks live until the end."""
    assert interpreted.run(attention_cases.unseen_phases, CASES[name]) == []


def test_all_warps_meet_before_the_next_queries_replace_those_they_read():
    """Interpret mode has no warps, and can't see this missing."""
    problem = Problem(
        batch=1, heads=1, head_dim=128, query_blocks=4, workers=1, blocks_per_tile=1, shared_table=True, scales=1,
        value_groups=False, dtype=jnp.bfloat16, operand=FP8, config=ForwardConfig(persistent=True),
    )  # fmt: skip
    events = []
    with mock.patch.object(plgpu, "commit_smem", side_effect=lambda: events.append("all warps")):
        load_next(problem, jnp.int32(0), lambda _: events.append("load"))
    assert events == ["all warps", "load"]


def test_log_sum_exp_can_be_left_out():
    assert interpreted.run(attention_cases.without_lse)


def test_a_table_out_of_range_reaches_no_copy():
    """Neither an error of the interpreter nor a hang: on a GPU it would be one or the other."""
    assert interpreted.run(attention_cases.table_out_of_range)


def test_a_kernel_that_hangs_fails_by_name():
    with pytest.raises(TimeoutError, match=r"sleep.*gave no answer in 0.2 s: a deadlock in the kernel"):
        interpreted.run(time.sleep, 5, seconds=0.2)


GRIDS = {"720p": ((21, 45, 80), (7, 9, 4)), "480p": ((21, 30, 52), (7, 6, 6)), "480p_384": ((21, 30, 52), (7, 6, 9))}


def lowered(plan: AttentionPlan, heads: int, head_dim: int, config: ForwardConfig | None, dtype=jnp.bfloat16) -> str:
    fn = functools.partial(fwd_sm90.forward, pattern=plan.pattern, config=config)
    spec = jax.ShapeDtypeStruct((1, plan.layout.num_stored, heads, head_dim), dtype)
    return jax.jit(fn).trace(spec, spec, spec).lower(lowering_platforms=("cuda",)).as_text()


def attention_lowers(plan: AttentionPlan, heads: int, configs: list[ForwardConfig]) -> None:
    """The attention kernel alone, each config: what quantizes for it is the same for all."""
    spec = jax.ShapeDtypeStruct((1, plan.layout.num_stored, heads, 128), jnp.bfloat16)
    operands = jax.eval_shape(quantize_sm90.quantize, spec, spec, spec, plan.pattern)
    for config in configs:
        traced = fwd_sm90.attention.trace(operands, plan.pattern, batch=1, dtype=jnp.dtype(jnp.bfloat16), config=config)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("heads", [40, 12])  # Wan 14B and 1.3B
@pytest.mark.parametrize("scales", [1, 2, 4])
@pytest.mark.parametrize("grid", ["720p", "480p"])
def test_every_candidate_lowers_at_real_shapes(grid, scales, heads):
    """Mosaic's layout inference, swizzles and shared memory limit, as on a GPU."""
    plan = AttentionPlan.build(
        grid=GRIDS[grid][0], tile=GRIDS[grid][1], window=(3, 3, 4), scales_per_tile=scales, quantize=True
    )
    fits = plan.call_shape(head_dim=128, dtype="bfloat16").candidates()
    assert {c.cluster for c in fits} == {1, 2}
    every = (grid, scales, heads) == ("720p", 4, 40)  # elsewhere the default and the one with most switches on
    assert "mosaic_gpu" in lowered(plan, heads, 128, None)
    attention_lowers(plan, heads, fits if every else fits[-1:])


@pytest.mark.parametrize(
    ("head_dim", "scales", "dtype"),
    [(64, 2, jnp.bfloat16), (128, 6, jnp.float32), (128, None, jnp.bfloat16), (64, None, jnp.float16)],
)
def test_other_shapes_lower(head_dim, scales, dtype):
    grid, tile = GRIDS["480p_384"]
    plan = AttentionPlan.build(
        grid=grid, tile=tile, window=None, scales_per_tile=scales or 1, quantize=scales is not None
    )
    assert "mosaic_gpu" in lowered(plan, 4, head_dim, None, dtype)


@pytest.mark.parametrize("grid", ["720p", "480p"])
def test_every_unquantized_candidate_lowers_at_real_shapes(grid):
    plan = AttentionPlan.build(grid=GRIDS[grid][0], tile=GRIDS[grid][1], window=None, scales_per_tile=1, quantize=False)
    attention_lowers(plan, 40, plan.call_shape(head_dim=128, dtype="bfloat16").candidates())


def plain_call(tokens_per_scale):
    """The kernel on two tiles of 256 tokens, each attending both."""
    valid, tiles = jnp.ones(512, bool), jnp.asarray([[0, 1], [0, 1]], jnp.int32)
    pattern = TilePattern(
        key_tiles=tiles, counts=jnp.full(2, 2, jnp.int32), q_valid=valid, k_valid=valid,
        tile_size=256, tokens_per_scale=tokens_per_scale,
    )  # fmt: skip
    return functools.partial(fwd_sm90.forward, pattern=pattern)


@pytest.mark.parametrize("tokens_per_scale", [64, None])
def test_lowers_inside_shard_map_over_batch_and_heads(tokens_per_scale):
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    by_head = jax.P("data", None, "heads")
    sharded = jax.shard_map(
        plain_call(tokens_per_scale), mesh=mesh, in_specs=(by_head,) * 3, out_specs=(by_head, jax.P("data", "heads"))
    )
    spec = jax.ShapeDtypeStruct((2, 512, 4, 128), jnp.bfloat16)
    text = jax.jit(sharded).trace(spec, spec, spec).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "tensor<1x512x2x128xbf16>" in text  # what one device sees


def test_lowers_inside_scan():
    def denoise(q, k, v):
        return jax.lax.scan(lambda x, _: (plain_call(256)(x, k, v)[0], None), q, None, length=3)[0]

    spec = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
    assert "mosaic_gpu" in jax.jit(denoise).trace(spec, spec, spec).lower(lowering_platforms=("cuda",)).as_text()


def test_unsupported_calls_are_refused_with_the_reason():
    x = jnp.zeros((1, 128, 1, 96), jnp.bfloat16)
    pattern = AttentionPlan.build(grid=(2, 8, 8), tile=(2, 8, 8)).pattern
    with pytest.raises(NotImplementedError, match="implementation='sm90': head dim 96 is not 64 or 128"):
        fwd_sm90.forward(x, x, x, pattern)


def test_a_cluster_wider_than_a_tile_is_refused():
    plan = AttentionPlan.build(grid=(7, 9, 4), tile=(7, 9, 2), window=None, scales_per_tile=1, quantize=True)
    with pytest.raises(ValueError, match="cluster=2 doesn't divide the 1 blocks of a tile of 128; use 1"):
        lowered(plan, 1, 128, ForwardConfig(cluster=2))


def test_polynomial_exponentials_without_fp8_are_refused():
    spec = jax.ShapeDtypeStruct((1, 512, 1, 128), jnp.bfloat16)
    call = functools.partial(plain_call(None), config=ForwardConfig(stages=2, polynomial_columns=16))
    with pytest.raises(ValueError, match="polynomial_columns=16 is for FP8, and these operands are bfloat16; use 0"):
        jax.eval_shape(call, spec, spec, spec)


def test_a_slot_of_a_cluster_waits_for_the_consumers_of_both_blocks():
    """Interpret mode simulates a multicast copy as one that all blocks wait for, so it can't see this missing."""
    problem = Problem(
        batch=1, heads=1, head_dim=128, query_blocks=2, workers=1, blocks_per_tile=2, shared_table=True, scales=1,
        value_groups=False, dtype=jnp.bfloat16, operand=FP8, config=ForwardConfig(cluster=2),
    )  # fmt: skip
    memory = scratch(problem)
    for barrier in (memory.k_consumed_barriers, memory.v_consumed_barriers):
        assert isinstance(barrier, plgpu.ClusterBarrier)
        assert barrier.collective_axes == ("member",)
        assert barrier.num_arrivals == CONSUMERS  # of each block


def test_a_machine_without_a_hopper_gpu_is_named():
    assert "compute capability 9.0 (H100, H200), found cpu" in str(fwd_sm90.missing_device())
