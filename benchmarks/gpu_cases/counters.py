"""Where the time of one launch goes, by the hardware's own counters: Nsight Compute over a forward at real size."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

_METRICS = {
    "seconds": "gpu__time_duration.sum",
    "cycles": "sm__cycles_elapsed.max",
    "tensor": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "tensor_gmma": "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",
    "tensor_any": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "special": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "fma": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "issue": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "instructions": "sm__inst_executed.sum",
    "shared": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}


def counters(toy: bool, *, size: str, density: float, scales: int | None) -> Iterator[dict[str, Any] | None]:
    """Shares of peak, %, of tensor cores, special-function units, issue slots, L2 and shared memory."""
    yield None
    if toy or shutil.which("ncu") is None:
        yield {"not available": "needs a GPU" if toy else "no ncu"}
        return
    done = subprocess.run(
        ["ncu", "--clock-control", "none", "--kernel-name", "regex:mosaic|pallas|body", "--launch-count", "1", "--csv",
         "--page", "raw", "--print-units", "base", "--metrics", ",".join(_METRICS.values()),
         sys.executable, "-m", "benchmarks.gpu_cases.counters", size, str(density), str(scales)],
        env=os.environ, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    found = read(done.stdout)
    if found is None:
        yield {"not available": (done.stdout + done.stderr)[-1200:]}
        return
    yield {"part": "launch", **found}


def read(report: str) -> dict[str, Any] | None:
    """Numbers of the first kernel of ncu's raw page; None where there is none."""
    lines = [line for line in report.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return None
    names, _, values = list(csv.reader(io.StringIO("\n".join(lines))))[:3]
    row = dict(zip(names, values, strict=False))
    found: dict[str, Any] = {"kernel": row.get("Kernel Name", "")[:80]}
    for name, metric in _METRICS.items():
        try:
            found[name] = float(row[metric].replace(",", ""))
        except (KeyError, ValueError):
            found[name] = row.get(metric, "not counted")
    if isinstance(found["seconds"], float):
        found["seconds"] *= 1e-9  # ncu's base unit of time is the nanosecond
    return found


def main() -> None:
    """The process under ncu, SIZE DENSITY SCALES [OPTIONS as JSON]: one launch.

    Quantized by XLA, so that the forward is the only kernel of ours.
    """
    import jax

    from benchmarks.gpu_cases import programs
    from benchmarks.gpu_cases.attention import config_of
    from pallas_kernels.sm90 import quantize as quantize_sm90

    size, density = sys.argv[1], float(sys.argv[2])
    scales = None if sys.argv[3] == "None" else int(sys.argv[3])
    task = programs.task_of(False, size, density, scales)
    options = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    kernel = programs.forward(False, size, density, scales, config_of(False, size, density, scales, options))
    operands = jax.jit(quantize_sm90.by_xla)(*task.inputs(), task.plan.pattern)
    jax.block_until_ready(kernel(operands))


if __name__ == "__main__":
    main()
