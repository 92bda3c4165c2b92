"""The denoising loop: one jitted `lax.scan` over the steps of a solver table."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fps_jax.attention.attend import TokenAttention
from fps_jax.config import DiTConfig
from fps_jax.models.dit import DENSE, dit, stage_name
from fps_jax.models.params import Params
from fps_jax.progress import Progress
from fps_jax.sampling.solvers import SolverState, SolverTable, solver_step

Segments = tuple[tuple[int, TokenAttention], ...]  # (number of steps, their self-attention), in order


def denoise(
    config: DiTConfig,
    params: Params,
    latents: Float[Array, "B 16 F H W"],
    table: SolverTable,
    text_states: Float[Array, "B T E"],
    negative_states: Float[Array, "B T E"] | None = None,
    *,
    guidance_scale: float = 1.0,
    condition: Float[Array, "B 20 F H W"] | None = None,
    image_states: Float[Array, "B I G"] | None = None,
    dtype: Any = jnp.float32,
    batch_guidance: bool = False,
    segments: Segments | None = None,
    progress: Progress | None = None,
) -> Float[Array, "B 16 F H W"]:
    """Integrate from noise to clean latents.

    Args:
      latents: the initial noise, float32; not donated.
      negative_states: text states of the negative prompt; with them, classifier-free guidance (arXiv 2207.12598):
        v = v_negative + guidance_scale (v_text - v_negative).
      condition: mask and condition latents that an i2v or flf2v model reads beside the noisy ones.
      batch_guidance: evaluate both prompts as one batch of two instead of two passes (more memory, fewer launches).
      segments: the self-attention of consecutive steps (`FPSSchedule.segments`), all steps covered; None for dense.
      progress: called from another thread as steps finish, steps in order; never waited for.

    Compiled once per shape, number of steps, segments and mode; `table` and `guidance_scale` are data.
    Returns: float32 latents.
    Raises: ValueError for segments of another number of steps; FloatingPointError naming the first step and layer where a NaN or
      inf appeared.
    """
    num_steps = len(table.sigma)
    segments = ((num_steps, DENSE),) if segments is None else segments
    if sum(count for count, _ in segments) != num_steps:
        raise ValueError(
            f"segments cover {sum(count for count, _ in segments)} steps of {num_steps}; cover each step once"
        )
    run = _Run.start(progress, num_steps)
    try:
        out, bad = _denoise(
            params,
            jnp.asarray(latents, jnp.float32),
            SolverTable(*(jnp.asarray(a) for a in table)),
            text_states,
            negative_states,
            condition,
            image_states,
            jnp.float32(guidance_scale),
            jnp.int32(run.number),
            config=config,
            dtype=jnp.dtype(dtype),
            batch_guidance=batch_guidance,
            segments=segments,
            report=progress is not None,
        )
        step, stage = (int(i) for i in jax.device_get(bad))
        if progress is not None:
            jax.effects_barrier()
    finally:
        run.stop()
    if run.error is not None:
        raise run.error
    if step >= 0:
        where = "the solver" if stage == config.num_layers + 2 else stage_name(config, stage)
        raise FloatingPointError(
            f"NaN or inf at step {step + 1} of {num_steps} (timestep {float(table.timestep[step]):g}), first in {where}; "
            "try dtype='float32', and check the weights and the inputs for NaN"
        )
    return out


class _Run:
    """Routes the compiled loop's callback to the caller's `progress`: the program holds a number, not a Python object."""

    _active: dict[int, "_Run"] = {}  # noqa: RUF012
    _numbers = itertools.count()

    def __init__(self, number: int, progress: Progress | None, num_steps: int):
        self.number, self.progress, self.num_steps, self.done = number, progress, num_steps, 0
        self.error: BaseException | None = None

    @classmethod
    def start(cls, progress: Progress | None, num_steps: int) -> "_Run":
        run = cls(next(cls._numbers) % 2**31, progress, num_steps)
        cls._active[run.number] = run
        return run

    def stop(self) -> None:
        del self._active[self.number]

    @classmethod
    def report(cls, number, step) -> None:
        run = cls._active.get(int(number))
        if run is not None and run.progress is not None and int(step) >= run.done:  # callbacks may overtake each other
            run.done = int(step) + 1
            try:
                run.progress(run.done, run.num_steps)
            except BaseException as error:  # Ctrl-C too; raised again from `denoise`, not lost in a thread
                run.progress, run.error = None, error


@functools.partial(jax.jit, static_argnames=("config", "dtype", "batch_guidance", "segments", "report"))
def _denoise(
    params: Params,
    latents: Array,
    table: SolverTable,
    text: Array,
    negative: Array | None,
    condition: Array | None,
    image: Array | None,
    guidance_scale: Array,
    run: Array,
    *,
    config: DiTConfig,
    dtype: Any,
    batch_guidance: bool,
    segments: Segments,
    report: bool,
) -> tuple[Array, Int[Array, "2"]]:
    def model(attention, x, timestep, text, condition, image):
        if condition is not None:
            x = jnp.concatenate([x, condition], axis=1)
        t = jnp.broadcast_to(timestep, x.shape[:1])
        return dit(config, params, x, t, text, image, attention=attention, dtype=dtype)

    def velocity(attention, x, timestep):
        if negative is None:
            return model(attention, x, timestep, text, condition, image)
        if batch_guidance:

            def twice(a):
                return None if a is None else jnp.concatenate([a, a])

            both_texts = jnp.concatenate([text, negative])
            both = model(attention, twice(x), timestep, both_texts, twice(condition), twice(image))
            positive_v, negative_v = jnp.split(both.velocity, 2)
            bad = both.first_bad
        else:
            positive_v, bad = model(attention, x, timestep, text, condition, image)
            negative_v, bad_negative = model(attention, x, timestep, negative, condition, image)
            bad = jnp.where(bad >= 0, bad, bad_negative)
        return negative_v + guidance_scale * (positive_v - negative_v), bad

    def step(attention, carry, inputs):
        state, first_bad = carry
        index, row = inputs
        v, stage = velocity(attention, state.x, row.timestep)
        state = solver_step(state, row, v)
        overflow = jnp.where(jnp.isfinite(state.x).all(), jnp.int32(-1), jnp.int32(config.num_layers + 2))
        stage = jnp.where(stage >= 0, stage, overflow)
        first_bad = jnp.where((first_bad[0] < 0) & (stage >= 0), jnp.stack([index, stage]), first_bad)
        if report:
            jax.debug.callback(_Run.report, run, index)
        return (state, first_bad), None

    steps = table.sigma.shape[0]
    zeros = jnp.zeros_like(latents)
    carry = (SolverState(latents, zeros, zeros, zeros), jnp.full(2, -1, jnp.int32))
    rows = (jnp.arange(steps, dtype=jnp.int32), table)
    start = 0
    # One scan for each segment, not one with a switch inside: a branch would have the GPU ask the host at every step.
    for count, attention in segments:
        own = jax.tree.map(lambda a, first=start, end=start + count: a[first:end], rows)
        carry, _ = jax.lax.scan(functools.partial(step, attention), carry, own)
        start += count
    return carry[0].x, carry[1]
