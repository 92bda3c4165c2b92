"""Does sparse attention on a CPU cost what its density says? Speed, and memory forward and backward.

    python -m benchmarks.attention_cpu            # about 5 minutes on 2 cores, 3 GB
    python -m benchmarks.attention_cpu --repeats 7

One head, head dim 128, float32, grid (21, 30, 52), no quantization. The baseline is the faster of chunked dense attention
(32,760 tokens) and our `portable` with the whole grid (34,560 stored), measured in the same run, in turns. Peak memory is that of a
process that runs forward and backward once at (21, 45, 80).
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import write
from fps_jax import AttentionPlan, attend
from fps_jax.attention.attend import dense_attention
from fps_jax.sizes import Shape3

GRID, LARGE, HEAD_DIM = (21, 30, 52), (21, 45, 80), 128
WINDOWS = {"0.10": (2, 3, 2), "0.20": (3, 3, 3), "0.33": (3, 3, 5)}


def operands(grid: Shape3) -> list[jax.Array]:
    """q, k, v and the output's cotangent, raster order."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((1, int(np.prod(grid)), 1, HEAD_DIM), np.float32)) for _ in range(4)]


def both_ways(function: Callable) -> tuple[Callable, Callable]:
    """The jitted function, and it with its gradients."""

    def forward_backward(q, k, v, d_out):
        out, vjp = jax.vjp(function, q, k, v)
        return out, vjp(d_out)

    return jax.jit(lambda q, k, v, d_out: function(q, k, v)), jax.jit(forward_backward)


def measure(cases: dict[str, tuple[Callable, list]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every case, the cases taking turns, after a first call each that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, (function, arguments) in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if turn:
                seconds[name].append(round(time.perf_counter() - start, 4))
        print(f"turn {turn} of {repeats}", flush=True)
    return seconds


def peak_memory() -> None:
    """Forward and backward at the large grid; prints the peak in MB."""
    plan = AttentionPlan.build(LARGE, window=(3, 3, 7), quantize=False)
    x = [plan.to_tiles(a) for a in operands(LARGE)]
    jax.block_until_ready(both_ways(functools.partial(attend, plan=plan, implementation="portable"))[1](*x))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--peak-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory:
        peak_memory()
        return

    raster = operands(GRID)
    functions = {"chunked dense": (dense_attention, raster)}
    plans = {"portable, whole grid": AttentionPlan.build(GRID, quantize=False)}
    plans |= {f"portable, {d}": AttentionPlan.build(GRID, window=w, quantize=False) for d, w in WINDOWS.items()}
    for name, plan in plans.items():
        functions[name] = (
            functools.partial(attend, plan=plan, implementation="portable"),
            [plan.to_tiles(x) for x in raster],
        )
    results = {}
    for index, direction in enumerate(("forward", "forward and backward")):
        cases = {name: (both_ways(function)[index], arguments) for name, (function, arguments) in functions.items()}
        seconds = measure(cases, options.repeats)
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        baseline = min(("chunked dense", "portable, whole grid"), key=lambda name: medians[name])
        results[direction] = {"baseline": baseline, "seconds": seconds, "median_s": medians, "speed_up": {}}
        for density in WINDOWS:
            name = f"portable, {density}"
            speed_up, exact = medians[baseline] / medians[name], plans[name].density
            results[direction]["speed_up"][density] = {
                "window": plans[name].window,
                "density": round(exact, 4),
                "speed_up": round(speed_up, 2),
                "share_of_1_over_density": round(speed_up * exact, 3),
            }
        print(json.dumps({k: v for k, v in results[direction].items() if k != "seconds"}, indent=1), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attention_cpu", "--peak-memory"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    write(
        "attention_cpu",
        {
            "claim": "block-sparse attention on a CPU is faster by nearly 1 / density, forward and backward, in little memory",
            "case": f"1 head, head dim {HEAD_DIM}, float32, grid {GRID}, tile {plans['portable, whole grid'].tile}, not quantized",
            **results,
            "peak_memory_mb": {
                "grid": LARGE,
                "window": (3, 3, 7),
                "forward_and_backward": round(float(done.stdout), 0),
            },
        },
    )


if __name__ == "__main__":
    main()
