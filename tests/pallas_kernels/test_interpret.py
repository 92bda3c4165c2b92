"""Interpret mode knows what jax's own doesn't: operands in registers, and reads of the tensor cores that race."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.interpret import interpret
from pallas_kernels.sm90 import registers
from tests.pallas_kernels import interpreted


def relabel_then_multiply(order: str = "right"):
    """P @ V + 1: P through `to_fp8_operand`, V copied into one slot twice, the second time after its use.

    `order` "early": the slot is filled again before the matmul was waited for. "unwaited": V is read before it has arrived.
    """
    rng = np.random.default_rng(0)
    p = rng.random((64, 128), np.float32)
    v = rng.standard_normal((128, 64)).astype(jnp.float8_e4m3fn)

    def body(p_ref, v_ref, out_ref, v_smem, out_smem, barrier, again):
        plgpu.copy_gmem_to_smem(v_ref, v_smem, barrier)
        if order != "unwaited":
            plgpu.barrier_wait(barrier)
        p = registers.to_fp8_operand(plgpu.load(p_ref, layout=plgpu.Layout.WGMMA, optimized=False))

        def multiply(acc):
            plgpu.wgmma(acc, p, v_smem.transpose((1, 0)))
            if order == "early":
                plgpu.copy_gmem_to_smem(v_ref, v_smem, again)

        start = plgpu.layout_cast(jnp.ones((64, 64), jnp.float32), plgpu.Layout.WGMMA)
        out_smem[...] = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(start))
        if order == "right":
            plgpu.copy_gmem_to_smem(v_ref, v_smem, again)
        if order == "unwaited":
            plgpu.barrier_wait(barrier)
        else:
            plgpu.barrier_wait(again)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref)
        plgpu.wait_smem_to_gmem(0)

    def smem(shape, dtype, columns):
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[
            smem((64, 128), jnp.float8_e4m3fn, 128),
            smem((64, 64), jnp.float32, 32),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
    )
    in_order = np.ascontiguousarray(v[registers.kv_order(128)].T)
    jax.jit(kernel).trace(p, in_order).lower(lowering_platforms=("cuda",))
    with interpret():
        got = np.asarray(kernel(p, in_order))
    want = p.astype(jnp.float8_e4m3fn).astype(np.float64) @ v.astype(np.float64) + 1
    return float(np.abs(got - want).max())


def test_relabelled_registers_multiply_a_permuted_v():
    assert interpreted.run(relabel_then_multiply) <= 1e-5


@pytest.mark.parametrize("order", ["early", "unwaited"])
def test_reads_of_the_tensor_cores_race_with_copies(order):
    """jax's interpret mode knows neither: its matmul reads at once, and unseen by the race detector."""
    with pytest.raises(AssertionError, match="RACE DETECTED"):
        interpreted.run(relabel_then_multiply, order)


def test_interpret_leaves_jax_as_it_was():
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret

    interpreter = jaxpr_interpret.JaxprInterpreter
    before = dict(vars(interpreter))
    with interpret():
        assert dict(vars(interpreter)) != before
    assert dict(vars(interpreter)) == before
