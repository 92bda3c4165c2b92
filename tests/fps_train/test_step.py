"""A whole step: gradients against finite differences, accumulation, the update, the guard against NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fps_jax.attention.attend import PlannedAttention
from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_jax.models.dit import DENSE, dit
from fps_jax.models.params import flatten, unflatten
from fps_train.config import FlowOptions, OptimizerOptions
from fps_train.loss import draw
from fps_train.regimes import draw_sigma, training_regimes
from fps_train.state import Parts, init_state
from fps_train.step import Interval, StepOptions, gradient, update
from tests.fps_train.models import CONFIG, LATENTS, batch, params
from tests.pallas_kernels import straight_through

PARTS = Parts(CONFIG, "float32")
OPTIONS = StepOptions(PARTS, FlowOptions())
KINDS = ("self_attn/q/kernel", "self_attn/k/kernel", "self_attn/v/", "cross_attn", "mlp", "modulation", "embedding")
WHOLE = Interval(jnp.float32(0), jnp.float32(1))
SEED = jnp.uint32(7)
SCHEDULE = FPSSchedule(
    tile=(1, 2, 4),
    regimes=(
        Regime(until=0.4, scales_per_tile=1, window=(1, 1, 1)),
        Regime(until=1.0, scales_per_tile=1, window=(2, 1, 1)),
    ),
)


def regimes(setting):
    return training_regimes(
        SCHEDULE.setting(setting), OPTIONS.flow, grid=(2, 4, 4), num_layers=2, sampling_shift=3.0, sampling_steps=10
    )


def run(of, own, sums=None, *, attention=DENSE, frozen=None, options=OPTIONS):
    """`gradient`, as a step of several microbatches calls it."""
    sums = jax.tree.map(jnp.zeros_like, of) if sums is None else sums
    return gradient(of, frozen or {}, None, own, SEED, WHOLE, sums, options=options, attention=attention)


@functools.cache
def grads_of(setting, index=0, first=0):
    return run(params(), batch(first), attention=DENSE if setting == "dense" else regimes(setting)[index].attention)


def noisy(own):
    """(sigma, x_t, noise - x0) of a batch by their definitions, float64."""
    uniform, noise = (np.asarray(a, np.float64) for a in draw(SEED, jnp.asarray(own.sample), LATENTS))
    sigma = np.asarray(draw_sigma(jnp.asarray(uniform, jnp.float32), 0.0, 1.0, OPTIONS.flow), np.float64)
    at = sigma[:, None, None, None, None]
    x0 = own.latents.astype(np.float64)
    return sigma, (1 - at) * x0 + at * noise, noise - x0


def forward(own, attention=DENSE):
    """The model's own velocity for a batch, no step around it, and what its attention taps."""
    sigma, x_t, _ = noisy(own)
    inputs = (jnp.asarray(a, jnp.float32) for a in (x_t, 1000 * sigma, own.text))

    @jax.jit
    def of(*inputs):
        taps = {}
        return dit(CONFIG, params(), *inputs, attention=attention, attention_taps=taps).velocity, taps

    return of(*inputs)


def test_the_loss_is_the_definition_s_on_the_model_s_own_velocity():
    _, micro = grads_of("dense")
    velocity, _ = forward(batch())
    expected = np.square(np.asarray(velocity, np.float64) - noisy(batch())[2]).mean()
    assert float(micro.loss) == pytest.approx(expected, rel=1e-5)
    assert int(micro.first_bad) == -1


