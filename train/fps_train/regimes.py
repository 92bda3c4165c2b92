"""Which regime of the schedule a microbatch trains, and at which noise levels: a function of (seed, microbatch) alone.

One program a regime, one regime a microbatch. A regime is taken as often as the distribution of t says that its noise levels
are, and t is then drawn from that distribution inside the regime's interval, so the loss has the distribution's own mean. The
order of regimes is a low-discrepancy sequence: consecutive microbatches cover the regimes evenly. Drawn at random, regimes would
add variance to the gradient's moving average; of that, with decay 0.9 and a microbatch a step, less than a quarter is left for what
grows with progress and for regimes of a tenth of the microbatches or more, and of a rarer one less than four fifths.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from jaxtyping import Array, Float
from scipy.special import ndtr

from fps_jax.attention.attend import PlannedAttention, TokenAttention
from fps_jax.attention.schedule import FPSSchedule
from fps_jax.models.dit import DENSE
from fps_jax.sampling.flow import shift_sigma
from fps_jax.sizes import Shape3
from fps_train.config import FlowOptions

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: multiples of it, modulo 2^64, are spread as evenly as can be
_WHOLE = 2**64


@dataclass(frozen=True)
class TrainingRegime:
    """An interval of noise levels that share one attention.

    Attributes:
      name: for metrics: 'regime0', ..., or 'dense'.
      attention: the self-attention, static in its program.
      start, end: progress, measured with the sampler's shift.
      low, high: the same interval as quantiles of t's distribution in training: `high - low` is its probability.
    """

    name: str
    attention: TokenAttention
    start: float
    end: float
    low: float
    high: float

    @property
    def probability(self) -> float:
        return self.high - self.low


def training_regimes(
    schedule: FPSSchedule | None,
    flow: FlowOptions,
    *,
    grid: Shape3,
    num_layers: int,
    sampling_shift: float,
    sampling_steps: int,
) -> tuple[TrainingRegime, ...]:
    """The regimes of a schedule on one token grid, in order of progress, those that are never drawn left out.

    Args:
      schedule: None for dense attention everywhere.
      flow: the distribution of t in training, and its shift.
      sampling_shift, sampling_steps: of the sampler that the weights are for. A schedule's `dense_steps` first steps are the
        progress below dense_steps / sampling_steps.
    Raises: ValueError as `FPSSchedule.plans`, and for more dense steps than sampling steps.
    """
    if schedule is None:
        return (TrainingRegime("dense", DENSE, 0.0, 1.0, 0.0, 1.0),)
    beyond = [layer for layer in schedule.dense_layers if layer >= num_layers]
    if beyond:
        raise ValueError(f"dense_layers names layer {beyond[0]}; the model has layers 0 to {num_layers - 1}")
    if schedule.dense_steps > sampling_steps:
        raise ValueError(
            f"the schedule's dense_steps={schedule.dense_steps} is more than sampling_steps={sampling_steps}; "
            "give the number of steps that the model will be sampled with"
        )
    plans = schedule.plans(grid)
    dense_until = schedule.dense_steps / sampling_steps
    pieces: list[tuple[str, TokenAttention, float, float]] = []
    if dense_until:
        pieces.append(("dense", PlannedAttention(plans[0].dense()), 0.0, dense_until))
    starts = [0.0, *(regime.until for regime in schedule.regimes)]
    for i, (plan, (start, end)) in enumerate(zip(plans, itertools.pairwise(starts), strict=True)):
        if end > dense_until:
            attention = PlannedAttention(plan, schedule.dense_layers)
            pieces.append((f"regime{i}", attention, max(start, dense_until), end))

    def quantile(progress: float) -> float:
        sigma = shift_sigma(1 - progress, sampling_shift)
        return _cdf(sigma / (flow.training_shift - (flow.training_shift - 1) * sigma), flow)

    regimes = [TrainingRegime(n, a, start, end, quantile(end), quantile(start)) for n, a, start, end in pieces]
    return tuple(regime for regime in regimes if regime.probability > 0)


def regime_of(regimes: tuple[TrainingRegime, ...], seed: int, microbatch: int) -> int:
    """Index of the regime of microbatch number `microbatch` of the run, counted from 0."""
    start = int(np.random.SeedSequence([seed, 0x5EED]).generate_state(1, np.uint64)[0])
    point = ((start + microbatch * _GOLDEN) % _WHOLE) / _WHOLE  # whole numbers: exact at any microbatch
    ends = np.cumsum([regime.probability for regime in regimes])
    return int(min(np.searchsorted(ends, point * ends[-1], side="right"), len(regimes) - 1))


def draw_sigma(
    uniform: Float[Array, "..."], low: float | Array, high: float | Array, flow: FlowOptions
) -> Float[Array, "..."]:
    """Noise levels from uniform numbers in [0, 1): t's distribution between two of its quantiles, then the training shift.

    Returns: float32 in (0, 1).
    """
    # Float32: beyond, the normal's ends are at infinity
    quantile = jnp.clip(low + uniform * (high - low), 1e-6, 1 - 1e-6)
    t = quantile if flow.distribution == "uniform" else jax.nn.sigmoid(flow.mean + flow.std * ndtri(quantile))
    return shift_sigma(t, flow.training_shift)


def _cdf(t: Any, flow: FlowOptions) -> float:
    """Probability of t in [0, t], float64."""
    if flow.distribution == "uniform":
        return float(t)
    with np.errstate(divide="ignore"):
        return float(ndtr((np.log(t) - np.log1p(-t) - flow.mean) / flow.std))
