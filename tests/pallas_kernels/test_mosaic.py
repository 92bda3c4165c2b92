"""The one file that leans on jax's private interfaces stands on the installed jax; `make newest` runs this on the newest."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fwd_sm90, mosaic, registers
from pallas_kernels.tuning import ForwardConfig
from tests.pallas_kernels import attention_cases, interpreted


def test_the_installed_jax_was_checked():
    assert jax.__version__ in mosaic.VERSIONS_CHECKED, (
        f"jax {jax.__version__} is new to pallas_kernels/mosaic.py: run tests/pallas_kernels on it, then add it to VERSIONS_CHECKED"
    )


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
    with mosaic.interpret():
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


def kernel_that_waits(x):
    def body(x_ref, out_ref, x_smem, barrier):
        plgpu.copy_gmem_to_smem(x_ref, x_smem, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(x_smem, out_ref)
        plgpu.wait_smem_to_gmem(0)

    scratch = [plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()]
    return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), scratch_types=scratch)(x)


def test_waits_give_up_inside_and_not_outside():
    """Of one jitted function, lowered before, inside and after: jit's caches don't take one program for the other."""
    fn, spec = jax.jit(kernel_that_waits), jax.ShapeDtypeStruct((128,), jnp.float32)

    def lowered():
        return fn.trace(spec).lower(lowering_platforms=("cuda",)).as_text()

    before = lowered()
    with mosaic.impatient_waits(3):
        inside, again = lowered(), lowered()
    with mosaic.impatient_waits(0.5):
        sooner = lowered()
    assert inside == again
    # The text holds the kernel's whole code, and the key of the persistent compilation cache holds the text.
    assert "add.u64 deadline, deadline, 3000000000;" in inside
    assert "add.u64 deadline, deadline, 500000000;" in sooner
    for text in (inside, sooner):
        assert "trap;" in text
    assert "trap;" not in before
    assert lowered() == before


def test_programs_with_impatient_waits_are_compiled_apart():
    traced = []
    fn = jax.jit(lambda x: traced.append(x) or x + 1)
    for _ in range(2):
        fn(1.0)
        with mosaic.impatient_waits(3):
            fn(1.0)
        with mosaic.impatient_waits(2):
            fn(1.0)
    assert len(traced) == 3


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_waits_of_no_time_or_all_time_are_refused(seconds):
    words = "is not a positive time; a wait takes microseconds, use 3"
    with pytest.raises(ValueError, match=words), mosaic.impatient_waits(seconds):
        pass


def test_interpret_leaves_jax_as_it_was():
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret

    interpreter = jaxpr_interpret.JaxprInterpreter
    before = dict(vars(interpreter))
    with mosaic.interpret():
        assert dict(vars(interpreter)) != before
    assert dict(vars(interpreter)) == before


@pytest.mark.parametrize(
    "case",
    [
        attention_cases.Case(tile=128, tiles=2, scales=2, padding="tail"),
        attention_cases.Case(tile=128, tiles=3, inputs="rising", config=ForwardConfig(stages=2, promote_every=2)),
    ],
    ids=["default", "vote"],
)
def test_the_forward_kernel_lowers_and_runs_on_this_jax(case):
    call = functools.partial(fwd_sm90.forward, config=case.config)
    traced = jax.jit(call).trace(*attention_cases.make_inputs(case).args(case))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert interpreted.run(attention_cases.errors, case)["out"] <= 4e-3
