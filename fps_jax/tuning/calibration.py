"""Choosing a schedule by measurement: the error of each candidate at each step and layer of the dense model, then the cheapest fit.

Source: FPSAttention (arXiv 2506.04648) section 3.4 and figure 5 (attention error over the denoising steps). The choice under an
error budget is ours.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fps_jax.attention.attend import TokenAttention, attend
from fps_jax.attention.cost import attention_cost
from fps_jax.attention.plan import AttentionPlan
from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_jax.attention.tiles import TileLayout
from fps_jax.attention.windows import check_density, propose_window
from fps_jax.config import DiTConfig
from fps_jax.models.dit import stage_name
from fps_jax.models.params import Params
from fps_jax.progress import Progress
from fps_jax.sampling.guidance import Inputs, guided_velocity
from fps_jax.sampling.solvers import SolverState, SolverTable, solver_step
from fps_jax.tuning.defaults import DENSITIES
from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.pattern import TilePattern


def candidates(
    layout: TileLayout, densities: Sequence[float] = DENSITIES, centerings: Sequence[bool] = (False,)
) -> tuple[AttentionPlan, ...]:
    """Plans to measure: windows proposed for the densities, each unquantized and at every granularity. Dense comes first.

    centerings: values of `center_k` to try with every granularity.
    """
    for density in densities:
        check_density(density)
    windows = dict.fromkeys([layout.tile_grid, *(propose_window(layout, d) for d in sorted(densities, reverse=True))])
    kinds = [(None, False), *itertools.product(dict.fromkeys(layout.granularities), dict.fromkeys(centerings))]
    return tuple(
        AttentionPlan(layout, window, scales, center_k)
        for window, (scales, center_k) in itertools.product(windows, kinds)
    )


@dataclass(frozen=True)
class MeasuredAttention(TokenAttention):
    """Dense attention in tile order that also taps, as `attention_error`, how far each plan's output is from it.

    The tap is `[C + 1]` float32: the squared norm of the difference for each plan, then that of the dense output, over the
    queries of `query_tiles`, all heads and samples.
    """

    plans: tuple[AttentionPlan, ...]
    query_tiles: tuple[int, ...]

    @property
    def layout(self) -> TileLayout:
        return self.plans[0].layout

    def __call__(self, q: Array, k: Array, v: Array, /, *, layer: Array, taps: dict[str, Array] | None) -> Array:
        layout = self.layout
        out = attend(q, k, v, plan=self.plans[0].dense())
        if taps is None:
            return out
        rows = np.array(self.query_tiles)
        chosen = (rows[:, None] * layout.stored + np.arange(layout.stored)).reshape(-1)
        some_q, want = q[:, chosen], out[:, chosen].astype(jnp.float32)

        def squares(x):
            return jnp.square(x).sum()

        errors = [
            squares(
                block_sparse_attention(some_q, k, v, _of_rows(plan, rows, layout.valid[chosen])).astype(jnp.float32)
                - want
            )
            for plan in self.plans
        ]
        taps["attention_error"] = jnp.stack([*errors, squares(want)])
        return out


def _of_rows(plan: AttentionPlan, rows: np.ndarray, q_valid: np.ndarray) -> TilePattern:
    """The plan's pattern for some of its query tiles."""
    return TilePattern.build(
        key_tiles=plan.key_tiles[rows],
        counts=plan.counts[rows],
        valid=plan.layout.valid,
        q_valid=q_valid,
        tokens_per_scale=plan.tokens_per_scale,
        center_k=plan.center_k,
    )


