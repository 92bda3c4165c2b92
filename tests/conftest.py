"""Strict JAX settings for every test, set before jax is imported."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of these tests is LLVM's, which takes a third of it for code that isn't optimized and is as right.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
# Threads of XLA's pools, by default as many as there are cores: a collective blocks one for each device until all have come, and
# eight devices on two cores waited for each other for ever, once in some ten runs of a mesh's tests.
os.environ.setdefault("NPROC", "32")
# Never the user's cache: a stale entry there must not decide a test.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="fps_jax_xla_"))
os.environ.pop("FPS_TUNED_TABLE", None)  # nor a table of the user's

import jax

jax.config.update("jax_cpu_enable_async_dispatch", False)  # one program after the other, for the same reason
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
