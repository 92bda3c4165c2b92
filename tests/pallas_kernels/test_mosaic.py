"""What leans on jax's private interfaces stands on the installed jax; `make newest` runs this on the newest."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels import mosaic
from pallas_kernels.sm90 import forward as fwd_sm90
from pallas_kernels.sm90.config import ForwardConfig
from tests.pallas_kernels import interpreted
from tests.pallas_kernels.sm90 import attention_cases


def test_the_installed_jax_was_checked():
    assert jax.__version__ in mosaic.VERSIONS_CHECKED, (
        f"jax {jax.__version__} is new to pallas_kernels/mosaic.py: run tests/pallas_kernels on it, then add it to VERSIONS_CHECKED"
    )


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