def measure(
    config: DiTConfig,
    params: Params,
    inputs: Inputs,
    table: SolverTable,
    *,
    plans: Sequence[AttentionPlan],
    query_tiles: int = 32,
    guidance_scale: float = 1.0,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
) -> Float[np.ndarray, "n L C"]:
    """Relative L2 error of the attention output for each step, layer and plan, along the dense model's own trajectory.

    Args:
      plans: candidates on one layout.
      query_tiles: how many tiles of queries, spread over the grid, stand for all; each is compared over all of its keys.
      progress: called after each step with (steps done, steps).
      others: as `fps_jax.sampling.denoise.denoise`.
    Raises: FloatingPointError naming the step and layer of a NaN or inf.
    """
    layout = plans[0].layout
    spread = np.linspace(0, layout.num_tiles - 1, min(query_tiles, layout.num_tiles)).round().astype(int)
    attention = MeasuredAttention(tuple(plans), tuple(int(i) for i in spread))
    zeros = jnp.zeros_like(inputs.noise)
    # Committed to the device as a step's outputs are: else the second step would compile again.
    state = jax.device_put(SolverState(inputs.noise, zeros, zeros, zeros), jax.local_devices()[0])
    errors = []
    for step in range(len(table.sigma)):
        row, noise = jax.tree.map(lambda a, step=step: jnp.asarray(a[step]), (table, inputs.step_noise))
        state, squares, bad = _measured_step(
            params,
            inputs,
            state,
            row,
            noise,
            jnp.float32(guidance_scale),
            config=config,
            dtype=jnp.dtype(dtype),
            attention=attention,
        )
        if int(bad) >= 0:
            raise FloatingPointError(
                f"NaN or inf at step {step + 1} of {len(table.sigma)}, first in {stage_name(config, int(bad))}"
            )
        squares = np.asarray(squares, np.float64)
        errors.append(np.sqrt(squares[:, :-1] / squares[:, -1:]))
        if progress is not None:
            progress(step + 1, len(table.sigma))
    return np.stack(errors)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "attention"))
def _measured_step(params, inputs, state, row, noise, guidance_scale, *, config, dtype, attention):
    taps = {}
    velocity, bad = guided_velocity(
        config,
        params,
        inputs,
        state.x,
        row.timestep,
        attention,
        guidance_scale=guidance_scale,
        attention_taps=taps,
        dtype=dtype,
    )
    return solver_step(state, row, velocity, noise), taps["attention_error"], bad


@dataclass(frozen=True)
class Calibration:
    """What was measured, and what was chosen.

    Attributes:
      plans: the candidates; the first is dense attention.
      errors: `[n, L, C]` relative L2 of the attention output, mean over prompts.
      costs: `[C]` estimated time beside bf16 dense attention.
      chosen: `[n]` the candidate of each step.
      ends: the number of steps until the end of each regime.
      schedule: the regimes made of them.
    """

    plans: tuple[AttentionPlan, ...]
    errors: Float[np.ndarray, "n L C"]
    costs: Float[np.ndarray, "C"]
    chosen: np.ndarray
    ends: tuple[int, ...]
    schedule: FPSSchedule

    @property
    def speed_up(self) -> float:
        """Estimated speed-up of attention over bf16 dense attention, all steps together."""
        return float(1 / self.costs[self.chosen].mean())

    def summary(self, error_budget: float | Float[np.ndarray, "n"]) -> str:
        """A few lines for a person: the regimes, the error where it is worst, the estimate."""
        steps = len(self.chosen)
        errors = self.errors.mean(1)[np.arange(steps), self.chosen]
        errors = np.where([self.plans[c] == self.plans[c].dense() for c in self.chosen], 0, errors)
        lines, start = [], 0
        for end, plan in zip(self.ends, self.schedule.plans(self.plans[0].grid), strict=True):
            lines.append(f"steps {start + 1} to {end}: {plan.brief()}, error {errors[start:end].max():.4f} at most")
            start = end
        lines.append(
            f"largest error {errors.max():.4f} of {budget_words(error_budget)} allowed; "
            f"{self.speed_up:.2f} times the speed of bf16 dense "
            "attention, estimated by the cost formula (not measured)"
        )
        return "\n".join([*lines, *self._advice()])

    def _advice(self) -> list[str]:
        """What to do where the schedule gains nothing."""
        dense = np.array([plan == plan.dense() for plan in self.plans])
        cheaper = self.costs < self.costs[dense].min()
        if cheaper[self.chosen].any():
            return []
        nothing = "this gains nothing over --attention dense:"
        if not cheaper.any():
            return [f"{nothing} at this size no other plan is estimated to be cheaper; measure at a larger one"]
        least = self.errors.mean(1)[:, cheaper].min()
        return [
            f"{nothing} the smallest error of a cheaper plan, at any step, is {least:.4f}; choose again with an --error-budget "
            "above that (--reuse spares the measurement)"
        ]


def budget_words(error_budget: float | Float[np.ndarray, "n"]) -> str:
    """For a person: "0.02", or "0.05 to 0.08" of a budget for each step."""
    least, most = np.min(error_budget), np.max(error_budget)
    return f"{least:.2g} to {most:.2g}" if np.ndim(error_budget) else f"{error_budget:g}"


