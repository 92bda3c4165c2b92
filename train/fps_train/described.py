"""GPUs that are described, not there: programs are compiled for them by XLA's CUDA plugin, and never run. Imports no jax.

GEMM and convolution algorithms aren't autotuned without the device, so their workspace is indicative.
"""

import dataclasses
import importlib.util
import os
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

# What XLA has to know of a device. Numbers: NVIDIA's datasheets and CUDA's own queries.
_CONFIG = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_address_bits: 64
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation" name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}" """
NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class DeviceKind:
    """A GPU by its datasheet.

    Attributes:
      memory: bytes.
      bandwidth: bytes/s of it.
      link: bytes/s that a GPU sends within a node of eight.
      network: bytes/s that a GPU sends to other nodes: a network card of 400 Gbit/s for each, as NVIDIA's DGX H100 and H200 have
        them. Rented nodes may have less.
    """

    name: str
    memory: int
    bandwidth: int
    link: float = 450e9
    network: float = 50e9

    @property
    def target_config(self) -> str:
        return _CONFIG.format(**dataclasses.asdict(self))


KINDS = {
    "h100": DeviceKind("NVIDIA H100 80GB HBM3", 85_017_100_288, 3_350_000_000_000),
    "h200": DeviceKind("NVIDIA H200", 151_397_597_184, 4_800_000_000_000),
}


def parse_devices(text: str) -> tuple[DeviceKind, int]:
    """Kind and number from 'h200:64'; a kind alone is one device. Raises ValueError."""
    name, _, count = text.partition(":")
    count = count or "1"
    if name not in KINDS or not (count.isascii() and count.isdigit()) or int(count) < 1:
        raise ValueError(f"devices={text!r} is no kind and number; give one of {', '.join(KINDS)}, as in h200:8")
    if int(count) > NODE and int(count) % NODE:
        raise ValueError(f"devices={text!r}: {count} is no whole number of nodes of {NODE}; give a multiple")
    return KINDS[name], int(count)


def prepare_process() -> None:
    """Makes this process one that compiles for GPUs, before jax is imported.

    cuDNN's attention is lowered with the help of libcudnn: where its wheel isn't on the library path, the process starts again with
    it there. Raises ValueError where the packages for it aren't installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # the CUDA plugin then registers for compiling only
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cudnn = importlib.util.find_spec("nvidia.cudnn") if importlib.util.find_spec("nvidia") else None
    if importlib.util.find_spec("jax_cuda13_plugin") is None or cudnn is None or not cudnn.submodule_search_locations:
        raise ValueError(
            "compiling for GPUs needs the offline-gpu extra; install it with pip install 'fps-jax[offline-gpu]' "
            "(.[offline-gpu] in a clone)"
        )
    lib = str(pathlib.Path(next(iter(cudnn.submodule_search_locations))) / "lib")
    paths = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if lib not in paths:
        os.environ["LD_LIBRARY_PATH"] = ":".join([lib, *filter(None, paths)])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def described_devices(kind: DeviceKind, count: int = 1) -> list[Any]:
    """`count` devices of a kind, node by node; for meshes and shardings of programs that are compiled only."""
    from jax.experimental import topologies

    topology = f"1x{count}x1" if count <= NODE else f"{count // NODE}x{NODE}x1"
    found = topologies.get_topology_desc(platform="cuda", target_config=kind.target_config, topology=topology)
    return list(found.devices)
