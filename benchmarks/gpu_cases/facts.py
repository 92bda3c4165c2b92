"""The machine: names, versions, clocks, and the two ceilings that shares mean something against."""

import importlib.metadata
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_cases.results import NOT_MEASURED
from benchmarks.gpu_cases.timing import BF16_LIMIT, FP8_LIMIT, median_seconds, rates

_QUERY = "name,uuid,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
_COMMANDS = {
    "gpu": ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"],
    "ptxas": ["ptxas", "--version"],
    "ncu": ["ncu", "--version"],
    "compute_sanitizer": ["compute-sanitizer", "--version"],
}
_SAMPLED = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")


def command_output(command: list[str]) -> str:
    """What a command prints, or why it can't."""
    if shutil.which(command[0]) is None:
        return f"no {command[0]}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "no answer in 30 s"
    return (done.stdout or done.stderr).strip()[-600:]


def add_cuda_to_path() -> None:
    """ptxas, ncu and compute-sanitizer of a CUDA toolkit that isn't on the path."""
    folders = [p / "bin" for p in sorted(pathlib.Path("/usr/local").glob("cuda*"), reverse=True)]
    found = [str(p) for p in folders if p.is_dir()]
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *found])


class Clocks:
    """nvidia-smi, twice a second beside the benchmark: what clocks and power were while it measured."""

    def __init__(self):
        self._process = None
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", f"--query-gpu={','.join(_SAMPLED)}", "--format=csv,noheader,nounits", "-lms", "500"]
            self._out = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `stop`
            self._process = subprocess.Popen(query, stdout=self._out, stderr=subprocess.DEVNULL)

    def stop(self) -> dict[str, Any]:
        """Of the samples that drew at least half of the most power: median, least and most of each; how many there were."""
        if self._process is None:
            return {"not available": "no nvidia-smi"}
        self._process.terminate()
        self._process.wait(20)
        with self._out:
            self._out.seek(0)
            text = self._out.read().decode(errors="replace")
        return summarize(text[: text.rfind("\n") + 1].splitlines())  # the last may be cut off


def summarize(lines: list[str]) -> dict[str, Any]:
    """Of nvidia-smi's lines of `_SAMPLED`, as `Clocks.stop` says."""
    rows = []
    for line in lines:
        fields = [x.strip() for x in line.split(",")]
        try:
            rows.append((*(float(x) for x in fields[:3]), fields[3]))
        except (ValueError, IndexError):
            continue  # a sample that was cut off, or isn't available
    if not rows:
        return {"not available": "no sample"}
    most = max(r[1] for r in rows)
    busy = [r for r in rows if r[1] >= most / 2]
    found: dict[str, Any] = {"samples": len(rows), "busy": len(busy)}
    for i, name in enumerate(("sm_mhz", "watts", "celsius")):
        values = [r[i] for r in busy]
        found[name] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    found["reasons"] = {reason: sum(r[3] == reason for r in busy) for reason in sorted({r[3] for r in busy})}
    return found


def machine(toy: bool) -> Iterator[dict[str, Any] | None]:
    import jax
    import jax.numpy as jnp

    n = 64 if toy else 8192
    a, b = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    yield None
    yield {"part": "commands", **{name: command_output(command) for name, command in _COMMANDS.items()}}
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "torch", "triton", "nvidia-cudnn-cu13", "nvidia-cublas")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = jax.devices()[0]
    yield {
        "part": "jax",
        "device": device.device_kind,
        "platform": device.platform,
        "compute_capability": str(getattr(device, "compute_capability", None)),
        "core_count": getattr(device, "core_count", None),
        "platform_version": device.client.platform_version,
        "versions": versions,
    }
    matmul = jax.jit(lambda a, b: a @ b)
    yield {"part": "bf16 matmul", "n": n, **rates(median_seconds(lambda: matmul(a, b), toy), 2 * n**3, BF16_LIMIT)}
    yield {"part": "copy", **copy_bandwidth(toy)}


def copy_bandwidth(toy: bool) -> dict[str, Any]:
    """Bytes read and written a second by a pass that adds 1 to 1 GiB of bf16."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1024 if toy else 2**29,), jnp.bfloat16)
    add = jax.jit(lambda x: x + jnp.ones((1,), x.dtype))
    timing = median_seconds(lambda: add(x), toy)
    seconds = timing["seconds"]
    return {**timing, "TB_s": NOT_MEASURED if isinstance(seconds, str) else 2 * x.nbytes / seconds / 1e12}


def torch_matmuls(toy: bool) -> Iterator[dict[str, Any] | None]:
    """cuBLAS through torch, which has FP8."""
    if toy:
        yield None
        yield {"part": "fp8 matmul", "not available": "needs a GPU"}
        return
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks.gpu_cases.baselines import torch_seconds

    yield None
    n = 8192
    yield {"part": "versions", "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    a, b = (torch.randn(n, n, device="cuda") for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    yield {"part": "bf16 matmul", "n": n, **rates(torch_seconds(lambda: a16 @ b16), 2 * n**3, BF16_LIMIT)}
    # The second operand by columns, as cuBLAS wants it.
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")
    for fast in (True, False):  # False: sums promoted to float32 on the way

        def matmul(fast: bool = fast) -> Any:
            return torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)

        yield {
            "part": f"fp8 matmul{', fast accumulation' if fast else ''}",
            "n": n,
            **rates(torch_seconds(matmul), 2 * n**3, FP8_LIMIT),
        }
