"""`benchmarks.short_sums`: the model of the tensor cores' sums, against cases worked by hand and its own definition."""

import math
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks import short_sums
from benchmarks.short_sums import NEVER, Operands, accumulate, instruction, no_sums, probabilities, result

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E4M3 = E4M3[np.isfinite(E4M3)]
SMALL = 2.0**-7 * (1.125 * 2.0**-6)  # 1.125 * 2**-13, a product of two e4m3 numbers
STEP = 128


def int32(*values: int) -> jnp.ndarray:
    return jnp.asarray(values, jnp.int32)


def one_output(acc: float, products: list[tuple[float, float]], bits: int) -> float:
    """One instruction for one row and one column."""
    p, v = np.zeros((2, 32, 1), np.float32)
    for i, (a, b) in enumerate(products):
        p[i], v[i] = a, b
    out = instruction(jnp.full((1, 1, 1), acc, jnp.float32), jnp.asarray(p), jnp.asarray(v), int32(bits))
    return float(out[0, 0, 0])


def by_definition(acc: float, p: np.ndarray, v: np.ndarray, bits: int) -> float:
    """The model in the docstring of `short_sums`, in rational numbers."""

    def exponent(x: float, smallest: int) -> int:
        return max(math.frexp(x)[1] - 1, smallest)

    terms = [
        (Fraction(float(a)) * Fraction(float(b)), exponent(a, -6) + exponent(b, -6)) for a, b in zip(p, v, strict=True)
    ]
    terms = [(x, e) for x, e in [*terms, (Fraction(acc), exponent(acc, -126))] if x]
    if not terms:
        return 0.0
    unit = Fraction(2) ** (max(e for _, e in terms) - bits)
    total = sum(math.trunc(x / unit) * unit for x, _ in terms)
    if not total:
        return 0.0
    unit = Fraction(2) ** (math.frexp(float(total))[1] - 1 - bits)
    return float(math.trunc(total / unit) * unit)


SMALL_FACTORS = (2.0**-7, 1.125 * 2.0**-6)


@pytest.mark.parametrize(
    ("acc", "products", "bits", "expected"),
    [
        pytest.param(0, [(1, 1), SMALL_FACTORS], 13, 1 + 2**-13, id="low bits of a small product are lost"),
        pytest.param(0, [(1, 1), (-SMALL_FACTORS[0], SMALL_FACTORS[1])], 13, 1 - 2**-13, id="toward zero"),
        pytest.param(1, [(2**-7, 2**-7)] * 32, 13, 1, id="many small products are lost one by one"),
        pytest.param(1, [(2**-7, 2**-7)] * 32, 14, 1 + 2**-9, id="a bit more keeps them"),
        pytest.param(0, [(1.5, 1.5), SMALL_FACTORS, SMALL_FACTORS], 13, 2.25 + 2**-12, id="2.25 has exponent 0 here"),
        pytest.param(0, [(1.5, 1.5), SMALL_FACTORS], 13, 2.25, id="the sum is cut to 13 bits of its own exponent"),
        pytest.param(1 + 2**-13, [(2, 1)], 13, 3, id="the accumulator loses bits to a larger product"),
        pytest.param(0, [(2**-9, 256), (2**-6, 2**-6)], 13, 0.5, id="a denormal factor has exponent -6"),
        pytest.param(0, [], 13, 0, id="zeros"),
        pytest.param(0, [(448, 448)] * 32, 13, 32 * 448**2, id="the largest numbers"),
    ],
)
def test_an_instruction_truncates_as_worked_by_hand(acc, products, bits, expected):
    assert one_output(acc, products, bits) == expected