@dataclasses.dataclass(frozen=True)
class Tapped(PlannedAttention):
    """That also shows what it is given."""

    def __call__(self, q, k, v, /, *, layer, taps):
        taps |= {"q": q, "k": k, "v": v}
        return super().__call__(q, k, v, layer=layer, taps=taps)


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: it holds arrays
class RoundingFrozen(PlannedAttention):
    """FP8 attention with the rounding that it has once, layer by layer, whatever it is given."""

    fixed: straight_through.Frozen | None = None

    def __call__(self, q, k, v, /, *, layer, taps):
        here = jax.tree.map(lambda a: a[layer], self.fixed)
        return straight_through.attention(jnp, q, k, v, here, self.plan.pattern)

    @classmethod
    def of(cls, plan):
        """The rounding of what the model computes for `batch()`."""
        _, taps = forward(batch(), Tapped(plan))
        layers = zip(*(taps[name] for name in "qkv"), strict=True)
        fixed = [straight_through.frozen(*own, plan.pattern) for own in layers]
        return cls(plan, fixed=jax.tree.map(lambda *a: jnp.asarray(np.stack(a), jnp.float32), *fixed))


@pytest.mark.parametrize(("setting", "index"), [("dense", 0), ("sparse", 1), ("fps", 1)])
def test_the_gradient_of_the_whole_model_is_that_of_finite_differences(setting, index):
    """For each kind of parameter, along its gradient and a random direction. FP8: of the loss with its rounding held fixed."""
    grads, micro = grads_of(setting, index)
    attention = DENSE if setting == "dense" else regimes(setting)[index].attention
    if setting == "fps":
        attention = RoundingFrozen.of(attention.plan)
    leaves, rng = dict(flatten(params())), np.random.default_rng(0)
    plain, there = run(params(), batch(), attention=attention)
    assert float(there.loss) == pytest.approx(float(micro.loss), rel=1e-6)
    for kind in KINDS:
        own, simple = ({p: np.asarray(g, np.float64) * (kind in p) for p, g in flatten(of)} for of in (grads, plain))
        # Of finite differences few directions are seen, so what they are of is differentiated as it stands, too. Float32 twice:
        # 4e-7; a P rounded in the gradient of V makes it 1e-3 or more.
        assert norm({p: own[p] - simple[p] for p in own}) < 5e-6 * norm(own), kind
        random = {p: rng.normal(size=g.shape) * (kind in p) for p, g in own.items()}
        unit = {p: own[p] / norm(own) + random[p] / norm(random) for p in own}
        slope = sum(np.vdot(unit[p], own[p]) for p in own)
        # The loss, about 1, is good to some 1e-6, and this makes a difference of 8e-3: 1e-4 or a little more.
        step = 4e-3 / max(slope, 1e-3)
        losses = [
            float(run(unflatten({p: v + np.float32(sign * step) * unit[p].astype(np.float32) for p, v in leaves.items()}),
                      batch(), attention=attention)[1].loss)
            for sign in (1, -1)
        ]  # fmt: skip
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=2e-3), kind


def norm(tree):
    return np.sqrt(sum(np.square(leaf).sum() for leaf in tree.values()))


def test_quantized_attention_has_a_gradient_near_the_unquantized_one_s():
    rounded, exact = (dict(flatten(grads_of(s, 1)[0])) for s in ("fps", "sparse"))
    away = optax.tree.norm(jax.tree.map(jnp.subtract, rounded, exact)) / optax.tree.norm(exact)
    assert 1e-4 < float(away) < 0.1  # e4m3 rounds by up to 1/16: not nothing, not much


def test_accumulated_gradients_are_a_sum_and_a_large_batch_s():
    first, micro = grads_of("dense")
    second, _ = grads_of("dense", first=2)
    both, _ = run(params(), batch(2), jax.tree.map(jnp.copy, first))
    for path, value in flatten(both):
        expected = dict(flatten(first))[path] + dict(flatten(second))[path]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6 * float(jnp.abs(expected).max()), err_msg=path)
    large, of_large = run(params(), batch(0, rows=4))
    assert float(of_large.loss) != float(micro.loss)
    for path, value in flatten(large):
        mean = dict(flatten(both))[path] / 2
        np.testing.assert_allclose(value, mean, rtol=1e-4, atol=1e-5 * float(jnp.abs(mean).max()) + 1e-9, err_msg=path)


