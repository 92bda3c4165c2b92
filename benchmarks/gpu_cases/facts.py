"""The machine: names, versions, clocks, and the two ceilings that shares mean something against."""

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_cases.results import NOT_MEASURED
from benchmarks.gpu_cases.timing import BF16_LIMIT, FP8_LIMIT, median_seconds, rates

_QUERY = "name,uuid,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
_COMMANDS = {
    "gpu": ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"],
    "ptxas": ["ptxas", "--version"],
    "compute_sanitizer": ["compute-sanitizer", "--version"],
}


def command_output(command: list[str]) -> str:
    """What a command prints, or why it can't."""
    if shutil.which(command[0]) is None:
        return f"no {command[0]}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "no answer in 30 s"
    return (done.stdout or done.stderr).strip()[-600:]


def machine(toy: bool) -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

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
        "platform_version": device.client.platform_version,
        "versions": versions,
    }
    n = 64 if toy else 8192
    a, b = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
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


def torch_matmuls(toy: bool) -> Iterator[dict[str, Any]]:
    """cuBLAS through torch, which has FP8."""
    if toy:
        yield {"part": "fp8 matmul", "not available": "needs a GPU"}
        return
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks.gpu_cases.baselines import torch_seconds

    n = 8192
    yield {"part": "versions", "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    a, b = (torch.randn(n, n, device="cuda") for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    yield {"part": "bf16 matmul", "n": n, **rates(torch_seconds(lambda: a16 @ b16), 2 * n**3, BF16_LIMIT)}
    a8, b8 = (
        a.to(torch.float8_e4m3fn),
        b.to(torch.float8_e4m3fn).t(),
    )  # the second operand by columns, as cuBLAS wants it
    one = torch.ones((), device="cuda")
    for fast in (True, False):  # False: sums promoted to float32 on the way

        def matmul(fast: bool = fast) -> Any:
            return torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)

        yield {
            "part": f"fp8 matmul{', fast accumulation' if fast else ''}",
            "n": n,
            **rates(torch_seconds(matmul), 2 * n**3, FP8_LIMIT),
        }
