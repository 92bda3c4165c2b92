"""AdamW, its schedules and the moving average, against the formulas in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.models.params import flatten
from fps_jax.models.sharding import make_mesh, param_shardings
from fps_train.config import PRESETS, OptimizerOptions
from fps_train.optimizer import apply_gradient, build_optimizer, decayed, ema_decay, learning_rate, move_average
from fps_train.state import init_state, state_shardings

PARAMS = {"a": {"kernel": jnp.arange(1.0, 7).reshape(2, 3), "bias": jnp.ones(3)}}


def adamw(params, gradients, rates, o):
    """AdamW with clipping by definition (arXiv 1711.05101, algorithm 2), float64."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in g.values()))
        for k in params:
            clipped = g[k] / max(1, norm / o.clip) if o.clip else g[k]
            m[k] = o.b1 * m[k] + (1 - o.b1) * clipped
            v[k] = o.b2 * v[k] + (1 - o.b2) * clipped**2
            step = (m[k] / (1 - o.b1**t)) / (np.sqrt(v[k] / (1 - o.b2**t)) + o.eps)
            decay = o.weight_decay if k == "kernel" else 0
            params[k] = params[k] - rate * (step + decay * params[k])
    return params


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_steps_are_adamw_s(clip):
    options = OptimizerOptions(learning_rate=0.01, warmup=3, weight_decay=0.1, clip=clip, eps=1e-8)
    rng = np.random.default_rng(0)
    gradients = [{k: rng.normal(size=v.shape) * 3 for k, v in PARAMS["a"].items()} for _ in range(5)]
    params, state = PARAMS, build_optimizer(options, 10).init(PARAMS)
    for g in gradients:
        grads = {"a": {k: jnp.asarray(x, jnp.float32) for k, x in g.items()}}
        params, state = apply_gradient(grads, state, params, options, 10)
    rates = [0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01]
    expected = adamw(PARAMS["a"], gradients, rates, options)
    for k, value in expected.items():
        np.testing.assert_allclose(params["a"][k], value, rtol=2e-6)


def test_the_paper_s_preset_is_the_paper_s():
    o = PRESETS["paper"].optimizer
    assert (o.learning_rate, o.weight_decay, o.eps, o.clip, o.warmup, o.ema) == (5e-6, 1e-4, 1e-15, 1.0, 200, 0.99)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.5 + 0.5 * np.cos(np.pi / 4), 0.5, 0.5 - 0.5 * np.cos(np.pi / 4), 0]),
    ],
)
def test_rates_rise_and_fall(schedule, expected):
    options = OptimizerOptions(learning_rate=2.0, warmup=4, schedule=schedule)
    rates = [float(learning_rate(options, 9, jnp.int32(step))) / 2 for step in range(9)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_only_matrices_decay():
    tree = {"blocks": {"q": {"kernel": 0, "bias": 0, "lora_a": 0}, "modulation": 0, "norm": {"scale": 0}}}
    assert decayed(tree) == {
        "blocks": {"q": {"kernel": True, "bias": False, "lora_a": True}, "modulation": False, "norm": {"scale": False}}
    }


def test_the_moving_average_is_one_of_all_weights_so_far():
    options = OptimizerOptions(ema=0.9)
    values = [1.0, 2.0, 4.0, 3.0]
    average = {"w": jnp.float32(values[0])}
    expected = values[0]
    for step, value in enumerate(values[1:]):
        average = move_average(average, {"w": jnp.float32(value)}, ema_decay(options, jnp.int32(step)))
        expected = 0.9 * expected + 0.1 * value
    assert float(average["w"]) == pytest.approx(expected, rel=1e-6)
    warm = dataclasses.replace(options, ema_warmup=True)
    assert float(ema_decay(warm, jnp.int32(0))) == pytest.approx(0.1)
    assert float(ema_decay(warm, jnp.int32(10**6))) == pytest.approx(0.9)


def test_muon_takes_orthogonal_steps_in_the_blocks_and_adam_s_elsewhere():
    """After one step its momentum is the gradient: the update is U V^T of its SVD, but for Newton-Schulz's loose 0.7 to 1.2."""
    muon = OptimizerOptions(kind="muon", learning_rate=0.01, warmup=0, weight_decay=0.0, muon_rms=0.2, eps=1e-8)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"blocks": {"q": {"kernel": normal(2, 8, 24), "bias": normal(2, 24)}}, "head": {"kernel": normal(8, 4)}}
    grads = jax.tree.map(lambda p: normal(*p.shape), params)

    def step(options):
        after, _ = apply_gradient(grads, build_optimizer(options, 10).init(params), params, options, 10)
        return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), after, params)

    ours, adam = step(muon), step(OptimizerOptions(learning_rate=0.01, warmup=0, weight_decay=0.0, eps=1e-8))
    np.testing.assert_allclose(ours["head"]["kernel"], adam["head"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(ours["blocks"]["q"]["bias"], adam["blocks"]["q"]["bias"], rtol=1e-5)
    for update, gradient in zip(ours["blocks"]["q"]["kernel"], grads["blocks"]["q"]["kernel"], strict=True):
        u, _, vt = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
        in_its_axes = u.T @ -update @ vt.T / (0.01 * 0.2 * 24**0.5)
        assert np.all((np.diag(in_its_axes) > 0.65) & (np.diag(in_its_axes) < 1.25))
        np.testing.assert_allclose(in_its_axes, np.diag(np.diag(in_its_axes)), atol=1e-3)
        assert 0.65 < np.sqrt(np.mean(update**2)) / (0.01 * 0.2) < 1.25


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_lie_where_their_parameters_do(kind):
    mesh = make_mesh()
    params = {"blocks": {"self_attn": {"q": {"kernel": jnp.zeros((2, 8, 8)), "bias": jnp.zeros((2, 8))}}}}
    state = jax.eval_shape(lambda p: init_state(p, OptimizerOptions(kind=kind), 10), params)
    found = state_shardings(state, mesh)
    wanted = dict(flatten(param_shardings(params, mesh)))
    moments = [
        (leaf, sharding)
        for leaf, sharding in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(found.optimizer), strict=True)
        if leaf.ndim > 1 and leaf.shape[0] == 2
    ]
    assert len(moments) == {"adamw": 4, "muon": 3}[kind]
    for leaf, sharding in moments:
        name = "kernel" if leaf.ndim == 3 else "bias"
        assert sharding == wanted[f"blocks/self_attn/q/{name}"]
