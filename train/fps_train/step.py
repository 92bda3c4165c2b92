"""The two programs of a training step: a microbatch's gradient, one for each regime, and the update of the state."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from fps_jax.attention.attend import TokenAttention
from fps_jax.attention.sharded import on_mesh
from fps_jax.choices import Remat
from fps_jax.models.dit import DENSE
from fps_jax.models.params import Params, flatten
from fps_jax.models.sharding import param_shardings
from fps_jax.sampling.guidance import Inputs, guided_velocity
from fps_train.batch import Batch
from fps_train.config import FlowOptions, OptimizerOptions
from fps_train.loss import Loss, draw, flow_matching_loss
from fps_train.optimizer import apply_gradient, ema_decay, learning_rate, move_average
from fps_train.regimes import draw_sigma
from fps_train.state import Parts, TrainState, state_shardings


@dataclass(frozen=True)
class StepOptions:
    """What is static in a gradient program beside its attention. mesh: what it runs on; None for one device."""

    parts: Parts
    flow: FlowOptions
    remat: Remat = "none"
    teacher_weight: float = 0.0
    mesh: Mesh | None = None


class Interval(NamedTuple):
    """A regime's noise levels as quantiles of t's distribution: data, so regimes with equal attention share a program."""

    low: Float[Array, ""]
    high: Float[Array, ""]


class Micro(NamedTuple):
    """What is seen of a microbatch. loss: what is minimised. error: unweighted. first_bad: as `DiTOutput.first_bad`."""

    loss: Float[Array, ""]
    error: Float[Array, ""]
    first_bad: Int[Array, ""]


class Seen(NamedTuple):
    """What is seen of an update.

    Attributes:
      grad_norm: global norm of the mean gradient, before clipping.
      learning_rate: of this step.
      finite: whether gradient and losses are; where not, the state is as it was.
      not_finite: for each trained parameter (each layer of a stacked one), whether its gradient holds a NaN or inf.
    """

    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    not_finite: dict[str, Bool[Array, "*L"]]


def _batch_loss(
    params: Params,
    teacher: Params | None,
    batch: Batch,
    noise: Float[Array, "B Z F H W"],
    uniform: Float[Array, "B"],
    interval: Interval,
    options: StepOptions,
    attention: TokenAttention,
    remat: Remat,
) -> Loss:
    """The loss at the noise levels of `uniform` inside an interval. params, teacher: what `dit` takes, or no teacher."""
    sigma = draw_sigma(uniform, interval.low, interval.high, options.flow)
    inputs = Inputs(noise, batch.text, None, batch.condition, batch.image)  # pyright: ignore[reportArgumentType]
    dtype = jnp.dtype(options.parts.dtype)

    def velocity(of, attention, remat, x, t):
        return guided_velocity(options.parts.config, of, inputs, x, t, attention, dtype=dtype, remat=remat)

    return flow_matching_loss(
        functools.partial(velocity, params, attention, remat),
        jnp.asarray(batch.latents),
        noise,
        sigma,
        weighting=options.flow.weighting,
        teacher=None if teacher is None else functools.partial(velocity, teacher, on_mesh(DENSE, options.mesh), "none"),
        teacher_weight=options.teacher_weight,
    )


@functools.partial(jax.jit, static_argnames=("options", "attention"), donate_argnames="sums")
def gradient(
    trained: Params,
    frozen: Params,
    teacher: Params | None,
    batch: Batch,
    seed: Int[Array, ""],
    interval: Interval,
    sums: Params | None,
    *,
    options: StepOptions,
    attention: TokenAttention,
) -> tuple[Params, Micro]:
    """The gradient of a microbatch, float32, added to `sums` (donated) where that isn't None.

    seed: uint32, of noise and noise levels. The noise levels are drawn inside `interval`.
    """

    uniform, noise = draw(seed, jnp.asarray(batch.sample), batch.latents.shape[1:])

    def loss_of(trained):
        params = options.parts.join(trained, frozen)
        loss = _batch_loss(params, teacher, batch, noise, uniform, interval, options, attention, options.remat)
        return loss.loss, Micro(loss.loss, loss.samples.mean(), loss.first_bad)

    grads, micro = jax.grad(loss_of, has_aux=True)(trained)
    if options.mesh is not None:  # each device keeps its shard's sum alone
        grads = jax.lax.with_sharding_constraint(grads, param_shardings(grads, options.mesh))
    return (grads if sums is None else jax.tree.map(jnp.add, sums, grads)), micro


@functools.partial(jax.jit, static_argnames=("options", "num_steps", "mesh"), donate_argnames="state")
def update(
    state: TrainState,
    sums: Params,
    losses: Float[Array, "A"],
    *,
    options: OptimizerOptions,
    num_steps: int,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Seen]:
    """One optimizer step by the mean gradient of the microbatches whose losses these are. mesh: where the state lies.

    Where a gradient or a loss isn't finite, the state comes back unchanged, its step not counted.
    """
    grads = jax.tree.map(lambda g: g / losses.shape[0], sums)
    not_finite = {
        path: ~jnp.isfinite(g).reshape(g.shape[0] if path.startswith("blocks/") else 1, -1).all(1)
        for path, g in flatten(grads)
    }
    finite = ~jnp.stack([bad.any() for bad in not_finite.values()]).any() & jnp.isfinite(losses).all()
    params, optimizer = apply_gradient(grads, state.optimizer, state.params, options, num_steps)
    ema = state.ema
    if ema is not None:
        ema = move_average(ema, params, ema_decay(options, state.step))
    moved = TrainState(state.step + 1, params, optimizer, ema)  # pyright: ignore[reportArgumentType]
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
    if mesh is not None:
        kept = jax.lax.with_sharding_constraint(kept, state_shardings(kept, mesh))
    seen = Seen(optax.tree.norm(grads), learning_rate(options, num_steps, state.step), finite, not_finite)
    if mesh is not None:  # so that every process can read it
        seen = jax.lax.with_sharding_constraint(seen, NamedSharding(mesh, PartitionSpec()))
    return kept, seen


@functools.partial(jax.jit, static_argnames=("options", "attention"))
def evaluate(
    trained: Params,
    frozen: Params,
    batch: Batch,
    seed: Int[Array, ""],
    uniform: Float[Array, "B"],
    interval: Interval,
    *,
    options: StepOptions,
    attention: TokenAttention,
) -> Float[Array, "B"]:
    """The unweighted loss of each sample at the noise levels of `uniform` inside `interval`, nothing trained."""
    _, noise = draw(seed, jnp.asarray(batch.sample), batch.latents.shape[1:])
    params = options.parts.join(trained, frozen)
    return _batch_loss(params, None, batch, noise, uniform, interval, options, attention, "none").samples
