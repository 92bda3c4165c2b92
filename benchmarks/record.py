"""Where benchmarks put their numbers: one JSON a claim, with the machine, the versions and the command that made it."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import sys
from typing import Any

from fps_jax.files import write_json

RESULTS = pathlib.Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "torch", "diffusers", "transformers")


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def environment() -> dict[str, Any]:
    """Machine, versions, command and date."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # Whole paths belong to one machine: their last part is enough to run it again.
    arguments = (os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:])
    script, home = pathlib.Path(sys.argv[0]).absolute(), pathlib.Path(__file__).parent
    script = script.relative_to(home) if script.is_relative_to(home) else script.name
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "command": " ".join(["python", os.path.join("benchmarks", script), *arguments]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def write(name: str, payload: dict[str, Any]) -> pathlib.Path:
    """Writes benchmarks/results/<name>.json with `environment` first, and says where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json({"environment": environment(), **payload}, path)
    print(f"written: {path}")
    return path