def test_an_instruction_follows_the_definition_bit_by_bit():
    rng = np.random.default_rng(0)
    bits = (13, 14)
    acc = np.zeros((2, 4, 3), np.float32)
    inexact = 0
    for trial in range(12):
        # Any e4m3 numbers, and narrower ones among which no product drowns all others.
        codes = E4M3 if trial % 2 else E4M3[(np.abs(E4M3) > 0.1) & (np.abs(E4M3) < 8)]
        p, v = rng.choice(codes, (32, 4)), rng.choice(codes, (32, 3))
        got = np.asarray(instruction(jnp.asarray(acc), jnp.asarray(p), jnp.asarray(v), int32(*bits)))
        for n, r, c in np.ndindex(acc.shape):
            assert got[n, r, c] == by_definition(float(acc[n, r, c]), p[:, r], v[:, c], bits[n])
        inexact += np.sum(got != acc + p.T.astype(np.float64) @ v)
        acc = got
    assert inexact > 100  # of 288: truncation was at work


def run(p, v, shrink, every, bits=13):
    sums = no_sums(len(every), p.shape[1], v.shape[1])
    arrays = (jnp.asarray(x, jnp.float32) for x in (p, v, shrink))
    return accumulate(sums, *arrays, int32(*every), int32(*[bits] * len(every)))


def test_sums_of_few_bits_are_exact_for_every_k():
    rng = np.random.default_rng(1)
    p, v = rng.integers(0, 4, (5 * STEP, 3)), rng.integers(-3, 4, (5 * STEP, 2))
    sums = np.asarray(result(run(p, v, np.ones((5, 3)), (1, 2, 4, 8, NEVER))))
    np.testing.assert_array_equal(sums, np.broadcast_to(p.T @ v, (5, 3, 2)))


def test_one_step_is_four_instructions_whatever_k_is():
    rng = np.random.default_rng(2)
    p, v = np.abs(rng.choice(E4M3, (STEP, 3))), rng.choice(E4M3, (STEP, 2))
    acc = jnp.zeros((1, 3, 2))
    for i in range(0, STEP, 32):
        acc = instruction(acc, jnp.asarray(p[i : i + 32]), jnp.asarray(v[i : i + 32]), int32(13))
    sums = np.asarray(result(run(p, v, np.ones((1, 3)), (1, 2, 8, NEVER))))
    np.testing.assert_array_equal(sums, np.broadcast_to(np.asarray(acc), (4, 3, 2)))
    assert np.all(sums[0] != p.T.astype(np.float64) @ v)


def test_promotion_every_k_steps_keeps_what_a_longer_short_sum_loses():
    # A step that sums to 1, then steps of 2**-14, which 13 bits below 1 can't hold and float32 can.
    p, v = np.zeros((2, 4 * STEP, 1), np.float32)
    p[0] = v[0] = 1
    p[STEP::STEP] = v[STEP::STEP] = 2**-7
    sums = run(p, v, np.ones((4, 1)), (1, 2, 3, 4, NEVER))
    expected = [1 + 3 * 2**-14, 1 + 2 * 2**-14, 1 + 2**-14, 1, 1]
    np.testing.assert_array_equal(result(sums)[:, 0, 0], expected)
    np.testing.assert_array_equal(sums.short[:, 0, 0], [0, 0, 2**-14, 0, 1])  # k = 3 has one step left


def test_earlier_sums_shrink_exactly_and_parts_go_on_where_the_last_ended():
    rng = np.random.default_rng(3)
    p, v = np.abs(rng.choice(E4M3, (6 * STEP, 2))), rng.choice(E4M3, (6 * STEP, 3))
    every, bits = int32(1, 4, NEVER), int32(13, 13, 13)
    shrink = np.ones((6, 2), np.float32)
    whole = run(p, v, shrink, (1, 4, NEVER))
    parts = no_sums(3, 2, 3)
    for steps in (slice(0, 3), slice(3, 6)):
        keys = slice(steps.start * STEP, steps.stop * STEP)
        parts = accumulate(parts, *(jnp.asarray(x) for x in (p[keys], v[keys], shrink[steps])), every, bits)
    np.testing.assert_array_equal(result(parts), result(whole))

    v[5 * STEP :] = 0  # so that the last step does nothing but shrink, the first row by 8
    before = np.asarray(result(run(p, v, shrink, (1, 4, NEVER))))
    shrink[5, 0] = 2**-3
    after = np.asarray(result(run(p, v, shrink, (1, 4, NEVER))))
    np.testing.assert_array_equal(after, before * np.float32([[[2**-3], [1]]]))


