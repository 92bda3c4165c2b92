"""Noise levels of the flow x_t = (1 - sigma) x_0 + sigma noise, and the grids that samplers step along.

Everything here is NumPy in float64, rounded to float32 where the original code rounds, so that timesteps truncate alike.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from fps_jax.causal import CausalConfig
from fps_jax.choices import SigmaGrid, Solver
from fps_jax.config import MAX_SHIFT
from fps_jax.sizes import check_integer_up_to

# (solver, grid) pairs that have an original to agree with.
VALID_PAIRS: tuple[tuple[str, str], ...] = (
    ("unipc", "wan"),
    ("unipc", "diffusers"),
    ("dpm++", "wan"),
    ("euler", "wan"),
    ("euler", "diffusers"),
    ("lcm", "wan"),
    ("lcm", "diffusers"),
)


MAX_STEPS = 1000  # the noise levels of training; more steps would repeat them


class Grid(NamedTuple):
    """sigmas: `[n + 1]` float32, falling, last 0. timesteps: `[n]` float32 in [0, 1000], what the model is told."""

    sigmas: Float[np.ndarray, "n+1"]
    timesteps: Float[np.ndarray, "n"]


def shift_sigma(sigma, shift: float):
    """Move noise levels up: shift s / (1 + (shift - 1) s) (Wan-Video/Wan2.1 wan/utils/fm_solvers.py)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def check_pair(solver: str, sigma_grid: str) -> None:
    """Raises ValueError, naming the valid pairs, for a solver on a grid that no original code has."""
    if (solver, sigma_grid) not in VALID_PAIRS:
        valid = ", ".join(f"{s}/{g}" for s, g in VALID_PAIRS)
        raise ValueError(f"solver={solver!r} with sigma_grid={sigma_grid!r} is not a valid pair; use one of {valid}")