def check_choice(error_budget: float, max_regimes: int) -> None:
    """Raises ValueError for a budget that isn't a positive number, or no regime."""
    if not (isinstance(error_budget, int | float) and math.isfinite(error_budget) and error_budget > 0):
        raise ValueError(
            f"error_budget={error_budget!r} is not a positive number; 0.02 is two per cent of the attention output"
        )
    if max_regimes < 1:
        raise ValueError(f"max_regimes={max_regimes} is less than 1; the paper has 3")


def measured_budget(plans: Sequence[AttentionPlan], errors: Float[np.ndarray, "n L C"]) -> Float[np.ndarray, "n"]:
    """The budget of each step where nobody states one: twice the error that FP8 alone makes there.

    FP8 alone is the whole grid at the granularity that errs least at the step; where no candidate is that, the one that errs
    least of all but dense attention. So rounding always has room, and a window may cost as much again.
    """
    by_step = errors.mean(1)
    rounded = [i for i, plan in enumerate(plans) if plan.whole_grid and plan.quantize]
    others = [i for i, plan in enumerate(plans) if not plan.whole_grid or plan.quantize]
    return 2 * by_step[:, rounded or others].min(1)


def choose_schedule(
    plans: Sequence[AttentionPlan],
    errors: Float[np.ndarray, "n L C"],
    *,
    error_budget: float | Float[np.ndarray, "n"],
    max_regimes: int = 4,
    progress: Sequence[float] | None = None,
) -> Calibration:
    """The cheapest schedule of at most `max_regimes` regimes whose error, mean over layers, keeps to the budget at every step.

    Exact, by dynamic programming over where regimes end. Dense attention is always a candidate, so there is always an answer.

    error_budget: of every step, or of each.
    progress: of each step (`fps_jax.attention.schedule.progress`); None for a grid, where step i of n is at i / n.
    Raises: ValueError for a budget that isn't positive or fewer than one regime.
    """
    check_choice(float(np.min(error_budget)), max_regimes)
    plans = tuple(plans)
    dense = [i for i, plan in enumerate(plans) if plan.whole_grid and not plan.quantize]
    if not dense:
        raise ValueError("plans hold no dense attention; make them with candidates()")
    costs = np.array([attention_cost(plan) for plan in plans])
    by_step = errors.mean(1)
    by_step[:, dense] = 0  # the model as it is, by definition
    fits = by_step <= np.broadcast_to(error_budget, len(by_step))[:, None]
    steps = len(by_step)

    @functools.cache
    def best(first: int, end: int) -> tuple[float, int]:
        """(cost, candidate) of one regime over these steps."""
        usable = np.flatnonzero(fits[first:end].all(0))
        cheapest = usable[costs[usable] <= costs[usable].min()]
        candidate = int(cheapest[np.argmin(by_step[first:end, cheapest].max(0))])  # of equal cost, as with `center_k`
        return float(costs[candidate]) * (end - first), candidate

    # table[r][end]: cheapest way to cover the first `end` steps with r regimes, and where the last of them starts
    table: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(min(max_regimes, steps)):
        table.append(
            {
                end: min((table[-1][first][0] + best(first, end)[0], first) for first in table[-1] if first < end)
                for end in range(1, steps + 1)
                if any(first < end for first in table[-1])
            }
        )
    reachable = [r for r in range(1, len(table)) if steps in table[r]]
    # A regime more has to save more than rounding.
    fewest = min(reachable, key=lambda r: (round(table[r][steps][0], 9), r))
    ends, end = [], steps
    for r in range(fewest, 0, -1):
        ends.append((table[r][end][1], end))
        end = table[r][end][1]
    chosen, regimes = np.zeros(steps, int), []
    for first, end in reversed(ends):
        chosen[first:end] = candidate = best(first, end)[1]
        plan = plans[candidate]
        window = None if plan.whole_grid else plan.windows[0]
        until = 1.0 if end == steps else round(end / steps if progress is None else float(progress[end]), 6)
        scales, center_k = plan.scales_per_tile, plan.center_k
        regimes.append(Regime(until=until, scales_per_tile=scales, window=window, center_k=center_k))
    layout = plans[0].layout
    schedule = FPSSchedule(grid=layout.grid, tile=layout.tile, regimes=tuple(regimes))
    return Calibration(plans, errors, costs, chosen, tuple(end for _, end in reversed(ends)), schedule)
