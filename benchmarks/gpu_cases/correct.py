"""Are the kernels right? Against the specification, on poisoned memory, twice."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_cases.shapes import SHAPES, Shape, make_call
from benchmarks.gpu_cases.timing import kernels
from pallas_kernels import block_sparse, fwd_sm90, quantize_sm90, reference

BAR = 1e-2  # relative L2, until the first measurement sets it


def _toy(shape: Shape) -> Shape:
    """No larger than interpret mode computes in seconds."""
    return dataclasses.replace(
        shape,
        tiles=min(shape.tiles, 2),
        query_tiles=None if shape.query_tiles is None else 1,
        heads=min(shape.heads, 2),
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


def forward(toy: bool, *, group: str, fused: bool = True, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The forward kernel on a group of shapes. `fused`: False leaves quantization to XLA."""
    for name, shape in SHAPES[group].items():
        if names is None or name in names:
            yield {"part": name, **_forward(toy, _toy(shape) if toy else shape, fused)}


def _forward(toy: bool, shape: Shape, fused: bool) -> dict[str, Any]:
    (q, k, v), pattern = make_call(shape)

    def call(q, k, v):
        if fused:
            return fwd_sm90.forward(q, k, v, pattern, config=shape.config)
        operands = quantize_sm90.by_xla(q, k, v, pattern)
        return fwd_sm90.attention(operands, pattern, batch=shape.batch, dtype=q.dtype, config=shape.config)

    runs = []
    with kernels(toy):
        run = jax.jit(call)
        for _ in range(2 if toy else 3):
            poison(toy)
            runs.append([np.asarray(x) for x in run(q, k, v)])
    out, lse = runs[0]
    want, want_lse = jax.jit(lambda q, k, v: reference.attention(q, k, v, pattern))(q, k, v)
    valid = np.asarray(pattern.q_valid)
    out32 = out.astype(np.float32)
    want32 = np.asarray(want, np.float32)
    norm = np.linalg.norm(want32[:, valid], axis=-1)
    row_error = np.linalg.norm(out32[:, valid] - want32[:, valid], axis=-1) / norm
    result = {
        "rel_l2": _rel_l2(out32, want32),
        "rel_l2_lse": _rel_l2(lse, want_lse),
        "worst_row": float(row_error.max()),
        "finite": bool(np.isfinite(out32).all() and np.isfinite(lse).all()),
        "padding_is_0": not (out32[:, ~valid].any() or lse[..., ~valid].any()),
        "repeats_bitwise": all(_same_bytes(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True)),
    }
    near = result["rel_l2"] <= BAR and result["rel_l2_lse"] <= BAR
    ok = bool(near and result["finite"] and result["padding_is_0"] and result["repeats_bitwise"])
    return {"ok": ok, **result, "shape": dataclasses.asdict(shape)}


def _same_bytes(a: Any, b: Any) -> bool:
    """Bitwise, NaN and the sign of 0 included."""
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def quantization(toy: bool) -> Iterator[dict[str, Any]]:
    """The fused passes against plain XLA, bit by bit."""
    for tile, scales, dim, padding in (
        (256, 1, 128, "tail"),
        (256, 4, 128, "groups"),
        (256, 2, 64, "scattered"),
        (128, 2, 128, "single"),
        (384, 3, 128, "scattered"),
        (384, 1, 64, "groups"),
    ):
        shape = Shape(tile=tile, scales=scales, head_dim=dim, padding=padding, batch=2, heads=3)
        (q, k, v), pattern = make_call(_toy(shape) if toy else shape)
        with kernels(toy):
            poison(toy)
            run = jax.jit(functools.partial(quantize_sm90.quantize, pattern=pattern))
            fused = [np.asarray(x) for x in run(q, k, v)]
        plain = jax.jit(functools.partial(quantize_sm90.by_xla, pattern=pattern))(q, k, v)
        different = {}
        for name, a, b in zip(quantize_sm90.Operands._fields, fused, map(np.asarray, plain), strict=True):
            if not _same_bytes(a, b):
                a, b = a.astype(np.float32), b.astype(np.float32)
                different[name] = {"share": float((a != b).mean()), "of": int(a.size), "rel_l2": _rel_l2(a, b)}
        part = f"tile {tile}, {scales} scales, head dim {dim}, {padding}"
        yield {"part": part, "ok": not different, "different": different}


def portable(toy: bool, *, implementation: str) -> Iterator[dict[str, Any]]:
    """The public op with its gradients against the specification. `implementation`: 'portable', or 'auto', the Hopper kernel."""
    if toy and implementation == "auto":
        yield {"part": "all", "not available": "needs a GPU"}
        return
    for name, shape in {
        "fp8": Shape(tiles=6, padding="scattered", scales=2),
        "fp8, per head": Shape(tiles=6, heads=3, table="per_head", batch=2),
        "bf16": Shape(tiles=6, scales=None),
        "float32": Shape(tiles=4, dtype="float32"),
    }.items():
        small = _toy(shape) if toy else shape
        if implementation == "portable" and shape.dtype == "float32" and not toy:
            small = dataclasses.replace(small, scales=None)
        yield {"part": name, **_op(small, implementation)}


def _op(shape: Shape, implementation: str) -> dict[str, Any]:
    (q, k, v), pattern = make_call(shape)
    arguments = {
        "key_tiles": pattern.key_tiles,
        "counts": pattern.counts,
        "valid": pattern.k_valid,
        "q_valid": pattern.q_valid,
        "tokens_per_scale": pattern.tokens_per_scale,
    }
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape, np.float32), q.dtype)

    def both_ways(name, q, k, v, d_out):
        # Inside scan, as the denoising loop has it.
        def body(carry, _):
            out, vjp = jax.vjp(
                lambda q, k, v: block_sparse.block_sparse_attention(q, k, v, **arguments, implementation=name), q, k, v
            )
            return carry, (out, *vjp(d_out))

        return [x[0] for x in jax.lax.scan(body, 0, None, length=1)[1]]

    got = jax.jit(lambda *x: both_ways(implementation, *x))(q, k, v, d_out)
    again = jax.jit(lambda *x: both_ways(implementation, *x))(q, k, v, d_out)
    want = jax.jit(lambda *x: both_ways("reference", *x))(q, k, v, d_out)
    chosen = block_sparse.choose(
        implementation,
        head_dim=shape.head_dim,
        dtype=q.dtype,
        tile_size=shape.tile,
        tokens_per_scale=shape.tokens_per_scale,
    )
    errors = {n: _rel_l2(a, b) for n, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True)}
    repeats = all(_same_bytes(a, b) for a, b in zip(got, again, strict=True))
    return {
        "ok": bool(all(e <= BAR for e in errors.values()) and repeats),
        "implementation": chosen,
        "rel_l2": errors,
        "repeats_bitwise": repeats,
    }


def memory_checker(toy: bool) -> dict[str, Any]:
    """compute-sanitizer's memcheck over the smallest shape, every buffer an allocation of its own."""
    if toy:
        return {"not available": "needs a GPU"}
    if shutil.which("compute-sanitizer") is None:
        return {"not available": "no compute-sanitizer"}
    asked = {"function": "benchmarks.gpu_cases.correct:forward", "toy": False, "kwargs": {"group": "first"}}
    done = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-m",
         "benchmarks.gpu_cases.child", json.dumps(asked)],
        env={**os.environ, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    tail = (done.stdout + done.stderr)[-1500:]
    if "not supported" in tail:
        return {"not available": tail}
    return {"ok": done.returncode == 0, "tail": tail}
