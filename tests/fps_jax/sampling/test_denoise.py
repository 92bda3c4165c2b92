"""The denoising loop: guidance modes, progress, NaN reports, one compile per shape."""

import jax
import numpy as np
import pytest

from fps_jax.models.params import flatten, unflatten
from fps_jax.sampling.denoise import _denoise, denoise
from fps_jax.sampling.guidance import Inputs
from fps_jax.sampling.solvers import solver_table
from tests.checkpoints import TINY, tiny_dit
from tests.reference import rel_l2

SHAPE = (2, 16, 3, 4, 6)


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(3), 3)
    noise = jax.random.normal(keys[0], SHAPE)
    text, negative = (jax.random.normal(k, (2, 512, 32)) for k in keys[1:])
    return noise, text, negative


def test_one_batch_of_two_equals_two_passes(inputs):
    noise, text, negative = inputs
    table = solver_table("unipc", "wan", 3, 3.0)
    two, one = (
        denoise(TINY, tiny_dit(), Inputs(noise, text, negative), table, guidance_scale=4.0, batch_guidance=b)
        for b in (False, True)
    )
    assert rel_l2(one, two) <= 1e-5


def test_guidance_of_one_equals_no_guidance(inputs):
    noise, text, negative = inputs
    table = solver_table("euler", "wan", 2, 3.0)
    plain = denoise(TINY, tiny_dit(), Inputs(noise, text), table)
    assert rel_l2(denoise(TINY, tiny_dit(), Inputs(noise, text, negative), table, guidance_scale=1.0), plain) <= 1e-5


def test_same_inputs_give_the_same_bits_and_the_noise_survives(inputs):
    noise, text, _ = inputs
    table = solver_table("dpm++", "wan", 3, 3.0)
    before = np.array(noise)
    first, second = (np.asarray(denoise(TINY, tiny_dit(), Inputs(noise, text), table)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(noise, before)  # not donated


def test_solver_shift_guidance_and_prompt_share_one_program(inputs):
    noise, text, negative = inputs
    before = _denoise._cache_size()
    for solver, shift, scale in (("unipc", 3.0, 5.0), ("dpm++", 5.0, 2.0), ("euler", 8.0, 3.0)):
        table = solver_table(solver, "wan", 4, shift)
        denoise(TINY, tiny_dit(), Inputs(noise, text, negative), table, guidance_scale=scale, progress=lambda *_: None)
    assert _denoise._cache_size() == before + 1


def test_progress_arrives_in_order_and_its_error_is_raised(inputs):
    noise, text, _ = inputs
    table = solver_table("unipc", "wan", 5, 3.0)
    seen = []
    denoise(TINY, tiny_dit(), Inputs(noise, text), table, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)

    def broken(done, total):
        raise RuntimeError("the caller's own mistake")

    with pytest.raises(RuntimeError, match="the caller's own mistake"):
        denoise(TINY, tiny_dit(), Inputs(noise, text), table, progress=broken)


def test_nan_names_the_first_step_and_layer(inputs):
    noise, text, _ = inputs
    params = {p: np.array(a) for p, a in flatten(tiny_dit())}
    params["blocks/mlp/up/bias"][2] = np.nan
    with pytest.raises(
        FloatingPointError, match=r"step 1 of 3 \(timestep 999\), first in block 2; try dtype='float32'"
    ):
        denoise(TINY, unflatten(params), Inputs(noise, text), solver_table("unipc", "wan", 3, 3.0))


def test_overflow_in_a_later_step_is_blamed_on_that_step(inputs):
    noise, text, _ = inputs
    table = solver_table("euler", "wan", 4, 3.0)
    sigma = table.sigma.copy()
    sigma[2] = np.inf
    with pytest.raises(FloatingPointError, match=r"step 3 of 4 .*first in the solver"):
        denoise(TINY, tiny_dit(), Inputs(noise, text), table._replace(sigma=sigma))
