"""Noise levels of the flow x_t = (1 - sigma) x_0 + sigma noise, and the grids that samplers step along.

Everything here is NumPy in float64, rounded to float32 where the original code rounds, so that timesteps truncate alike.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fps_jax.choices import SigmaGrid, Solver

# (solver, grid) pairs that have an original to agree with.
VALID_PAIRS: tuple[tuple[str, str], ...] = (
    ("unipc", "wan"),
    ("unipc", "diffusers"),
    ("dpm++", "wan"),
    ("euler", "wan"),
    ("euler", "diffusers"),
)


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
    euler/wan: the dpm++ grid.

    Raises: ValueError for another pair, num_steps < 1, or a shift that isn't positive.
    """
    check_pair(solver, grid)
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps} is less than 1; use 1 or more (Wan's default is 50)")
    if not (np.isfinite(shift) and shift > 0):
        raise ValueError(f"flow_shift={shift} is not a positive number; Wan uses 3 to 16")
    if solver == "euler" and grid == "diffusers":
        return _flow_match_euler(num_steps, shift)
    if solver == "unipc" and grid == "wan":
        sigmas = shift_sigma(np.linspace(float(np.float32(0.999)), 0.0, num_steps + 1)[:-1], shift)
    elif solver == "unipc":
        sigmas = shift_sigma(np.linspace(1, 1 / 1000, num_steps + 1)[:-1], shift)
        if abs(sigmas[0] - 1) < 1e-6:
            sigmas[0] -= 1e-6  # as diffusers: log(1 - sigma) must be finite
    else:
        sigmas = shift_sigma(np.linspace(1, 0, num_steps + 1)[:num_steps], shift)
    timesteps = (sigmas * 1000).astype(np.int64)  # truncated, as upstream; the sigmas are not
    return Grid(np.append(sigmas, 0).astype(np.float32), timesteps.astype(np.float32))


def _flow_match_euler(num_steps: int, shift: float) -> Grid:
    # diffusers shifts its smallest sigma when it is built and the whole grid again later: the last level is shifted twice.
    smallest = np.float32(1) / np.float32(1000)
    sigma_min = float(shift_sigma(smallest, shift))
    levels = np.linspace(1000.0, sigma_min * 1000, num_steps) / 1000
    sigmas = shift_sigma(levels, shift).astype(np.float32)
    return Grid(np.append(sigmas, np.float32(0)), sigmas * np.float32(1000))