def test_probabilities_refer_to_the_running_maximum_rounded_up():
    scores = np.full((1, 3 * STEP), -20, np.float32)
    scores[0, [5, STEP + 7, 2 * STEP]] = 1.5, 4, 3
    codes, tops, shrink = probabilities(scores)
    np.testing.assert_array_equal(tops[:, 0], [2, 4, 4])
    np.testing.assert_array_equal(shrink[:, 0], [1, 2**-2, 1])
    # 448 * 2**-0.5 = 316.8: e4m3 has 288 and 320 there
    np.testing.assert_array_equal(codes[[5, STEP + 7, 2 * STEP], 0], [320, 448, 224])
    np.testing.assert_array_equal(codes[:2, 0], 0)  # 448 * 2**-22
    total = short_sums.exact_sums(codes, np.ones((3 * STEP, 1)), tops)
    assert total == 320 / 4 + 448 + 224


def test_measure_compares_the_short_sums_with_exact_ones_and_fp8_with_none(monkeypatch):
    monkeypatch.setattr(short_sums, "KEYS", (256,))
    x = short_sums.operands(0, 1.0, 1.0, 0.2)
    [(keys, (fp8, [[output, row_sums, in_all]]))] = short_sums.measure(x, [(1, 13)]).items()
    assert keys == 256

    codes, tops, shrink = probabilities(x.scores)
    assert np.any(tops[0] != tops[1])
    short = np.asarray(result(run(codes, x.v, shrink, (1,))))[0].astype(np.float64)
    first, second = (codes[keys].T.astype(np.float64) @ x.v[keys] for keys in (slice(STEP), slice(STEP, None)))
    exact = first * 2 ** (tops[0] - tops[1]).astype(np.float64)[:, None] + second
    out, exact_out = (s[:, :-1] / s[:, -1:] * x.v_scale for s in (short, exact))
    norm = np.linalg.norm
    np.testing.assert_allclose(output, norm(out - exact_out) / norm(exact_out))
    np.testing.assert_allclose(row_sums, np.max(1 - short[:, -1] / exact[:, -1]))
    np.testing.assert_allclose(in_all, norm(out - x.unrounded[256]) / norm(x.unrounded[256]))
    np.testing.assert_allclose(fp8, norm(exact_out - x.unrounded[256]) / norm(x.unrounded[256]))
    assert 0 < output < fp8


def test_operands_are_what_fp8_attention_reads(monkeypatch):
    monkeypatch.setattr(short_sums, "KEYS", (256, 1024))
    x: Operands = short_sums.operands(1, 2.0, 1.0, 1.0)
    assert x.scores.shape == (64, 1024)
    # 64 query rows: 1 / sqrt(2 * 64) of their lengths.
    np.testing.assert_allclose(x.scores.std(), 2 * np.log2(np.e), rtol=0.1)
    assert np.isin(x.v, E4M3).all()
    np.testing.assert_array_equal(x.v[:, -1], 1)
    np.testing.assert_array_equal(np.abs(x.v[:, :-1]).max(0), 448)
    # FP8 scores give the unrounded output but for their rounding: half a step of e4m3 is 1/16.
    weights = np.exp2(x.scores.astype(np.float64))
    for keys, unrounded in x.unrounded.items():
        out = weights[:, :keys] / weights[:, :keys].sum(1, keepdims=True) @ (x.v[:keys, :-1] * x.v_scale)
        assert np.linalg.norm(out - unrounded) < np.linalg.norm(unrounded) / 16
