"""What the kernels are made of, one thing more at each rung: where the kernels fail, the first rung that fails names the fault."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_cases.programs import compiled, kernels
from pallas_kernels import mosaic
from pallas_kernels.reference import FP8
from pallas_kernels.sm90.config import BLOCK_KV, BLOCK_Q
from pallas_kernels.sm90.registers import kv_order, to_fp8_operand
from pallas_kernels.sm90.shared_memory import swizzled

_DIM = 128
_accumulator = functools.partial(plgpu.WGMMAAccumulatorRef, dtype=jnp.float32)


def _draw(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    # Small whole numbers: every product and sum is exact in any precision.
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32), dtype)


def matmul(toy: bool) -> Iterator[dict[str, Any] | None]:
    """XLA alone."""
    a, b = _draw((256, 256), jnp.bfloat16, 0), _draw((256, 256), jnp.bfloat16, 1)
    run = compiled(toy, lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32), a, b)
    yield None
    want = np.asarray(a, np.float32) @ np.asarray(b, np.float32)
    yield {"part": "matmul", "ok": bool((np.asarray(run(a, b)) == want).all())}


def _checked(toy: bool, kernel: Any, inputs: list[jax.Array], want: np.ndarray) -> Iterator[dict[str, Any] | None]:
    # A wait that lasts seconds is an error and no hang, as on the rungs above.
    with contextlib.nullcontext() if toy else mosaic.impatient_waits():
        run = compiled(toy, kernel, *inputs)
    yield None
    with kernels(toy):
        got = np.asarray(run(*inputs), np.float32)
    yield {"ok": bool((got == want).all()), "different": float((got != want).mean())}


def _kernel(body: Any, out: Any, scratch: dict[str, Any]) -> Any:
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(1,),
        grid_names=("block",),
        num_threads=1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )


def copy(toy: bool) -> Iterator[dict[str, Any] | None]:
    """TMA: global to swizzled shared memory, through registers, and back."""
    x = _draw((BLOCK_Q, _DIM), jnp.bfloat16, 0)

    def body(x, out, x_smem, out_smem, barrier):
        plgpu.copy_gmem_to_smem(x, x_smem, barrier)
        plgpu.barrier_wait(barrier)
        out_smem[...] = plgpu.load(x_smem, (), layout=plgpu.Layout.WGMMA) * 2
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out)
        plgpu.wait_smem_to_gmem(0)

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    memory = swizzled(x.shape, x.dtype)
    kernel = _kernel(body, like, {"x_smem": memory, "out_smem": memory, "barrier": plgpu.Barrier()})
    yield from _checked(toy, kernel, [x], 2 * np.asarray(x, np.float32))


def scores(toy: bool) -> Iterator[dict[str, Any] | None]:
    """Q K of one warpgroup, both FP8 in shared memory."""
    q, k = _draw((BLOCK_Q, _DIM), FP8, 0), _draw((BLOCK_KV, _DIM), FP8, 1)

    def body(q, k, out, q_smem, k_smem, barriers):
        plgpu.copy_gmem_to_smem(q, q_smem, barriers.at[0])
        plgpu.copy_gmem_to_smem(k, k_smem, barriers.at[1])
        plgpu.barrier_wait(barriers.at[0])
        plgpu.barrier_wait(barriers.at[1])

        def multiply(acc):
            plgpu.wgmma(acc, q_smem, k_smem.transpose((1, 0)))
            return acc[...]

        out[...] = _scoped(multiply, (BLOCK_Q, BLOCK_KV))

    kernel = _kernel(
        body,
        jax.ShapeDtypeStruct((BLOCK_Q, BLOCK_KV), jnp.float32),
        {"q_smem": swizzled(q.shape, FP8), "k_smem": swizzled(k.shape, FP8), "barriers": plgpu.Barrier(num_barriers=2)},
    )
    want = np.asarray(q, np.float32) @ np.asarray(k, np.float32).T
    yield from _checked(toy, kernel, [q, k], want)


def values(toy: bool) -> Iterator[dict[str, Any] | None]:
    """P V of one warpgroup, P from the registers of an accumulator: their relabelling, and V's order of keys."""
    p, v = _draw((BLOCK_Q, BLOCK_KV), jnp.float32, 0), _draw((BLOCK_KV, _DIM), FP8, 1)
    stored = v[kv_order(BLOCK_KV)].T

    def body(p, v, out, v_smem, barrier):
        plgpu.copy_gmem_to_smem(v, v_smem, barrier)
        plgpu.barrier_wait(barrier)
        operand = to_fp8_operand(plgpu.load(p, (), layout=plgpu.Layout.WGMMA, optimized=False))

        def multiply(acc):
            plgpu.wgmma(acc, operand, v_smem.transpose((1, 0)))
            return acc[...]

        out[...] = _scoped(multiply, (BLOCK_Q, _DIM))

    kernel = _kernel(
        body,
        jax.ShapeDtypeStruct((BLOCK_Q, _DIM), jnp.float32),
        {"v_smem": swizzled(stored.shape, FP8), "barrier": plgpu.Barrier()},
    )
    want = np.asarray(p, np.float32) @ np.asarray(v, np.float32)
    yield from _checked(toy, kernel, [p, stored], want)


def _scoped(multiply: Any, shape: tuple[int, int]) -> Any:
    import jax.experimental.pallas as pl

    return pl.run_scoped(multiply, _accumulator(shape))