def test_an_update_is_adamw_s_and_moves_the_average():
    options = OptimizerOptions(learning_rate=1e-3, warmup=1, eps=1e-8, ema=0.9)
    grads, micro = grads_of("dense")
    state = init_state(jax.tree.map(jnp.copy, params()), options, 10)
    moved, seen = update(
        state, jax.tree.map(lambda g: 2 * g, grads), jnp.stack([micro.loss] * 2), options=options, num_steps=10
    )
    norm = float(optax.tree.norm(grads))
    assert float(seen.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert bool(seen.finite)
    assert int(moved.step) == 1
    for path, before in flatten(params()):
        g = np.asarray(dict(flatten(grads))[path], np.float64) / max(1, norm)
        decay = options.weight_decay * np.asarray(before, np.float64) if path.endswith("kernel") else 0
        # Adam's first step is g / (|g| + eps).
        expected = np.asarray(before, np.float64) - 1e-3 * (g / (np.abs(g) + 1e-8) + decay)
        np.testing.assert_allclose(dict(flatten(moved.params))[path], expected, atol=3e-6, err_msg=path)
        average = 0.9 * np.asarray(before, np.float64) + 0.1 * expected
        np.testing.assert_allclose(dict(flatten(moved.ema))[path], average, atol=1e-6, err_msg=path)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named():
    options = OptimizerOptions(learning_rate=1e-3, warmup=1)
    grads, micro = grads_of("dense")
    leaves = dict(flatten(grads))
    leaves["blocks/mlp/up/kernel"] = leaves["blocks/mlp/up/kernel"].at[1, 0, 0].set(jnp.nan)
    state = init_state(jax.tree.map(jnp.copy, params()), options, 10)
    before = jax.device_get(state)
    after, seen = update(state, unflatten(leaves), micro.loss[None], options=options, num_steps=10)
    assert not seen.finite
    named = {path: np.flatnonzero(bad).tolist() for path, bad in seen.not_finite.items() if bad.any()}
    assert named == {"blocks/mlp/up/kernel": [1]}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


def test_frozen_parameters_have_no_gradient_moments_or_average():
    parts = dataclasses.replace(PARTS, train_only=("self_attn/*",))
    trained, frozen = parts.split(params(), jax.random.key(0))
    assert {path.split("/")[1] for path, _ in flatten(trained)} == {"self_attn"}
    assert len(dict(flatten(trained))) + len(dict(flatten(frozen))) == len(dict(flatten(params())))
    grads, _ = run(trained, batch(), frozen=frozen, options=dataclasses.replace(OPTIONS, parts=parts))
    whole = dict(flatten(grads_of("dense")[0]))
    for path, value in flatten(grads):
        np.testing.assert_allclose(value, whole[path], rtol=1e-4, atol=1e-5 * float(jnp.abs(whole[path]).max()))
    with pytest.raises(
        ValueError, match="train_only='attention' matches no parameter; they are blocks/cross_attn/k/bias, "
    ):
        dataclasses.replace(PARTS, train_only=("attention",)).split(params(), jax.random.key(0))


def test_a_lora_starts_at_the_base_and_trains_b_first():
    from fps_jax.models.lora import LoRAConfig

    parts = dataclasses.replace(PARTS, lora=LoRAConfig(rank=2, alpha=4.0, targets=("blocks/self_attn/q",)))
    trained, frozen = parts.split(params(), jax.random.key(0))
    grads, micro = run(trained, batch(), frozen=frozen, options=dataclasses.replace(OPTIONS, parts=parts))
    assert float(micro.loss) == pytest.approx(float(grads_of("dense")[1].loss), rel=1e-6)
    leaves = dict(flatten(grads))
    assert set(leaves) == {"blocks/self_attn/q/lora_a", "blocks/self_attn/q/lora_b"}
    assert not leaves["blocks/self_attn/q/lora_a"].any()
    assert leaves["blocks/self_attn/q/lora_b"].any()
