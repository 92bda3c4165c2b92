"""Cases that misbehave, for the tests of the runner. Called in a process of their own."""

import os
import subprocess
import sys
import time
import types


def good(toy: bool, *, seconds: float = 1.5):
    yield None
    yield {"part": "good", "ok": True, "seconds": seconds}


def on_jax(toy: bool):
    import jax

    yield None
    yield {"part": "good", "ok": True, "on": jax.default_backend()}


def wrong(toy: bool):
    yield None
    yield {"part": "bad", "ok": False, "rel_l2": float("nan")}


def hang(toy: bool):
    """Says one thing, starts a process that would outlive it, and never ends."""
    yield None
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield {"part": "before", "child": child.pid}
    time.sleep(100)


def compile_long(toy: bool):
    """XLA takes six seconds."""
    import jax
    from jax._src import compiler
    from jax._src.lib import xla_client

    def compile_and_load(*_, **__):
        time.sleep(6)

    yield None
    module = jax.jit(lambda x: x).lower(1.0).compiler_ir()
    slow = types.SimpleNamespace(compile_and_load=compile_and_load)
    compiler.backend_compile_and_load(slow, module, None, xla_client.CompileOptions(), [])  # pyright: ignore
    yield {"part": "compiled", "ok": True}


def fail(toy: bool):
    yield None
    yield {"part": "before"}
    raise RuntimeError("no such\ninstruction")


def die(toy: bool):
    yield None
    yield {"part": "before"}
    print("out of memory", file=sys.stderr, flush=True)
    os._exit(7)


def trap(toy: bool):
    """After it the GPU never answers this process again."""

    def synchronize() -> None:
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")

    yield None
    yield {"part": "before"}
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(synchronize=synchronize))  # pyright: ignore
    raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")


def fail_early(toy: bool):
    raise ValueError("no such config")
    yield None


def die_early(toy: bool):
    os._exit(9)
    yield None


def never_ready(toy: bool):
    time.sleep(100)
    yield None


def environment(toy: bool):
    yield None
    names = {"platforms": "JAX_PLATFORMS", "own": "OF_THE_FAMILY", "cache": "JAX_COMPILATION_CACHE_DIR"}
    yield {"part": "environment", **{what: os.environ.get(name) for what, name in names.items()}}
