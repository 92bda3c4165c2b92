"""The static side of a call: what the kernel can't do, and which configs fit shared memory."""

from dataclasses import replace

import numpy as np
import pytest

from fps_jax import AttentionPlan
from pallas_kernels.sm90.call_shape import CallShape
from pallas_kernels.sm90.config import ForwardConfig

CALL = CallShape(head_dim=128, dtype="bfloat16", tile_size=256, tokens_per_scale=256, table_density=0.2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 96}, "head dim 96 is not 64 or 128; use 'portable'"),
        (
            {"tile_size": 64},
            "tiles of 64 stored tokens are not whole blocks of 128; use tiles that store 128, 256 or 384",
        ),
        ({"tokens_per_scale": 32}, "tokens_per_scale=32 is not a multiple of 64"),
        ({"tokens_per_scale": None, "dtype": "float32"}, "float32 without quantization has no tensor-core matmul"),
    ],
)
def test_what_the_kernel_does_not_do_has_a_reason(change, words):
    assert CALL.unsupported() is None
    assert words in str(replace(CALL, **change).unsupported())


def test_a_dtype_that_no_implementation_takes_is_refused():
    with pytest.raises(ValueError, match="dtype='int8' is not one of float32, bfloat16, float16"):
        replace(CALL, dtype="int8")


def test_sizes_follow_from_quantization_and_dtype():
    def sizes(**change):
        call = replace(CALL, **change)
        return call.operand_bytes, call.output_bytes, call.scales

    assert sizes() == (1, 2, 1)
    assert sizes(dtype="float32", tokens_per_scale=64) == (1, 4, 2)
    assert sizes(tokens_per_scale=192) == (1, 2, 2)  # the middle block has both
    assert sizes(tokens_per_scale=None) == (2, 2, 0)
    assert replace(CALL, tile_size=384).blocks_per_tile == 3


def test_a_plan_and_its_pattern_are_the_same_call():
    plan = AttentionPlan.build((4, 8, 16), (4, 8, 8), (1, 1, 1), scales_per_tile=2)
    call = CallShape.of(plan.pattern, head_dim=64, dtype=np.dtype("float32"))
    assert call == plan.call_shape(head_dim=64, dtype="float32")
    assert (call.tile_size, call.tokens_per_scale, call.table_density) == (256, 128, 0.5)


def test_a_config_that_needs_too_much_shared_memory_is_refused():
    with pytest.raises(
        ValueError, match=r"stages=8 at head dim 128 needs .* bytes of shared memory, a block has 232448"
    ):
        CALL.check_fits(ForwardConfig(stages=8))
    CALL.check_fits(ForwardConfig(stages=4))


def test_candidates_fit_and_cover_both_cluster_sizes():
    found = CALL.candidates()
    assert {(c.stages, c.cluster) for c in found} == {(2, 1), (4, 1), (2, 2), (4, 2)}
    assert all(c.cluster == 1 for c in replace(CALL, tile_size=384).candidates())
