"""What a plan's attention costs on a Hopper GPU, beside bf16 dense attention: a stated formula, until times are measured.

    cost = pairs * rate * scales + pass

pairs: stored (query, key) pairs of the listed tiles over those of dense attention on the tokens alone, so padding is paid for
(by a dense plan for queries only: its keys lose theirs).
rate: 1/2 in FP8, whose tensor cores are twice as fast (H200 datasheet: 1979 against 989 TFLOP/s), else 1.
scales: 1.02 where 128 keys have two scales (416 against 408 instructions a step of the kernel), else 1.
pass: 0.005 * 75600 / tokens for the quantization of q, k and v in FP8, linear in tokens where dense attention is quadratic: an
estimate of 1.0 ms of memory traffic beside 0.2 s of bf16 attention for 40 heads at 75,600 tokens.
"""

from fps_jax.plan import AttentionPlan


def attention_cost(plan: AttentionPlan) -> float:
    """Estimated time of one attention forward, in units of bf16 dense attention without padding. See the module for the formula."""
    layout, counts = plan.layout, plan.counts
    if plan.whole_grid and not plan.quantize:
        return layout.num_stored / layout.num_tokens
    rows = counts.sum() / (counts.shape[0] if plan.per_head else 1)
    pairs = float(rows) * layout.stored**2 / layout.num_tokens**2
    if plan.tokens_per_scale is None:
        return pairs
    scales = 1.02 if plan.tokens_per_scale < 128 else 1.0
    return pairs * 0.5 * scales + 0.005 * 75600 / layout.num_tokens
