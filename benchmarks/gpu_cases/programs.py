"""What the cases of a family share: compiled programs and the arrays that they take, made once a process."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_cases.runner import REFERENCES
from benchmarks.gpu_cases.timing import size_of
from fps_jax.tuning.autotune import Task
from pallas_kernels import reference
from pallas_kernels.sm90 import forward as fwd_sm90
from pallas_kernels.sm90 import quantize as quantize_sm90
from pallas_kernels.sm90.config import ForwardConfig

BF16 = jnp.dtype(jnp.bfloat16)


def kernels(toy: bool) -> contextlib.AbstractContextManager[None]:
    """Open around calls of Hopper kernels: interpret mode at toy size, nothing on a GPU."""
    if not toy:
        return contextlib.nullcontext()
    from pallas_kernels.interpret import interpret

    return interpret(detect_races=False)


def reference_file(name: str, patience: float) -> pathlib.Path | None:
    """What the process of `references` leaves under this name, waited for so many seconds; None where it doesn't come.

    For what is done before a case's turn, so that the GPU isn't kept waiting.
    """
    folder = os.environ.get(REFERENCES)
    if folder is None:
        return None
    path, end = pathlib.Path(folder) / name, time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > end:
            return None
        time.sleep(0.1)
    return path


def compiled(toy: bool, fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """fn compiled ahead for arguments of these shapes. At toy size it compiles when it is called, inside `kernels`."""
    jitted = jax.jit(fn)
    return jitted if toy else jitted.lower(*args).compile()


@functools.cache
def task_of(toy: bool, size: str, density: float, scales: int | None) -> Task:
    """The call: the window of a density on the tiles that are proposed for the grid. `scales`: a tile; None for bf16."""
    shape = size_of(size, toy)
    return Task(
        grid=shape.grid,
        heads=shape.heads,
        head_dim=shape.head_dim,
        tile=shape.tile,
        density=density,
        scales_per_tile=scales,
    )


def like(task: Task) -> jax.ShapeDtypeStruct:
    """Of q, k and v."""
    return jax.ShapeDtypeStruct((1, task.plan.layout.num_stored, task.heads, task.head_dim), BF16)


@functools.lru_cache(maxsize=1)
def inputs(toy: bool, size: str) -> list[jax.Array]:
    """q, k, v in bf16, in tile order."""
    return task_of(toy, size, 1.0, 1).inputs()


@functools.cache
def quantizer(toy: bool, size: str, scales: int | None) -> Callable[..., quantize_sm90.Operands]:
    """q, k, v -> operands; the same for every density."""
    task = task_of(toy, size, 1.0, scales)
    pattern = task.plan.pattern  # once: what is timed should not make it
    run = compiled(toy, quantize_sm90.quantize, *[like(task)] * 3, pattern)
    return lambda q, k, v: run(q, k, v, pattern)


@functools.lru_cache(maxsize=1)
def operands(toy: bool, size: str, scales: int | None) -> quantize_sm90.Operands:
    with kernels(toy):
        return jax.block_until_ready(quantizer(toy, size, scales)(*inputs(toy, size)))


@functools.cache
def forward(
    toy: bool, size: str, density: float, scales: int | None, config: ForwardConfig
) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """operands -> (output, log-sum-exp), as the pipeline calls the kernel."""
    task = task_of(toy, size, density, scales)
    pattern = task.plan.pattern
    specs = jax.eval_shape(quantize_sm90.quantize, *[like(task)] * 3, pattern)

    def call(operands: Any, pattern: Any) -> Any:
        return fwd_sm90.attention(operands, pattern, batch=1, dtype=BF16, config=config)

    run = compiled(toy, call, specs, pattern)
    return lambda operands: run(operands, pattern)


@functools.cache
def last_tile_error(
    toy: bool, size: str, density: float, scales: int | None
) -> Callable[[list[jax.Array], jax.Array, jax.Array], dict[str, float]]:
    """(q, k, v), output, log-sum-exp -> how far their last tile of the last head is from the specification, at this size.

    In float32. Addresses are largest there. 'rel_l2' and 'rel_l2_lse' over the tile's tokens, 'worst_row' of one of them.
    """
    task = task_of(toy, size, density, scales)
    pattern = task.plan.pattern
    stored = pattern.tile_size
    last = dataclasses.replace(
        pattern,
        key_tiles=pattern.key_tiles[..., -1:, :],
        counts=pattern.counts[..., -1:],
        q_valid=pattern.q_valid[-stored:],
    )

    def error(q, k, v, out, lse, last):
        q, out, lse = q[:, -stored:, -1:], out[:, -stored:, -1:], lse[:, -1:, -stored:]
        want, want_lse = reference.attention(q, k[:, :, -1:], v[:, :, -1:], last)
        want, got = want.astype(jnp.float32), out.astype(jnp.float32)
        wrong, norm = jnp.linalg.norm(got - want, axis=-1), jnp.linalg.norm(want, axis=-1)
        rows = jnp.where(last.q_valid[None, :, None], wrong / jnp.where(norm > 0, norm, 1), 0)
        lse_error = jnp.linalg.norm(lse - want_lse) / jnp.linalg.norm(want_lse)  # both 0 at padding
        return jnp.linalg.norm(wrong) / jnp.linalg.norm(norm), rows.max(), lse_error

    lse_like = jax.ShapeDtypeStruct((1, task.heads, task.plan.layout.num_stored), jnp.float32)
    run = compiled(toy, error, *[like(task)] * 4, lse_like, last)

    def check(qkv: list[jax.Array], out: jax.Array, lse: jax.Array) -> dict[str, float]:
        rel_l2, worst, rel_l2_lse = run(*qkv, out, lse, last)
        return {"rel_l2": float(rel_l2), "worst_row": float(worst), "rel_l2_lse": float(rel_l2_lse)}

    return check
