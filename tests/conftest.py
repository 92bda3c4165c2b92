"""Strict JAX settings for every test, set before jax is imported."""

import gc
import os
import pathlib
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of these tests is the compiler's. LLVM takes a third of its time for code that isn't optimized and is as right;
# XLA's newer emitter of fused loops sets MLIR up anew for each of them, half of the rest, and the one before it does without; a
# program cut into modules to be compiled at once is more work, and the other cores have tests of their own.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
# Threads of XLA's pool, by default as many as there are cores. Each collective that could run now blocks one, on each of the eight
# devices, and a program of a training step has dozens. Where they fill the pool, one that all wait for never gets a thread, and XLA
# ends the process after 40 s (seen in the stacks of a run that hung). 256 is the most that the pool takes.
os.environ.setdefault("NPROC", "256")
# NumPy's matmuls here are small and come from many threads at once: OpenBLAS's own threads would spend their time waiting for work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Never the user's cache: a stale entry there must not decide a test.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="fps_jax_xla_"))
os.environ.pop("FPS_TUNED_TABLE", None)  # nor a table of the user's

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A process may have 65,530 mapped regions (Linux's default), a compiled program has up to thousands, and XLA aborts where it gets
# no more.
_MAPS, _MANY = pathlib.Path("/proc/self/maps"), 25_000
_looked = {"at": 0.0}
# Traces make millions of objects that stay: Python's default, a look for garbage every 700, took a twentieth of the time.
gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def no_lines_of_waits(request, monkeypatch):
    """What a slow machine is told while it waits would stand beside the one line that tests look for."""
    if request.module.__name__.rpartition(".")[2] not in ("test_progress", "test_status"):
        monkeypatch.setattr("fps_jax.progress.LINE", 1e6)


def pytest_runtest_teardown() -> None:
    """Forgets the programs of earlier tests before they leave no room for those of the next."""
    if time.process_time() - _looked["at"] < 2:
        return  # counting takes 20 ms, most tests less, and what compiles takes seconds
    _looked["at"] = time.process_time()
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()
        gc.collect()
