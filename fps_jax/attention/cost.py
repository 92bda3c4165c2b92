"""What a plan's attention costs on a Hopper GPU, beside bf16 dense attention: measured rates where there are some, else estimates.

    cost = pairs * rate + pass

pairs: stored (query, key) pairs of the listed tiles over those of dense attention on the tokens alone, so padding is paid for
(by a dense plan for queries only: its keys lose theirs).
rate: time a pair, beside bf16 dense. Where the kernel's tuned table (`pallas_kernels.sm90.tuned`, written by fps-tune) has both the
plan's key and the dense bf16 one, measured on the same kind of GPU: TFLOP/s of that by TFLOP/s of the plan's. Both were measured
on the same tiles or similar ones, so padding, which is in `pairs`, cancels. Else 1/2 in FP8, whose tensor cores are twice as fast
(H200 datasheet: 1979 against 989 TFLOP/s), times 1.01 where 128 keys have two scales (369 against 364 instructions a step of the
kernel), and 1 in bf16.
pass: 0.005 * 75600 / tokens for the quantization of q, k and v in FP8, linear in tokens where dense attention is quadratic: an
estimate of 1.0 ms of memory traffic beside 0.2 s of bf16 attention for 40 heads at 75,600 tokens.
"""

from fps_jax.attention.plan import AttentionPlan
from pallas_kernels.sm90 import tuned
from pallas_kernels.sm90.config import BLOCK_Q

_HEAD_DIM = 128  # of every Wan model


def attention_cost(plan: AttentionPlan) -> float:
    """Estimated time of one attention forward, in units of bf16 dense attention without padding. See the module for the formula.

    Raises: as `tuned.read_tuned_table`, for a tuned table that can't be read.
    """
    plan = plan.aligned(BLOCK_Q)  # as the kernel stores it, wherever this runs
    layout, counts = plan.layout, plan.counts
    if plan.whole_grid and not plan.quantize:
        return layout.num_stored / layout.num_tokens
    rows = counts.sum() / (counts.shape[0] if plan.per_head else 1)
    cost = float(rows) * layout.stored**2 / layout.num_tokens**2 * _rate(plan)
    return cost + 0.005 * 75600 / layout.num_tokens if plan.quantize else cost


def _rate(plan: AttentionPlan) -> float:
    """Time a pair, beside bf16 dense attention."""
    key = tuned.TuningKey.of(plan.call_shape(head_dim=_HEAD_DIM, dtype="bfloat16"))
    table = tuned.tuned_entries()
    ours, dense = table.get(key), table.get(tuned.TuningKey(head_dim=_HEAD_DIM, density="dense", scales=0))
    if ours is not None and dense is not None and ours.measured_on["gpu"] == dense.measured_on["gpu"]:
        return dense.tflops / ours.tflops
    if plan.tokens_per_scale is None:
        return 1.0
    return 0.5 * 1.01 if plan.tokens_per_scale < 128 else 0.5
