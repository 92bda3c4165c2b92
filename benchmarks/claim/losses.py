"""The paired loss: how far a model's velocity is from the data's on held-out clips, at the same noise for all that is compared."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from fps_jax.attention.schedule import FPSSchedule

DRAWS = 4  # noise levels, each with its own noise, of a clip and a regime
_GOLDEN = (5**0.5 - 1) / 2


def attentions(
    schedule: FPSSchedule | None, intervals: Sequence[tuple[float, float]], grid: Any, num_layers: int
) -> list[Any]:
    """The attention that holds in each interval of progress.

    Raises: ValueError where it changes inside one.
    """
    from fps_jax.attention.attend import PlannedAttention
    from fps_jax.models.dit import DENSE

    if schedule is None:
        return [DENSE] * len(intervals)
    beyond = [layer for layer in schedule.dense_layers if layer >= num_layers]
    if beyond:
        raise ValueError(f"dense_layers names layer {beyond[0]}; the model has layers 0 to {num_layers - 1}")
    plans, found = schedule.plans(grid), []
    for start, end in intervals:
        first, last = (int(schedule.regime_at(np.float64(p))) for p in (start, np.nextafter(end, 0)))
        if first != last:
            raise ValueError(
                f"the attention changes between {start} and {end}; compare at intervals that it doesn't cut"
            )
        found.append(PlannedAttention(plans[first], schedule.dense_layers))
    return found


def paired_losses(
    model: Any, schedule: FPSSchedule | None, by: FPSSchedule, data: pathlib.Path, *, batch_size: int = 20
) -> dict[str, Float[np.ndarray, "N"]]:
    """Mean squared error of each clip's velocity, float32, for each regime of `by`: the mean of `DRAWS` noise levels.

    A clip's levels, spread evenly over the regime, and its noise are functions of its number alone.

    Args:
      model: as `open_model` gives it.
      schedule: what it attends with, None for dense.
      data: what fps-precompute wrote of held-out clips, one size.
    """
    from fps_train.regimes import training_regimes

    config, grid = model.config.dit, _grid(model, data)
    regimes = training_regimes(
        by, _flow(model), grid=grid, num_layers=config.num_layers, sampling_shift=model.config.flow_shift, sampling_steps=50
    )  # fmt: skip
    kinds = attentions(schedule, [(r.start, r.end) for r in regimes], grid, config.num_layers)
    intervals = [(r.name, kind, r.low, r.high) for r, kind in zip(regimes, kinds, strict=True)]
    return _losses(model, intervals, data, batch_size)


def level_losses(
    model: Any, schedule: FPSSchedule | None, levels: Sequence[float], data: pathlib.Path, *, batch_size: int = 20
) -> dict[str, Float[np.ndarray, "N"]]:
    """The same at single noise levels sigma, each with `DRAWS` noises, by the attention that holds there in sampling."""
    from fps_jax.sampling.flow import shift_sigma

    shift = model.config.flow_shift
    intervals = []
    for sigma in levels:
        t = shift_sigma(sigma, 1 / shift)  # the inverse: uniform in training, and one less than progress in sampling
        progress = min(1 - t, float(np.nextafter(1, 0)))
        (kind,) = attentions(
            schedule, [(progress, float(np.nextafter(progress, 1)))], _grid(model, data), model.config.dit.num_layers
        )
        intervals.append((f"{sigma:g}", kind, t, t))
    return _losses(model, intervals, data, batch_size)


def _flow(model: Any) -> Any:
    from fps_train.config import FlowOptions

    return FlowOptions(distribution="uniform", shift=model.config.flow_shift)


def _grid(model: Any, data: pathlib.Path) -> Any:
    from fps_jax.sizes import token_grid
    from fps_train.data import open_data

    return token_grid(open_data(data).buckets[0].latent_shape[1:], model.config.dit.patch_size)


def _losses(
    model: Any, intervals: Sequence[tuple[str, Any, float, float]], data: pathlib.Path, batch_size: int
) -> dict[str, Float[np.ndarray, "N"]]:
    """intervals: (name, attention, lowest and highest quantile of t)."""
    import jax.numpy as jnp

    from fps_train.batch import Batch
    from fps_train.data import open_data
    from fps_train.state import Parts
    from fps_train.step import Interval, StepOptions, evaluate

    opened = open_data(data)
    options = StepOptions(Parts(model.config.dit, "float32"), _flow(model))
    params = model.load("dit", "float32")
    samples = sorted(opened.samples[0], key=lambda sample: sample.source)
    losses = {name: np.zeros(len(samples)) for name, *_ in intervals}
    for first in range(0, len(samples), batch_size):
        rows = np.arange(first, first + batch_size) % len(samples)  # one program
        real = min(batch_size, len(samples) - first)
        read = [opened.read(samples[row]) for row in rows]
        latents = np.stack([tensors["latents"] for tensors, _ in read])
        text = np.stack([states for _, states in read])
        for draw in range(DRAWS):
            numbers = DRAWS * rows + draw
            uniform = jnp.asarray((numbers + 0.5) * _GOLDEN % 1, jnp.float32)
            batch = Batch(jnp.asarray(latents), jnp.asarray(text), jnp.asarray(numbers, jnp.uint32))
            for name, attention, low, high in intervals:
                where = Interval(jnp.float32(low), jnp.float32(high))
                of = evaluate(params, {}, batch, jnp.uint32(0), uniform, where, options=options, attention=attention)
                losses[name][first : first + real] += np.asarray(of, np.float64)[:real] / DRAWS
    return losses