def sigma_grid(solver: Solver, grid: SigmaGrid, num_steps: int, shift: float) -> Grid:
    """The noise levels that a solver visits.

    unipc/wan and dpm++/wan: FlowUniPCMultistepScheduler and FlowDPMSolverMultistepScheduler of Wan-Video/Wan2.1.
    unipc/diffusers: UniPCMultistepScheduler with flow sigmas, diffusers 0.42. euler/diffusers: FlowMatchEulerDiscreteScheduler.
    euler/wan: the dpm++ grid. lcm/wan: the same levels, timesteps not truncated, as in ModelTC/LightX2V (step distillation) and
    Self-Forcing. lcm/diffusers: FlowMatchLCMScheduler, whose levels are FlowMatchEulerDiscreteScheduler's.

    Raises: ValueError for another pair, num_steps outside [1, `MAX_STEPS`], or a shift outside (0, `MAX_SHIFT`].
    """
    check_pair(solver, grid)
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps} is less than 1; use 1 or more (Wan's default is 50)")
    check_integer_up_to("num_inference_steps", num_steps, MAX_STEPS, "the number of noise levels in training")
    _check_shift(shift)
    if solver in ("euler", "lcm") and grid == "diffusers":
        return _flow_match_euler(num_steps, shift)
    if solver == "unipc" and grid == "wan":
        sigmas = shift_sigma(np.linspace(float(np.float32(0.999)), 0.0, num_steps + 1)[:-1], shift)
    elif solver == "unipc":
        sigmas = _below_one(shift_sigma(np.linspace(1, 1 / 1000, num_steps + 1)[:-1], shift))
    else:
        sigmas = shift_sigma(np.linspace(1, 0, num_steps + 1)[:num_steps], shift)
    return _grid(sigmas, truncate=solver != "lcm")


def explicit_grid(
    solver: Solver,
    shift: float,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
) -> Grid:
    """Levels that the caller names, one kind of them: no grid, and nothing is shifted. Every solver takes them.

    Args:
      sigmas: in (0, 1], falling; the closing 0 is left out. The model is told 1000 sigma, truncated for unipc and dpm++, as their
        originals do. unipc starts at 1 - 1e-6 in place of 1, as in diffusers.
      timesteps: in (0, 1000], falling: what the model is told. The level of each is the nearest of the 1000 of training,
        shift u / (1 + (shift - 1) u) at u = k / 1000, as in CausVid and FastVideo (757 at shift 8 is 0.756757, not 0.757).
      shift: of the levels that `timesteps` stand for; `sigmas` don't need it.
    Raises: ValueError for both, for values that break a rule above, timesteps that stand for the same level, or a shift that isn't
      positive.
    """
    _check_shift(shift)
    if sigmas is not None and timesteps is not None:
        raise ValueError("sigmas and timesteps are both given; give one of them")
    if sigmas is not None:
        levels = check_levels("sigmas", sigmas)
        if solver == "unipc":
            levels = _below_one(levels)
            _check_falling("sigmas", sigmas, levels.astype(np.float32), "")
        return _grid(levels, truncate=solver in ("unipc", "dpm++"))
    told = check_levels("timesteps", timesteps)
    training = shift_sigma(np.arange(1000, 0, -1) / 1000, shift)
    levels = training[np.abs(1000 * training - told[:, None]).argmin(1)]
    _check_falling("timesteps", timesteps, levels, f" at flow_shift={shift:g}, which has 1000 levels")
    if solver == "unipc":
        levels = _below_one(levels)
    return Grid(np.append(levels, 0).astype(np.float32), told.astype(np.float32))


def block_levels(causal: CausalConfig) -> Grid:
    """The levels that a causal model denoises each block at, as Self-Forcing (utils/scheduler.py) and CausVid look them up.

    Raises: ValueError for steps that stand for the same level.
    """
    told = np.asarray(causal.steps, np.float64)
    if causal.warp:
        told = 1000 * shift_sigma(told / 1000, causal.shift)
    return explicit_grid("lcm", causal.shift, timesteps=told.tolist())


def _check_shift(shift: float) -> None:
    number = isinstance(shift, int | float | np.number) and not isinstance(shift, bool)
    if not (number and 0 < shift <= MAX_SHIFT):  # NaN is neither
        raise ValueError(f"flow_shift={shift!r} is not a positive number of at most {MAX_SHIFT:g}; Wan uses 3 to 16")


def check_levels(name: str, values: Any) -> Float[np.ndarray, "n"]:
    """`sigmas` or `timesteps` of a caller as float64. Raises ValueError for what breaks the rules that no shift changes."""
    top = 1 if name == "sigmas" else 1000
    try:
        levels = np.asarray(values)
    except ValueError:  # a ragged list
        levels = np.empty(0)
    if levels.ndim != 1 or not levels.size or levels.dtype.kind not in "iuf":
        raise ValueError(f"{name}={values!r} is not a non-empty list of numbers in (0, {top}]")
    if len(levels) > MAX_STEPS:
        raise ValueError(f"{name} has {len(levels):,} levels, more than the {MAX_STEPS} of training; use fewer")
    small = levels.astype(np.float32)
    if not ((small > 0) & (small <= top)).all():
        wrong = levels[~((small > 0) & (small <= top))][0]
        fix = "leave it out: sampling ends there anyway" if wrong == 0 else f"{name} go from {top} down towards 0"
        raise ValueError(f"{name}={_listed(levels)}: {wrong:g} is not in (0, {top}]; {fix}")
    _check_falling(name, values, small, "")
    return levels.astype(np.float64)


def _check_falling(name: str, values: Any, levels: np.ndarray, where: str) -> None:
    bad = np.flatnonzero(levels[1:] >= levels[:-1])
    if bad.size:
        first, second = (float(values[bad[0] + i]) for i in (0, 1))
        what = "are the same noise level" if where else "don't fall"
        raise ValueError(
            f"{name}={_listed(values)}: {first:g} and {second:g} {what}{where}; each must be below the last"
        )


def _listed(values: Any) -> str:
    return "[" + ", ".join(f"{float(value):g}" for value in values) + "]"


def _below_one(sigmas: np.ndarray) -> np.ndarray:
    """As diffusers' UniPC starts: log(1 - sigma) must be finite."""
    return np.append(sigmas[0] - 1e-6, sigmas[1:]) if abs(sigmas[0] - 1) < 1e-6 else sigmas


def _grid(sigmas: np.ndarray, *, truncate: bool) -> Grid:
    # Timesteps of UniPC and DPM++ are truncated, as upstream; the sigmas are not.
    timesteps = (sigmas * 1000).astype(np.int64) if truncate else sigmas * 1000
    return Grid(np.append(sigmas, 0).astype(np.float32), timesteps.astype(np.float32))


def _flow_match_euler(num_steps: int, shift: float) -> Grid:
    # diffusers shifts its smallest sigma when it is built and the whole grid again later: the last level is shifted twice.
    smallest = np.float32(1) / np.float32(1000)
    sigma_min = float(shift_sigma(smallest, shift))
    levels = np.linspace(1000.0, sigma_min * 1000, num_steps) / 1000
    sigmas = shift_sigma(levels, shift).astype(np.float32)
    return Grid(np.append(sigmas, np.float32(0)), sigmas * np.float32(1000))
