"""What sums of FP8 products in the tensor cores cost in accuracy, SIMULATED on a CPU: nothing here ran on a GPU.

    python -m benchmarks.short_sums     # a minute or two on 2 cores

The tensor cores of Hopper add FP8 products in fewer bits than float32 has. The attention kernel may start P V from zero and add it
in float32 registers every step of 128 keys, or every k-th step, which saves instructions. This script computes the same attention
rows with the sums of every k, in a model of the hardware's arithmetic, and with exact sums: same P, same V.

The model of one instruction, wgmma with 32 e4m3 products an output, accumulator C:
  - the exponent of a product is the sum of its factors' exponents, not normalized (1.5 * 1.5 has 0; of denormals it is -6 each);
  - all 32 products and C are truncated toward zero to multiples of 2**(E - 13), E the largest exponent among them;
  - they are added exactly, and the sum truncated toward zero to 13 bits of fraction (8 of exponent).
Source: MMA-Sim (arXiv 2511.10909, github.com/microsoft/MMA-Sim: wgmma of FP8 on Hopper, which its authors found bitwise equal to
hardware). It agrees with the 1 + 8 + 13 bits of SageAttention2 (arXiv 2411.10958) and, counting the leading one, with the "around
14 bits" of DeepSeek-V3 (arXiv 2412.19437 section 3.3.2). 14 bits of fraction are simulated too, as the other way to read that.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.record import write
from pallas_kernels import reference
from pallas_kernels.sm90.config import BLOCK_KV, BLOCK_Q

INSTRUCTION = 32  # keys that one FP8 wgmma multiplies
FRACTION_BITS = 13
HEAD_DIM, TOKENS_PER_SCALE = 128, 256
KEYS = (15_360, 76_800)  # 720p, stored tokens: density 0.2, a part of the dense row; and dense
DEVIATIONS = (1, 2, 4)  # of the logits
# Mean and deviation of V's channels. Truncation is a bias, so values of one sign are the bad case.
VALUES = {"centred": (0.0, 1.0), "shifted": (1.0, 1.0), "biased": (1.0, 0.2)}
SEEDS = 2
NEVER = 0
PROMOTE_EVERY = (1, 2, 4, 8, NEVER)
ERRORS = {
    "output": "relative L2 of the output, against exact sums of the same P and V",
    "row_sums": "largest relative error of a row's sum",
    "output_against_unrounded": "relative L2 of the output, against unrounded softmax attention",
}
_TINY = 2.0**-100  # below any product; a step of zeros must not divide by zero


class Sums(NamedTuple):
    """Sums under way, one for each variant of the arithmetic: n variants, R rows, C columns."""

    short: Float[Array, "n R C"]  # in the tensor cores' format
    promoted: Float[Array, "n R C"]  # in float32
    steps: Int[Array, ""]


def no_sums(variants: int, rows: int, columns: int) -> Sums:
    zeros = jnp.zeros((variants, rows, columns), jnp.float32)
    return Sums(zeros, zeros, jnp.int32(0))


def leading(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2**floor(log2 |x|) of float32; 0 for 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def leading_of_code(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same of e4m3 numbers (held in float32), whose exponents end at -6: below that lie their denormals."""
    return jnp.where(x == 0, 0.0, jnp.maximum(leading(x), 2.0**-6))


