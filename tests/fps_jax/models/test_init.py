"""The start of training from scratch: the values that are claimed, that nothing stays dead, and images as video."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.config import DiTConfig, VAEConfig
from fps_jax.models import vae
from fps_jax.models.dit import build_dit, dit
from fps_jax.models.init import init_dit_for_training, init_vae_for_training
from fps_jax.models.params import abstract_params, flatten
from fps_jax.models.rope import apply_rope, rope_table

KEY = jax.random.key(0)
CONFIG = DiTConfig(
    task="flf2v", dim=64, mlp_dim=256, num_heads=2, num_layers=2, text_dim=64, text_len=4, freq_dim=64, in_channels=16,
    out_channels=6, image_dim=48, image_positions=6,
)  # fmt: skip
PATHS = [path for path, _ in flatten(abstract_params(build_dit(CONFIG)))]
initial = jax.jit(functools.partial(init_dit_for_training, CONFIG), static_argnames=("gate", "locality"))


@jax.jit
def step(params):
    """The velocity, the gradients of a mean square, and parameters after a step of plain descent."""
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (2, CONFIG.in_channels, 2, 4, 4))
    text = jax.random.normal(keys[1], (2, 3, CONFIG.text_dim))
    image = jax.random.normal(keys[2], (2, 6, 48))
    target = jax.random.normal(keys[3], (2, CONFIG.out_channels, 2, 4, 4))

    def loss(params):
        velocity = dit(CONFIG, params, x, jnp.array([250.0, 900.5]), text, image).velocity
        return jnp.square(velocity - target).mean(), velocity

    grads, velocity = jax.grad(loss, has_aux=True)(params)
    return velocity, grads, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


@pytest.mark.parametrize("gate", [1.0, 0.0])
def test_every_parameter_gets_a_gradient_when_it_is_said_to(gate):
    params, seen, velocities = initial(KEY, gate=gate), [], []
    for _ in range(3):
        velocity, grads, params = step(params)
        velocities.append(velocity)
        seen.append({path for path, g in flatten(grads) if np.abs(g).max() > 0})
    np.testing.assert_array_equal(velocities[0], 0)
    at_first, then, last = seen
    assert at_first == {"head/proj/kernel", "head/proj/bias"}
    gated = {p for p in PATHS if p.startswith(("blocks/self_attn/", "blocks/mlp/"))}
    assert then == set(PATHS) - (set() if gate else gated)
    assert last == set(PATHS)


def test_values_are_those_of_the_docstring():
    values = dict(flatten(initial(KEY, locality=0.0)))
    assert {p: a.shape for p, a in values.items()} == {
        p: s.shape for p, s in flatten(abstract_params(build_dit(CONFIG)))
    }
    assert {a.dtype for a in values.values()} == {jnp.dtype("float32")}
    for path, value in values.items():
        if path.startswith(("time_projection", "head/")) or path.endswith(("bias", "positions")):
            assert not value.any(), path
        elif path.endswith("scale"):
            assert (value == 1).all(), path
        elif path.startswith(("text_embedding", "time_embedding")):
            assert value.std() == pytest.approx(0.02, rel=0.05), path  # of 4,096 draws: 1.1% is its deviation
        elif path.endswith("kernel"):
            d_in, d_out = value.shape[-2:]
            assert value.std() == pytest.approx((2 / (d_in + d_out)) ** 0.5, rel=0.05), path
            assert abs(value).max() <= (6 / (d_in + d_out)) ** 0.5, path
    gates = values["blocks/modulation"]
    assert (gates[:, [2, 5]] == 1).all()
    assert not gates[:, [0, 1, 3, 4]].any()
    assert not initial(KEY, gate=0.0)["blocks"]["modulation"].any()
    local = dict(flatten(initial(KEY)))
    own = {f"blocks/self_attn/{name}" for name in ("q/bias", "k/bias", "norm_q/scale", "norm_k/scale")}
    assert {path for path, value in local.items() if (value != values[path]).any()} == own
    assert (local["blocks/self_attn/norm_q/scale"] == 1.5).all()


def test_heads_start_by_looking_at_a_neighbour_of_their_own():
    """Of tokens that say nothing: q and k are biases, normed as the block does, turned by their places."""
    config = DiTConfig(task="t2v", dim=320, mlp_dim=64, num_heads=5, num_layers=4, text_dim=8)
    attention = init_dit_for_training(config, KEY)["blocks"]["self_attn"]
    grid = (3, 5, 5)
    rope, places, middle = rope_table(grid, 64), np.array(list(np.ndindex(grid))), np.array([1, 2, 2])
    seen = []
    for layer in range(4):
        q, k = (
            np.asarray(attention[name]["bias"][layer] / np.sqrt(np.mean(np.square(attention[name]["bias"][layer]))))
            for name in ("q", "k")
        )
        q, k = (apply_rope(jnp.broadcast_to(a.reshape(5, 64), (1, len(places), 5, 64)), rope)[0] for a in (q, k))
        scores = np.einsum("nh,jnh->nj", q[np.flatnonzero((places == middle).all(1))[0]], k)
        seen += [tuple((places[row.argmax()] - middle).tolist()) for row in scores]
    assert len(set(seen[:15])) == 15
    assert seen[:7] == [(0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0)]
    assert seen[15:] == seen[:5]


def test_layers_and_parameters_differ_and_a_key_repeats():
    first, again, other = (dict(flatten(initial(key))) for key in (KEY, KEY, jax.random.key(1)))
    for path, value in first.items():
        np.testing.assert_array_equal(value, again[path])
    q, k = first["blocks/self_attn/q/kernel"], first["blocks/self_attn/k/kernel"]
    for a, b in ((q[0], q[1]), (q, k), (q, other["blocks/self_attn/q/kernel"])):
        assert np.linalg.norm(a - b) > np.linalg.norm(a)


VAE = VAEConfig(
    base_dim=4, z_dim=3, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True), latents_mean=(0.0,) * 3,
    latents_std=(1.0,) * 3,
)  # fmt: skip


@pytest.mark.slow
def test_an_image_vae_is_a_video_vae_that_codes_every_fourth_frame():
    params = init_vae_for_training(VAE, KEY)
    specs = dict(flatten(abstract_params(vae.build_vae(VAE))))
    assert {p: (a.shape, a.dtype) for p, a in flatten(params)} == {p: (s.shape, s.dtype) for p, s in specs.items()}
    video = jnp.tanh(jax.random.normal(KEY, (1, 9, 8, 8, 3)))
    encode = jax.jit(lambda video: vae.encode_moments(VAE, params, video)[0])
    decode = jax.jit(lambda latents: vae.decode_video(VAE, params, latents))
    latents = encode(video)
    images = encode(video[0, ::4, None])  # frames 0, 4 and 8, a clip each
    np.testing.assert_allclose(latents[0], jnp.moveaxis(images[:, :, 0], 0, 1), rtol=1e-4, atol=1e-5)
    frames = decode(latents)[0]
    assert frames.std() > 0.01
    held = decode(images)[np.array([0, 1, 1, 1, 1, 2, 2, 2, 2]), 0]
    np.testing.assert_allclose(frames, held, rtol=1e-4, atol=1e-5)  # float32's rounding through some twenty layers


@pytest.mark.slow
def test_images_train_the_last_taps_alone():
    params = init_vae_for_training(VAE, KEY)
    image = jnp.tanh(jax.random.normal(KEY, (1, 1, 8, 8, 3)))

    @jax.jit
    @jax.grad
    def grads(params):
        mean, _ = vae.encode_moments(VAE, params, image)
        return jnp.square(vae.decode_video(VAE, params, mean) - image).mean()

    for path, grad in flatten(grads(params)):
        if "/time_conv/" in path:
            assert not grad.any(), path
        elif grad.ndim == 5 and grad.shape[0] == 3:
            assert grad[-1].any(), path
            assert not grad[:-1].any(), path
