"""Are the kernels right? Against the specification, on poisoned memory, twice."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_cases.programs import compiled, kernels, reference_file
from benchmarks.gpu_cases.shapes import OPERATIONS, SHAPES
from pallas_kernels import block_sparse, mosaic, reference
from pallas_kernels.sm90 import forward as fwd_sm90
from pallas_kernels.sm90 import quantize as quantize_sm90
from pallas_kernels.sm90.call_shape import CallShape
from pallas_kernels.testing import Shape, make_call

_PATIENCE = 90  # seconds to wait for a reference


class Bars(NamedTuple):
    """Relative L2 that a kernel may have to the specification."""

    out: float
    lse: float
    gradients: float


# The specification sums exactly, and so does interpret mode, with float32's rounding: what tests/pallas_kernels hold.
_INTERPRETED = Bars(out=2e-3, lse=1e-4, gradients=1.5e-2)
# Hopper's tensor cores keep some 14 bits of a sum of FP8 products (`benchmarks.short_sums` has the model), and Q K is such a sum.
# For 'tables every tile' the model says 1.08e-2 of the output, where an H200 gave 1.10e-2 (benchmarks/results/gpu.json). The most
# that it gave of any shape is 1.17e-2, and 7.9e-4 of the log-sum-exp.
_FP8 = Bars(out=1.5e-2, lse=1.5e-3, gradients=1.5e-2)
# Sums of bf16 products are float32's. The output rounds P and itself to bf16: at most 2.1e-3 on that H200, and 5.2e-5 of the
# log-sum-exp, which holds interpret mode's bar.
_BF16 = Bars(out=3e-3, lse=1e-4, gradients=1e-2)
# Gradients, anywhere: P and dS are rounded to bf16, and dS is a difference. tests/pallas_kernels/test_block_sparse.py holds 1e-2 of
# that, and FP8 to half as much again.


def bars(scales: int | None, toy: bool) -> Bars:
    """`scales`: of a tile, None for bf16 mode."""
    return _BF16 if scales is None else _INTERPRETED if toy else _FP8


def toy_shape(shape: Shape) -> Shape:
    """No larger than interpret mode computes in seconds."""
    return dataclasses.replace(
        shape,
        tiles=min(shape.tiles, 2),
        query_tiles=None if shape.query_tiles is None else 1,
        heads=2 if shape.table == "per_head" else 1,
        batch=min(shape.batch, 2),
    )


def _rel_l2(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def poison(toy: bool) -> None:
    """Fills the memory that JAX will hand out next with NaN in every float dtype: an element that isn't written shows."""
    stats = {} if toy else jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 2**24) - stats.get("bytes_in_use", 0)
    chunk = 2**22 if toy else 2**28
    held = []
    for _ in range(int(0.8 * free) // chunk):
        held.append(jnp.full(chunk // 4, 0xFFFFFFFF, jnp.uint32))
    jax.block_until_ready(held)
    for x in held:
        x.delete()


def _specification(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    (q, k, v), pattern = make_call(shape)
    out, lse = jax.jit(reference.attention)(q, k, v, pattern)
    return np.asarray(out, np.float32), np.asarray(lse)


def write_references(folder: pathlib.Path) -> None:
    """The specification's results for every shape, beside their final names and renamed. For a process of its own, on a CPU."""
    for group, shapes in SHAPES.items():
        for name, shape in shapes.items():
            out, lse = _specification(shape)
            part = folder / f".{group} {name}.npz"
            np.savez(part, out=out, lse=lse)
            part.rename(folder / f"{group} {name}.npz")


def _reference(toy: bool, group: str, name: str, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """From the folder, once it is there; computed here where nobody computes it."""
    path = None if toy else reference_file(f"{group} {name}.npz", _PATIENCE)
    if path is None:
        return _specification(shape)
    with np.load(path) as stored:
        return stored["out"], stored["lse"]


def forward(
    toy: bool, *, group: str, name: str, fused: bool = True, options: dict[str, Any] | None = None
) -> Iterator[dict[str, Any] | None]:
    """The forward kernel on a shape: first as it is built where a wait of seconds is an error and no hang, then as it is used.

    Args:
      fused: False leaves quantization to XLA. options: of the config, beside the shape's own.
    """
    shape = SHAPES[group][name]
    shape = toy_shape(shape) if toy else shape
    (q, k, v), pattern = make_call(shape)
    config = dataclasses.replace(shape.config, **options or {})

    def call(q, k, v):
        if fused:
            return fwd_sm90.forward(q, k, v, pattern, config=config)
        operands = quantize_sm90.by_xla(q, k, v, pattern)
        return fwd_sm90.attention(operands, pattern, batch=shape.batch, dtype=q.dtype, config=config)

    builds = {}
    if not toy:  # interpret mode has a deadline of its own, and one kind of wait
        with mosaic.impatient_waits():
            builds[f"{name}, waits that give up"] = compiled(toy, call, q, k, v)
    builds[name] = compiled(toy, call, q, k, v)
    want = _reference(toy, group, name, shape)
    yield None
    for part, run in builds.items():
        yield {"part": part, **_compared(toy, run, (q, k, v), pattern, want), "shape": dataclasses.asdict(shape)}


def _compared(toy: bool, run: Any, qkv: Any, pattern: Any, want: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    runs = []
    with kernels(toy):
        for _ in range(2 if toy else 3):
            poison(toy)
            runs.append([np.asarray(x) for x in run(*qkv)])
    out, lse = runs[0]
    valid = np.asarray(pattern.q_valid)
    out32 = out.astype(np.float32)
    norm = np.linalg.norm(want[0][:, valid], axis=-1)
    row_error = np.linalg.norm(out32[:, valid] - want[0][:, valid], axis=-1) / norm
    result = {
        "rel_l2": _rel_l2(out32, want[0]),
        "rel_l2_lse": _rel_l2(lse, want[1]),
        "worst_row": float(row_error.max()),
        "finite": bool(np.isfinite(out32).all() and np.isfinite(lse).all()),
        "padding_is_0": not (out32[:, ~valid].any() or lse[..., ~valid].any()),
        "repeats_bitwise": all(_same_bytes(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True)),
    }
    allowed = bars(None if pattern.tokens_per_scale is None else pattern.tile_size // pattern.tokens_per_scale, toy)
    near = result["rel_l2"] <= allowed.out and result["rel_l2_lse"] <= allowed.lse
    ok = bool(near and result["finite"] and result["padding_is_0"] and result["repeats_bitwise"])
    return {"ok": ok, **result}


def _same_bytes(a: Any, b: Any) -> bool:
    """Bitwise, NaN and the sign of 0 included."""
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Quotients that lie next to a boundary may fall on either side of it below 2^-14 of the maximum (`reference.codes_of`).
_TIES = 1e-4


def quantization(toy: bool, *, tile: int, scales: int, dim: int, padding: str) -> Iterator[dict[str, Any] | None]:
    """The fused passes against plain XLA: the same bits, but for a documented share of ties in the codes."""
    shape = Shape(tile=tile, scales=scales, head_dim=dim, padding=padding, batch=2, heads=3)
    (q, k, v), pattern = make_call(toy_shape(shape) if toy else shape)
    run = compiled(toy, functools.partial(quantize_sm90.quantize, pattern=pattern), q, k, v)
    plain = compiled(toy, functools.partial(quantize_sm90.by_xla, pattern=pattern), q, k, v)
    yield None
    with kernels(toy):
        poison(toy)
        fused = [np.asarray(x) for x in run(q, k, v)]
    different: dict[str, Any] = {}
    ok = True
    for name, a, b in zip(quantize_sm90.Operands._fields, fused, map(np.asarray, plain(q, k, v)), strict=True):
        if not _same_bytes(a, b):
            a32, b32 = a.astype(np.float32), b.astype(np.float32)
            share, error = float((a32 != b32).mean()), _rel_l2(a32, b32)
            different[name] = {"share": share, "of": int(a.size), "rel_l2": error}
            ok = ok and a.dtype == reference.FP8 and share <= _TIES and error <= 1e-6
    yield {"part": f"tile {tile}, {scales} scales, head dim {dim}, {padding}", "ok": ok, "different": different}


def operation(toy: bool, *, implementation: str, name: str) -> Iterator[dict[str, Any] | None]:
    """The public op with its gradients against the specification. `implementation`: 'portable', or 'auto', the Hopper kernel."""
    shape = toy_shape(OPERATIONS[name]) if toy else OPERATIONS[name]
    if implementation == "portable" and shape.dtype == "float32" and not toy:
        shape = dataclasses.replace(shape, scales=None)
    (q, k, v), pattern = make_call(shape)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape, np.float32), q.dtype)

    def both_ways(name, q, k, v, d_out):
        # Inside scan, as the denoising loop has it.
        def body(carry, _):
            out, vjp = jax.vjp(
                lambda q, k, v: block_sparse.block_sparse_attention(q, k, v, pattern, implementation=name), q, k, v
            )
            return carry, (out, *vjp(d_out))

        return [x[0] for x in jax.lax.scan(body, 0, None, length=1)[1]]

    run, specified = (
        compiled(toy, functools.partial(both_ways, which), q, k, v, d_out) for which in (implementation, "reference")
    )
    yield None
    got, again, want = (f(q, k, v, d_out) for f in (run, run, specified))
    chosen = block_sparse.choose(implementation, CallShape.of(pattern, head_dim=shape.head_dim, dtype=q.dtype))
    errors = {n: _rel_l2(a, b) for n, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True)}
    repeats = all(_same_bytes(a, b) for a, b in zip(got, again, strict=True))
    allowed = bars(shape.scales, toy)
    near = all(error <= (allowed.out if n == "out" else allowed.gradients) for n, error in errors.items())
    yield {
        "part": name,
        "ok": near and repeats,
        "implementation": chosen,
        "rel_l2": errors,
        "repeats_bitwise": repeats,
    }


def memory_checker(toy: bool) -> Iterator[dict[str, Any] | None]:
    """compute-sanitizer's memcheck over the smallest shape, every buffer an allocation of its own."""
    yield None
    if toy or shutil.which("compute-sanitizer") is None:
        yield {"not available": "needs a GPU" if toy else "no compute-sanitizer"}
        return
    case = {"name": "checked", "function": f"{__name__}:forward", "kwargs": {"group": "first", "name": "one tile"}}
    done = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-m",
         "benchmarks.gpu_cases.child", json.dumps({"toy": False, "cases": [case]})],
        env={**os.environ, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        input=json.dumps([case["name"]]) + "\n", capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    tail = (done.stdout + done.stderr)[-1500:]
    if "not supported" in tail:
        yield {"not available": tail}
        return
    yield {"ok": done.returncode == 0, "tail": tail}
