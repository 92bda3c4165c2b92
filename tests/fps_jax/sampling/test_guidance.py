"""The guided velocity: its definition, one pass or two, and what it reports of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.attention.attend import TokenAttention
from fps_jax.models.dit import dit
from fps_jax.models.dit_layers import TextKV
from fps_jax.sampling.guidance import Inputs, guided_velocity
from tests.checkpoints import TINY, tiny_dit
from tests.reference import rel_l2

T = jnp.array([900.0, 100.5])  # one for each sample


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (2, 16, 3, 4, 6))
    return x, *(jax.random.normal(key, (2, 7, 32)) for key in keys[1:])


@pytest.mark.parametrize("batch_guidance", [False, True])
def test_it_is_the_negative_velocity_and_a_multiple_of_the_difference(arrays, batch_guidance):
    x, text, negative = arrays
    params = tiny_dit()
    positive_v, negative_v = (dit(TINY, params, x, T, states).velocity for states in (text, negative))
    got = guided_velocity(
        TINY, params, Inputs(x, text, negative), x, T, guidance_scale=3.0, batch_guidance=batch_guidance
    )
    assert rel_l2(got.velocity, negative_v + 3.0 * (positive_v - negative_v)) <= 1e-5
    assert int(got.first_bad) == -1
    assert rel_l2(got.velocity, positive_v) > 0.01


def test_without_a_negative_prompt_it_is_the_models_velocity_whatever_the_scale(arrays):
    x, text, _ = arrays
    got = guided_velocity(TINY, tiny_dit(), Inputs(0 * x, text), x, T, guidance_scale=3.0)
    np.testing.assert_array_equal(got.velocity, dit(TINY, tiny_dit(), x, T, text).velocity)


def test_keys_and_values_of_a_prompt_go_with_no_negative_one(arrays):
    x, text, negative = arrays
    inputs = Inputs(x, TextKV(text, text), negative)
    with pytest.raises(
        ValueError, match="text is keys and values, and negative is text states; give text states of both"
    ):
        guided_velocity(TINY, tiny_dit(), inputs, x, T)


@pytest.mark.parametrize("batch_guidance", [False, True])
def test_a_nan_of_the_negative_prompt_alone_is_reported(arrays, batch_guidance):
    x, text, negative = arrays
    inputs = Inputs(x, text, negative.at[1, 2, 3].set(jnp.nan))
    got = guided_velocity(TINY, tiny_dit(), inputs, x, T, guidance_scale=2.0, batch_guidance=batch_guidance)
    assert int(got.first_bad) == 0  # the embeddings


def test_what_attention_taps_is_of_the_prompt(arrays):
    x, text, negative = arrays

    class Tapped(TokenAttention):
        layout = None

        def __call__(self, q, k, v, /, *, layer, taps):
            if taps is not None:
                taps["largest"] = jnp.abs(q).max()
            return v

    taps, alone = {}, {}
    guided_velocity(TINY, tiny_dit(), Inputs(x, text, negative), x, T, Tapped(), attention_taps=taps)
    guided_velocity(TINY, tiny_dit(), Inputs(x, text), x, T, Tapped(), attention_taps=alone)
    assert taps["largest"].shape == (TINY.num_layers,)
    np.testing.assert_array_equal(taps["largest"], alone["largest"])
