"""The flow-matching loss against its definition, and its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.models.dit import DiTOutput
from fps_train.loss import draw, flow_matching_loss, weight


def arrays(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def linear(gain):
    """A 'model' whose velocity is a known function of x_t and t."""
    return lambda x, t: DiTOutput(gain * x + t[:, None, None, None, None] / 1000, jnp.int32(-1))


def test_loss_is_the_mean_square_of_velocity_minus_noise_plus_latents():
    x0, noise, sigma = arrays(3, 4, 2, 2, 2), arrays(3, 4, 2, 2, 2, seed=1), np.array([0.1, 0.5, 0.9])
    at = sigma[:, None, None, None, None]
    x_t = (1 - at) * x0 + at * noise
    expected = ((0.3 * x_t + at - (noise - x0)) ** 2).mean((1, 2, 3, 4))
    given = (jnp.asarray(a, jnp.float32) for a in (x0, noise, sigma))
    loss = flow_matching_loss(linear(0.3), *given)
    np.testing.assert_allclose(loss.samples, expected, rtol=1e-5)
    assert float(loss.loss) == pytest.approx(expected.mean(), rel=1e-5)


def test_a_velocity_that_is_right_has_no_loss():
    x0, noise, sigma = (
        jnp.asarray(a, jnp.float32) for a in (arrays(2, 4, 1, 2, 2), arrays(2, 4, 1, 2, 2, seed=1), [0.2, 0.7])
    )
    loss = flow_matching_loss(lambda x, t: DiTOutput(noise - x0, jnp.int32(-1)), x0, noise, sigma)
    assert float(loss.loss) == 0


def test_a_teacher_takes_its_share_and_no_gradient():
    x0, noise = (jnp.asarray(arrays(2, 4, 1, 2, 2, seed=s), jnp.float32) for s in range(2))
    sigma = jnp.array([0.2, 0.7], jnp.float32)

    def loss(gain, teacher_gain, share):
        teacher = linear(teacher_gain)
        return flow_matching_loss(linear(gain), x0, noise, sigma, teacher=teacher, teacher_weight=share).loss

    x_t = (1 - sigma[:, None, None, None, None]) * x0 + sigma[:, None, None, None, None] * noise
    own, towards = loss(0.5, 0.5, 0.0), jnp.square(0.3 * x_t).mean()
    assert float(loss(0.5, 0.8, 0.25)) == pytest.approx(0.75 * float(own) + 0.25 * float(towards), rel=1e-5)
    assert float(jax.grad(loss, argnums=1)(0.5, 0.8, 0.25)) == 0
    assert float(jax.grad(loss, argnums=0)(0.5, 0.8, 0.25)) != 0


def test_noise_of_a_sample_is_the_same_in_any_batch():
    seed = jnp.uint32(3)
    uniform, noise = draw(seed, jnp.array([5, 6, 7], jnp.uint32), (4, 2))
    alone = draw(seed, jnp.array([6], jnp.uint32), (4, 2))
    np.testing.assert_array_equal(uniform[1:2], alone[0])
    np.testing.assert_array_equal(noise[1:2], alone[1])
    assert len({float(u) for u in uniform}) == 3
    other = draw(jnp.uint32(4), jnp.array([6], jnp.uint32), (4, 2))
    assert (np.asarray(other[1]) != np.asarray(alone[1])).all()


def test_noise_is_standard_normal():
    uniform, noise = draw(jnp.uint32(0), jnp.arange(2000, dtype=jnp.uint32), (16,))
    # Three deviations of a mean and of a variance of 32,000 numbers, and of a mean of 2,000 uniform ones.
    assert abs(float(noise.mean())) < 3 / 32000**0.5
    assert abs(float(noise.var()) - 1) < 3 * (2 / 32000) ** 0.5
    assert abs(float(uniform.mean()) - 0.5) < 3 / (12 * 2000) ** 0.5


def test_cosmap_weights_the_ends_less_than_the_middle_and_is_a_density():
    sigma = jnp.linspace(0, 1, 10001, dtype=jnp.float32)
    values = weight(sigma, "cosmap")
    assert float(values[5000]) == pytest.approx(4 / np.pi, rel=1e-6)
    assert float(values[0]) == pytest.approx(2 / np.pi, rel=1e-6)
    assert float(values.mean()) == pytest.approx(1, rel=1e-3)  # arXiv 2403.03206: a density of sigma on [0, 1]
    np.testing.assert_array_equal(weight(sigma, "none"), np.ones(10001))
