"""jax's private interfaces: the versions they were checked on, and waits of a kernel that are errors where they would hang.

`interpret`, which fills gaps of Pallas's interpret mode, and this file need them; nothing else does. Checked on jax 0.11.2 and
0.12.0.1 (`VERSIONS_CHECKED`; tests/pallas_kernels/test_mosaic.py says so when another one breaks it), as is `sm90.registers`, whose
inline code is Mosaic GPU's own dialects.
"""

import contextlib
import importlib
import math
from collections.abc import Iterator
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.xla_metadata import set_xla_metadata

VERSIONS_CHECKED = ("0.11.2", "0.12.0.1")


@contextlib.contextmanager
def impatient_waits(seconds: float = 3.0) -> Iterator[None]:
    """Kernels that are compiled inside trap where they waited so long for an mbarrier: a deadlock is a CUDA error, not a hang.

    For checking a kernel, not for timing it: 11 instructions for each wait. After a trap the process has lost its GPU. Every wait
    for an mbarrier gives up, a cluster's and a copy's too. Waits of other kinds (named barriers, setmaxnreg, a wait for stores)
    don't; where they hang in our kernels, another warpgroup waits for an mbarrier, and its trap ends them all.

    Programs of both kinds are kept apart: in jit's caches by the metadata that is set here, which is part of their key, and on disk
    (the persistent compilation cache) because that key holds the kernel's whole code. A program that was compiled ahead of time
    stays what it is. Patches jax's classes while open, in all threads.

    Args:
      seconds: of wall time, more than 0.
    Raises: ValueError for other seconds.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds} is not a positive time; a wait takes microseconds, use 3")
    nanoseconds = math.ceil(seconds * 1e9)

    def wait_parity(self, parity, orders_tensor_core=False):
        from jax.extend.mlir import ir
        from jax.extend.mlir.dialects import arith
        from jaxlib.mlir.dialects import llvm

        if self._ptx_scope != "cta" or orders_tensor_core:
            raise NotImplementedError("impatient_waits: barriers of another block, or of Blackwell's tensor cores")
        parity = arith.extui(ir.IntegerType.get_signless(32), parity)
        # A wait is given 1 ms at a time by the hardware, at most. Threads may read different times: their branches aren't uniform.
        code = f"""{{
            .reg .pred p;
            .reg .b64 now, deadline;
            mov.u64 deadline, %globaltimer;
            add.u64 deadline, deadline, {nanoseconds};
            WAIT:
            mbarrier.try_wait.parity.shared.b64 p, [$0], $1, 1000000;
            @p bra DONE;
            mov.u64 now, %globaltimer;
            setp.lt.u64 p, now, deadline;
            @p bra WAIT;
            trap;
            DONE:
        }}"""
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [self.get_ptr(), parity], code, "r,r", has_side_effects=True)

    with replaced(mgpu.utils.BarrierRef, "wait_parity", wait_parity), set_xla_metadata(impatient_waits=nanoseconds):
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of jax's replaced while open, in all threads."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def private(name: str) -> Any:
    """A private module of jax's Pallas; without types, since nothing in it is promised."""
    return importlib.import_module(f"jax._src.{name}")
