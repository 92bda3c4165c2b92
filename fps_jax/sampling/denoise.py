"""The denoising loop: one jitted `lax.scan` over the steps of a solver table."""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fps_jax.attention.attend import TokenAttention
from fps_jax.config import DiTConfig
from fps_jax.interrupts import watched
from fps_jax.models.dit import DENSE, stage_name
from fps_jax.models.params import Params
from fps_jax.progress import Progress
from fps_jax.sampling.guidance import Inputs, guided_velocity
from fps_jax.sampling.solvers import SolverState, SolverTable, solver_step

Seen = Callable[[int, np.ndarray], object]  # (number of the step from 0, the latents after it)
Segments = tuple[tuple[int, TokenAttention], ...]  # (number of steps, their self-attention), in order


def denoise(
    config: DiTConfig,
    params: Params,
    inputs: Inputs,
    table: SolverTable,
    *,
    guidance_scale: float = 1.0,
    dtype: Any = jnp.float32,
    batch_guidance: bool = False,
    segments: Segments | None = None,
    progress: Progress | None = None,
    seen: Seen | None = None,
) -> Float[Array, "B 16 F H W"]:
    """Integrate from noise to clean latents.

    Args:
      inputs: noise, text states and what goes with them; not donated. With a negative prompt's, classifier-free guidance. With
        `step_noise` where the table adds noise (solver "lcm").
      table: the solver's coefficients (`solver_table`).
      guidance_scale, batch_guidance, dtype: as for `guided_velocity`.
      segments: the self-attention of consecutive steps (`FPSSchedule.segments`), all steps covered; None for dense.
      progress: called from another thread as steps finish, steps in order; never waited for.
      seen: called like it, with the latents after each step as float32 NumPy: a copy to the host at every step.

    Compiled once per shape, number of steps, segments and mode, for solvers that add noise, and for what is reported; `table` and
    `guidance_scale` are data. An exception of `progress` or `seen`, and Ctrl-C, end the loop with the step that is under way, where
    one of the two is given.
    Returns: float32 latents.
    Raises: ValueError for segments of another number of steps, or step noise that is missing; FloatingPointError naming the first
      step and layer where a NaN or inf appeared; what `progress` or `seen` raise; KeyboardInterrupt.
    """
    num_steps = len(table.sigma)
    segments = ((num_steps, DENSE),) if segments is None else segments
    if sum(count for count, _ in segments) != num_steps:
        raise ValueError(
            f"segments cover {sum(count for count, _ in segments)} steps of {num_steps}; cover each step once"
        )
    inputs = inputs._replace(noise=jnp.asarray(inputs.noise, jnp.float32), step_noise=_step_noise(inputs, table))
    report: Report = "latents" if seen is not None else "steps" if progress is not None else "nothing"
    with _Run.begin(num_steps, progress, seen) as run:
        out, bad = _denoise(
            params,
            inputs,
            jax.tree.map(jnp.asarray, table),
            jnp.float32(guidance_scale),
            jnp.int32(run.number),
            config=config,
            dtype=jnp.dtype(dtype),
            batch_guidance=batch_guidance,
            segments=segments,
            report=report,
        )
        step, stage = (int(i) for i in jax.device_get(bad))
        if report != "nothing":
            jax.effects_barrier()
    if step >= 0:
        where = "the solver" if stage == config.num_layers + 2 else stage_name(config, stage)
        raise FloatingPointError(
            f"NaN or inf at step {step + 1} of {num_steps} (timestep {float(table.timestep[step]):g}), first in {where}; "
            "try dtype='float32', and check the weights and the inputs for NaN"
        )
    return out


def _step_noise(inputs: Inputs, table: SolverTable) -> Array | None:
    """The inputs' step noise where the table reads it."""
    if table.renoise is None:
        return None
    shape = (len(table.sigma), *jnp.shape(inputs.noise))
    if inputs.step_noise is None or jnp.shape(inputs.step_noise) != shape:
        given = None if inputs.step_noise is None else jnp.shape(inputs.step_noise)
        raise ValueError(f"step_noise has shape {given}; this solver adds noise after each step and needs {shape}")
    return jnp.asarray(inputs.step_noise, jnp.float32)


