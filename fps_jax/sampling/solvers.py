"""UniPC, DPM++, Euler and LCM as one linear multistep scheme with per-step coefficients.

Every solver here, written in the data prediction x0 = x - sigma v, maps the state to the next by fixed linear combinations:

    corrected = corrector . (x, previous, x0_now, x0_last, x0_before)
    next      = predictor . (corrected, x0_now, x0_last) + renoise noise

The coefficients depend on the noise levels alone. They are computed once in float64, and the denoising loop is the same for
all solvers. `previous` is the corrected state of the step before; x0_last and x0_before are the two last data predictions.
`noise` is fresh at each step; only LCM adds it.
"""

from typing import Any, NamedTuple

import numpy as np

from fps_jax.choices import SigmaGrid, Solver
from fps_jax.sampling.flow import Grid, sigma_grid


class SolverTable(NamedTuple):
    """What the denoising loop needs of step i, float32, leading axis n steps. NumPy outside jit, jax arrays inside."""

    sigma: Any  # [n]
    timestep: Any  # [n]
    corrector: Any  # [n, 5]
    predictor: Any  # [n, 3]
    renoise: Any = None  # [n]: how much of the step's fresh noise; None for a solver that adds none


class SolverState(NamedTuple):
    """Latents, and what the next step remembers: the corrected state of the last step and the last two data predictions."""

    x: Any
    previous: Any
    x0_last: Any
    x0_before: Any


def solver_step(state: SolverState, row: SolverTable, velocity: Any, noise: Any = None) -> SolverState:
    """The state after one step, from the velocity at `state.x`; `row` is the table's for this step.

    noise: normal, of x's shape; read where the row has `renoise`.
    """
    x, previous, x0_last, x0_before = state
    x0 = x - row.sigma * velocity
    c, p = row.corrector, row.predictor
    corrected = c[0] * x + c[1] * previous + c[2] * x0 + c[3] * x0_last + c[4] * x0_before
    following = p[0] * corrected + p[1] * x0 + p[2] * x0_last
    if row.renoise is not None:
        following = following + row.renoise * noise
    return SolverState(following, corrected, x0, x0_last)


def solver_table(solver: Solver, grid: SigmaGrid, num_steps: int, shift: float) -> SolverTable:
    """Coefficients of a whole trajectory on a grid. Raises as `fps_jax.sampling.flow.sigma_grid`."""
    return coefficients(solver, sigma_grid(solver, grid, num_steps, shift))


def coefficients(solver: Solver, levels: Grid) -> SolverTable:
    """Coefficients of a whole trajectory over given levels (`sigma_grid`, `explicit_grid`)."""
    steps = {"unipc": _unipc, "dpm++": _dpmpp, "euler": _euler, "lcm": _lcm}[solver](levels)
    corrector, predictor = (np.array(rows, np.float64).astype(np.float32) for rows in zip(*steps, strict=True))
    renoise = levels.sigmas[1:] if solver == "lcm" else None
    return SolverTable(levels.sigmas[:-1], levels.timesteps, corrector, predictor, renoise)


_NO_CORRECTION = (1.0, 0.0, 0.0, 0.0, 0.0)


def _log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma): minus infinity at sigma 1, infinity at 0."""
    with np.errstate(divide="ignore"):
        return float(np.log(1 - np.float64(sigma)) - np.log(np.float64(sigma)))


def _unipc(levels: Grid) -> list[tuple]:
    """UniPC-2, B(h) = expm1(-h) ("bh2"), data prediction (arXiv 2302.04867; Wan-Video/Wan2.1 wan/utils/fm_solvers_unipc.py)."""
    sigma = levels.sigmas.astype(np.float64)
    n = len(sigma) - 1
    snr = [_log_snr(s) for s in sigma]
    order = [min(2, n - i, i + 1) for i in range(n)]
    rows = []
    for i in range(n):
        corrector = _NO_CORRECTION
        if i > 0:  # of the step from i - 1 to i, with the order that step was predicted with
            a, b, h = sigma[i] / sigma[i - 1], 1 - sigma[i], snr[i] - snr[i - 1]
            e = np.expm1(-h)
            if order[i - 1] == 1:
                rho_now, weights = 0.5, ()
            else:
                r = (snr[i - 2] - snr[i - 1]) / h
                phi = e / -h - 1
                rhs = [phi / e, (phi / -h - 0.5) * 2 / e]
                rho_before, rho_now = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), rhs)
                weights = (rho_before / r,)
            x0_now = -b * e * rho_now
            x0_last = -b * e * (1 - rho_now - sum(weights))
            x0_before = -b * e * sum(weights)
            corrector = (0.0, a, x0_now, x0_last, x0_before)
        b, h = 1 - sigma[i + 1], snr[i + 1] - snr[i]
        e = np.expm1(-h)  # -1 at the last step, where h is infinite: exactly x0
        slope = 0.5 * h / (snr[i - 1] - snr[i]) if order[i] == 2 else 0.0
        predictor = (sigma[i + 1] / sigma[i], -b * e * (1 - slope), -b * e * slope)
        rows.append((corrector, predictor))
    return rows


def _dpmpp(levels: Grid) -> list[tuple]:
    """DPM-Solver++(2M), midpoint, first and last step of order 1 (arXiv 2211.01095; wan/utils/fm_solvers.py)."""
    sigma = levels.sigmas.astype(np.float64)
    n = len(sigma) - 1
    snr = [_log_snr(s) for s in sigma]
    rows = []
    for i in range(n):
        b, h = 1 - sigma[i + 1], snr[i + 1] - snr[i]
        e = np.expm1(-h)
        second_order = 0 < i < n - 1
        # sigma 1 has lambda = -inf: the slope from there counts for nothing, as upstream's 1 / inf
        slope = -0.5 * h / (snr[i] - snr[i - 1]) if second_order else 0.0
        rows.append((_NO_CORRECTION, (sigma[i + 1] / sigma[i], -b * e * (1 - slope), -b * e * slope)))
    return rows


def _euler(levels: Grid) -> list[tuple]:
    """x + (sigma' - sigma) v, written in x0."""
    sigma = levels.sigmas.astype(np.float64)
    ratios = sigma[1:] / sigma[:-1]
    return [(_NO_CORRECTION, (ratio, 1 - ratio, 0.0)) for ratio in ratios]


def _lcm(levels: Grid) -> list[tuple]:
    """x0 noised again to the next level, (1 - sigma') x0 + sigma' noise: consistency and DMD models' steps.

    Sources: FlowMatchLCMScheduler of diffusers; tianweiy/CausVid causvid/models/wan/bidirectional_inference.py.
    """
    return [(_NO_CORRECTION, (0.0, 1 - sigma, 0.0)) for sigma in levels.sigmas[1:].astype(np.float64)]