def instruction(
    acc: Float[Array, "n R C"], p: Float[Array, "k R"], v: Float[Array, "k C"], fraction_bits: Int[Array, "n"]
) -> Float[Array, "n R C"]:
    """acc + p^T v as one wgmma computes it, in the model above, for n accumulators of their own precision.

    Args:
      acc: float32 that holds numbers of the accumulator's format.
      p, v: e4m3 numbers in float32.
      fraction_bits: of each accumulator, at most 14 (float32 then adds the truncated products exactly).
    """
    products = [leading_of_code(a)[:, None] * leading_of_code(b)[None, :] for a, b in zip(p, v, strict=True)]
    largest = products[0]
    for product in products[1:]:
        largest = jnp.maximum(largest, product)
    largest = jnp.maximum(jnp.maximum(largest[None], leading(acc)), _TINY)
    # A power of two, how often the unit fits 1. Not exp2, whose float32 result XLA gets wrong in the last bit.
    units = jnp.left_shift(1, fraction_bits).astype(jnp.float32)[:, None, None] / largest
    total = jnp.trunc(acc * units)
    for a, b in zip(p, v, strict=True):
        total = total + jnp.trunc((a[:, None] * b[None, :])[None] * units)
    dropped = ~((jnp.uint32(1) << (23 - fraction_bits).astype(jnp.uint32)) - jnp.uint32(1))
    bits = jax.lax.bitcast_convert_type(total / units, jnp.uint32) & dropped[:, None, None]
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.jit
def accumulate(
    sums: Sums,
    p: Float[Array, "S R"],
    v: Float[Array, "S C"],
    shrink: Float[Array, "steps R"],
    promote_every: Int[Array, "n"],
    fraction_bits: Int[Array, "n"],
) -> Sums:
    """`sums` after more steps of 128 keys, as the kernel would go on with them.

    Args:
      p, v: e4m3 numbers in float32.
      shrink: powers of two, by which the sums of earlier steps are multiplied before a step.
      promote_every: steps after which short sums are added in float32 and start from zero again; 0 for never.
    """
    steps = shrink.shape[0]
    p = p.reshape(steps, BLOCK_KV // INSTRUCTION, INSTRUCTION, -1)
    v = v.reshape(steps, BLOCK_KV // INSTRUCTION, INSTRUCTION, -1)

    def step(sums: Sums, block):
        p, v, shrink = block
        short, promoted = (x * shrink[None, :, None] for x in sums[:2])
        short, _ = jax.lax.scan(lambda acc, x: (instruction(acc, *x, fraction_bits), None), short, (p, v))
        done = sums.steps + 1
        due = (promote_every != NEVER) & (done % jnp.maximum(promote_every, 1) == 0)
        due = due[:, None, None]
        return Sums(jnp.where(due, 0.0, short), jnp.where(due, promoted + short, promoted), done), None

    return jax.lax.scan(step, sums, (p, v, shrink))[0]


def result(sums: Sums) -> Float[Array, "n R C"]:
    """The sums, with what is not promoted yet added in float32."""
    return sums.promoted + sums.short


def probabilities(scores: Float[np.ndarray, "R S"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(e4m3 numbers 448 P [S, R], tops [steps, R], shrink [steps, R]) of scores in log2 units, step after step.

    `tops` is the running maximum rounded up to a whole number, as `reference.row_top` has it; P = 2**(score - top) of its step.
    """
    steps = scores.shape[1] // BLOCK_KV
    maxima = scores.reshape(-1, steps, BLOCK_KV).max(2).T
    tops = np.ceil(np.maximum.accumulate(maxima, axis=0)).astype(np.float32)
    p = np.exp2(scores.T - np.repeat(tops, BLOCK_KV, axis=0))
    codes = np.asarray(reference.round_to_fp8(jnp.asarray(p * reference.FP8_MAX)).astype(jnp.float32))
    return codes, tops, powers_of_two(np.concatenate([tops[:1], tops[:-1]]) - tops)


def powers_of_two(whole: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    return np.ldexp(np.float32(1), whole.astype(np.int32))


def exact_sums(p: np.ndarray, v: np.ndarray, tops: np.ndarray) -> Float[np.ndarray, "R C"]:
    """P V of the same e4m3 numbers in float64, at the scale of the last step."""
    scale = powers_of_two(tops - tops[-1])
    return (p * np.repeat(scale.astype(np.float64), BLOCK_KV, axis=0)).T @ v.astype(np.float64)


class Operands(NamedTuple):
    """A consumer's 64 query rows and their keys: in FP8, and as they were."""

    scores: Float[np.ndarray, "R S"]  # log2 units, of the quantized q and k
    v: Float[np.ndarray, "S C"]  # e4m3 numbers, and a column of ones last
    v_scale: Float[np.ndarray, "H"]
    unrounded: dict[int, np.ndarray]  # keys -> output [R, H] of softmax attention in float64 without FP8


def operands(seed: int, deviation: float, mean: float, spread: float) -> Operands:
    """Gaussian q, k, v, logits of standard deviation `deviation`, V of mean `mean` and deviation `spread`."""
    rng = np.random.default_rng(seed)
    keys = max(KEYS)
    q = rng.standard_normal((BLOCK_Q, HEAD_DIM), np.float32) * np.float32(deviation)
    k = rng.standard_normal((keys, HEAD_DIM), np.float32)
    v = np.float32(mean) + np.float32(spread) * rng.standard_normal((keys, HEAD_DIM), np.float32)

    def rounded(x: np.ndarray, tokens: int) -> np.ndarray:
        return np.asarray(reference.fake_quant(jnp.asarray(x)[None, :, None], tokens_per_scale=tokens))[0, :, 0]

    scale = HEAD_DIM**-0.5
    scores = rounded(q, BLOCK_Q) @ rounded(k, TOKENS_PER_SCALE).T * np.float32(scale * np.log2(np.e))
    codes, v_scale = reference.quantize_values(jnp.asarray(v)[None, :, None], jnp.ones(keys, bool))
    codes = np.asarray(codes.astype(jnp.float32))[0, :, 0]
    unrounded = {}
    for count in KEYS:
        logits = (q @ k[:count].T).astype(np.float64) * scale
        weights = np.exp(logits - logits.max(1, keepdims=True))
        unrounded[count] = weights / weights.sum(1, keepdims=True) @ v[:count].astype(np.float64)
    ones = np.ones((keys, 1), np.float32)  # the kernel has eight of these columns, all alike
    return Operands(scores, np.concatenate([codes, ones], axis=1), np.asarray(v_scale)[0, 0, 0], unrounded)


def relative(error_of: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(error_of - truth) / np.linalg.norm(truth))


def measure(x: Operands, variants: list[tuple[int, int]]) -> dict[int, tuple[float, np.ndarray]]:
    """Errors of one case, `variants` being (promote_every, fraction_bits), for every number of keys.

    Returns: keys -> (error of FP8 with exact sums, [n, 3] `ERRORS` of the variants).
    """
    p, tops, shrink = probabilities(x.scores)
    every, bits = (jnp.asarray(column, jnp.int32) for column in zip(*variants, strict=True))
    sums = no_sums(len(variants), BLOCK_Q, HEAD_DIM + 1)
    found = {}
    part = KEYS[0]  # both numbers are whole parts, so that one compiled program serves
    for end in range(part, max(KEYS) + 1, part):
        steps = slice((end - part) // BLOCK_KV, end // BLOCK_KV)
        inputs = (jnp.asarray(a) for a in (p[end - part : end], x.v[end - part : end], shrink[steps]))
        sums = accumulate(sums, *inputs, every, bits)
        if end not in KEYS:
            continue
        exact = exact_sums(p[:end], x.v[:end], tops[: end // BLOCK_KV])
        exact_out = exact[:, :-1] / exact[:, -1:] * x.v_scale
        errors = []
        for short in np.asarray(result(sums), np.float64):
            out = short[:, :-1] / short[:, -1:] * x.v_scale
            row_sums = np.abs(short[:, -1] / exact[:, -1] - 1).max()
            errors.append((relative(out, exact_out), row_sums, relative(out, x.unrounded[end])))
        found[end] = relative(exact_out, x.unrounded[end]), np.array(errors)
    return found


def main() -> None:
    variants = [(k, bits) for bits in (FRACTION_BITS, FRACTION_BITS + 1) for k in PROMOTE_EVERY]
    cases, begin = [], time.perf_counter()
    for deviation, (values, of_v) in ((d, item) for d in DEVIATIONS for item in VALUES.items()):
        seeds = [measure(operands(seed, deviation, *of_v), variants) for seed in range(SEEDS)]
        for keys in KEYS:
            fp8 = float(np.mean([found[keys][0] for found in seeds]))
            errors = np.stack([found[keys][1] for found in seeds])  # [seeds, variants, 3]
            of_column = np.stack([errors[..., 0].mean(0), errors[..., 1].max(0), errors[..., 2].mean(0)])
            by_bits: dict[str, dict[str, dict[str, float]]] = {}
            for (k, bits), numbers in zip(variants, of_column.T, strict=True):
                for name, x in zip(ERRORS, numbers, strict=True):
                    of_bits = by_bits.setdefault(f"{bits} fraction bits", {})
                    of_bits.setdefault(name, {})[str(k or "never")] = float(f"{x:.3g}")
            case = {"logit_deviation": deviation, "v": values, "keys": keys}
            cases.append({**case, "fp8": float(f"{fp8:.3g}"), **by_bits})
            shown = by_bits[f"{FRACTION_BITS} fraction bits"]["output"]
            print(*case.values(), f"FP8 {fp8:.1e}, output of short sums by promote_every", shown, flush=True)
    print(f"{time.perf_counter() - begin:.0f} s")
    write(
        "short_sums",
        {
            "claim": "SIMULATED on a CPU, not measured on a GPU: the error of P V summed in the tensor cores' format and promoted "
            "to float32 every k-th step of 128 keys",
            "case": f"{BLOCK_Q} rows, head dim {HEAD_DIM}, Gaussian q and k, V of (mean, deviation) {VALUES}; Q, K, V, P in FP8; "
            f"{SEEDS} seeds: mean of relative L2, largest of row_sums",
            "fp8": "relative L2 of the output with exact sums, against unrounded softmax attention",
            "errors, by promote_every": ERRORS,
            "cases": cases,
        },
    )


if __name__ == "__main__":
    main()
