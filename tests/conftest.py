"""Strict JAX settings for every test, set before jax is imported."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of these tests is LLVM's, which takes a third of it for code that isn't optimized and is as right.
# Eight devices on two cores may wait for each other longer than XLA does before it ends the process (40 s), where all is busy.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
# Never the user's cache: a stale entry there must not decide a test.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="fps_jax_xla_"))
os.environ.pop("FPS_TUNED_TABLE", None)  # nor a table of the user's

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