class _EndedError(Exception):
    """Raised in a callback, it ends the compiled loop; why is in the run."""


class _Run:
    """Routes the compiled loop's callbacks to the caller's functions: the program holds a number, not a Python object."""

    _active: dict[int, "_Run"] = {}  # noqa: RUF012
    _numbers = itertools.count()

    def __init__(self, num_steps: int, progress: Progress | None, seen: Seen | None, interrupted: Callable[[], bool]):
        self.num_steps, self.progress, self.seen, self.interrupted = num_steps, progress, seen, interrupted
        self.number, self.done = next(self._numbers) % 2**31, 0
        self.error: BaseException | None = None

    @classmethod
    @contextlib.contextmanager
    def begin(cls, num_steps: int, progress: Progress | None, seen: Seen | None) -> Iterator["_Run"]:
        """Takes callbacks until the block ends; what one of them ended the program with is then raised in place of XLA's."""
        with watched() as interrupted:
            run = cls(num_steps, progress, seen, interrupted)
            cls._active[run.number] = run
            _LOG.addFilter(_not_ours)
            try:
                yield run
            finally:
                del cls._active[run.number]
                if not cls._active:
                    _LOG.removeFilter(_not_ours)
                if run.error is not None:
                    raise run.error from None

    @classmethod
    def report(cls, number: Any, step: Any, x: Any = None) -> None:
        run = cls._active.get(int(number))
        if run is None:
            return
        if run.error is None and run.interrupted():
            run.error = KeyboardInterrupt()
        try:
            if run.error is None and int(step) >= run.done:  # callbacks may overtake each other
                run.done = int(step) + 1
                if run.progress is not None:
                    run.progress(run.done, run.num_steps)
                if run.seen is not None:
                    run.seen(int(step), np.asarray(x))
        except BaseException as error:
            run.error = error
        if run.error is not None:
            raise _EndedError


# What jax says of an exception in a callback, with a traceback; ours is no news.
_LOG = logging.getLogger("jax._src.debugging")


def _not_ours(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], _EndedError))


Report = Literal["nothing", "steps", "latents"]


@functools.partial(jax.jit, static_argnames=("config", "dtype", "batch_guidance", "segments", "report"))
def _denoise(
    params: Params,
    inputs: Inputs,
    table: SolverTable,
    guidance_scale: Array,
    run: Array,
    *,
    config: DiTConfig,
    dtype: Any,
    batch_guidance: bool,
    segments: Segments,
    report: Report,
) -> tuple[Array, Int[Array, "2"]]:
    velocity = functools.partial(
        guided_velocity,
        config,
        params,
        inputs,
        guidance_scale=guidance_scale,
        batch_guidance=batch_guidance,
        dtype=dtype,
    )

    def step(attention, carry, numbered_row):
        state, first_bad = carry
        index, row, noise = numbered_row
        v, stage = velocity(state.x, row.timestep, attention)
        state = solver_step(state, row, v, noise)
        overflow = jnp.where(jnp.isfinite(state.x).all(), jnp.int32(-1), jnp.int32(config.num_layers + 2))
        stage = jnp.where(stage >= 0, stage, overflow)
        first_bad = jnp.where((first_bad[0] < 0) & (stage >= 0), jnp.stack([index, stage]), first_bad)
        if report != "nothing":
            jax.debug.callback(_Run.report, run, index, *([state.x] if report == "latents" else []))
        return (state, first_bad), None

    steps = table.sigma.shape[0]
    zeros = jnp.zeros_like(inputs.noise)
    carry = (SolverState(inputs.noise, zeros, zeros, zeros), jnp.full(2, -1, jnp.int32))
    rows = (jnp.arange(steps, dtype=jnp.int32), table, inputs.step_noise)
    start = 0
    # One scan for each segment, not one with a switch inside: a branch would have the GPU ask the host at every step.
    for count, attention in segments:
        own = jax.tree.map(lambda a, first=start, end=start + count: a[first:end], rows)
        carry, _ = jax.lax.scan(functools.partial(step, attention), carry, own)
        start += count
    return carry[0].x, carry[1]
