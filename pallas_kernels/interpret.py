"""Kernels on a CPU, for tests: gaps of Pallas's interpret mode filled.

Patches jax's own interpreter, so it needs jax's private interfaces: on the versions that `mosaic.VERSIONS_CHECKED` names.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic import private, replaced

# Where the simulated memory keeps the matmuls that were started and not waited for: thread -> places they read, oldest first.
_IN_FLIGHT = "_fps_wgmmas_in_flight"


@contextlib.contextmanager
def interpret(*, detect_races: bool = True) -> Iterator[None]:
    """Kernels called inside run on the CPU, one thread a warpgroup; a race is an error. Patches jax's classes while open.

    A deadlock in a kernel is a hang here: run it in a process that can be ended. Clusters need as many threads as they have
    warpgroups; on a machine with few cores set NPROC=12 in the environment before jax starts.
    """
    with contextlib.ExitStack() as stack:
        for patch in _patches():
            stack.enter_context(patch)
        stack.enter_context(plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)))
        yield


def _patches() -> Sequence[contextlib.AbstractContextManager[None]]:
    """jax's interpreter with wgmma's A operand in registers, run_state over accumulators, and our inline_mgpu code."""
    primitives, discharge = private("pallas.mosaic_gpu.primitives"), private("state.discharge")
    interpreter = private("pallas.mosaic_gpu.interpret.jaxpr_interpret").JaxprInterpreter
    memory = private("pallas.mosaic_gpu.interpret.shared_memory")
    scalar = memory._to_int
    plain_inline, plain = interpreter._interpret_inline_mgpu_p, interpreter.interpret

    plain_load = interpreter._interpret_wgmma_accumulator_deref_p

    def load_accumulator(self, eqn, token, get_invals):
        return plain_load(self, eqn, _finish_wgmmas(self, eqn, token, eqn.params["wait_n"]), get_invals)

    def inline(self, eqn, token, get_invals):
        if "_run_state" in eqn.params:
            return _run_state(self, eqn, token, get_invals)
        emulated = getattr(eqn.params["mgpu_fn"], "emulated", None)  # of `sm90.registers`
        if emulated is None:
            return plain_inline(self, eqn, token, get_invals)
        return token, list(emulated(*get_invals()[: eqn.params["pytree_args"].num_leaves]))

    def interpret_jaxpr(self, jaxpr, token, *args):
        # The interpreter dispatches on primitives and has no entry for run_state: it travels as an inline_mgpu equation.
        inner = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr
        if any(eqn.primitive is discharge.run_state_p for eqn in inner.eqns):
            inner = inner.replace(
                eqns=[
                    eqn.replace(primitive=primitives.inline_mgpu_p, params={"_run_state": eqn.params})
                    if eqn.primitive is discharge.run_state_p
                    else eqn
                    for eqn in inner.eqns
                ]
            )
            jaxpr = jaxpr.replace(jaxpr=inner) if hasattr(jaxpr, "jaxpr") else inner
        return plain(self, jaxpr, token, *args)

    patches = [
        replaced(interpreter, "_interpret_wgmma_ref_p", _wgmma),
        replaced(interpreter, "_interpret_wgmma_accumulator_deref_p", load_accumulator),
        replaced(interpreter, "_interpret_inline_mgpu_p", inline),
        replaced(interpreter, "interpret", interpret_jaxpr),
        replaced(private("callback"), "io_callback_impl", _call_with_arrays_of_the_host),
        replaced(memory, "_to_int", lambda x: x.item() if isinstance(x, np.ndarray) else scalar(x)),
    ]
    if jax.__version_info__ < (0, 12):
        patches += _patches_for_0_11()
    return patches


def _call_with_arrays_of_the_host(*args: Any, callback: Callable[..., Any], **_: Any) -> Any:
    """An `io_callback`, of which each simulated instruction is one, on NumPy arrays.

    jax's own puts each argument on a device first: three quarters of a kernel's time. Copies, since XLA uses the buffers again.
    """
    return jax.tree.map(np.asarray, callback(*map(np.array, args)))


def _patches_for_0_11() -> list[Any]:
    barrier = private("pallas.mosaic_gpu.interpret.shared_memory").Barrier
    races = private("pallas.mosaic.interpret.race_detection_state").RaceDetectionState

    def deallocate(self):
        """0.11 refuses to drop a barrier whose last phase nobody waited for, which is no error; pending arrivals are."""
        with self.cv:
            self.ref_count -= 1
            if self.ref_count <= 0 and self.arrivals_count != 0:
                raise ValueError(f"Barrier deallocated with {self.arrivals_count} arrivals pending.")

    def raising(check):
        """0.11 prints a race and goes on; 0.12 raises."""

        def check_and_raise(self, *args, **kwargs):
            check(self, *args, **kwargs)
            if self.races_found:
                raise RuntimeError("RACE DETECTED in a kernel; the two accesses are printed above")

        return check_and_raise

    return [
        replaced(barrier, "deallocate", deallocate),
        replaced(races, "check_read", raising(races.check_read)),
        replaced(races, "check_write", raising(races.check_write)),
    ]


def _wgmma(interpreter: Any, eqn: Any, token: Any, get_invals: Callable[[], Any]) -> Any:
    """acc += A @ B as jax interprets it, and beyond that: A may be in registers, and its reads of shared memory can race."""
    gpu_callbacks = private("pallas.mosaic_gpu.interpret.gpu_callbacks")
    shared_memory = private("pallas.mosaic_gpu.interpret.shared_memory")
    resolve_ref = private("pallas.mosaic_gpu.interpret.jaxpr_interpret").resolve_ref
    a_in_memory = isinstance(eqn.invars[1].aval, private("state.types").AbstractRef)

    operands = list(get_invals())
    (acc, a, b), leaves = operands[:3], operands[3:]
    trees = [eqn.params[f"{x}_transforms_tree"] or jax.tree.structure([]) for x in ("acc", "a", "b")]
    acc_transforms, a_transforms, b_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    acc, acc_transforms = resolve_ref(eqn.invars[0].aval, acc, acc_transforms)
    b, b_transforms = resolve_ref(eqn.invars[2].aval, b, b_transforms)
    if a_in_memory:
        a, a_transforms = resolve_ref(eqn.invars[1].aval, a, a_transforms)

    @gpu_callbacks.fail_on_exception
    def accumulate(*, token, mesh_location, thread, acc, a, b, acc_transforms, a_transforms, b_transforms):
        memory = gpu_callbacks._get_shared_memory()
        info = {"logging_info": shared_memory.GPULoggingInfo(mesh_location, thread, eqn.source_info)}

        def locate(key, transforms):
            key = gpu_callbacks.HostAllocationKey.from_array(key)
            return key, memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))

        def read(key, transforms):
            place = locate(key, transforms)
            places.append(place)
            return memory.get_buffer_content(*place, thread, **info)[0]

        places = []
        a = read(a, a_transforms) if a_in_memory else np.asarray(a)
        place = locate(acc, acc_transforms)
        total = memory.get_buffer_content(*place, thread, **info)[0]
        total = total + np.matmul(a.astype(total.dtype), read(b, b_transforms).astype(total.dtype))
        memory.store_buffer_content(*place, total, thread, **info)
        _check_reads(memory, thread, places, eqn.source_info)
        vars(memory).setdefault(_IN_FLIGHT, {}).setdefault(thread, []).append(places)
        return token

    token = private("callback").io_callback(
        accumulate,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
        acc=acc,
        a=a,
        b=b,
        acc_transforms=acc_transforms,
        a_transforms=a_transforms,
        b_transforms=b_transforms,
    )
    return token, []


def _finish_wgmmas(interpreter: Any, eqn: Any, token: Any, wait_n: int | None) -> Any:
    """A wait for all but the last `wait_n` matmuls. Until then they may read shared memory: they are counted as reading it now.

    So a slot that is handed back before the wait shows as a race with the copy that fills it again.
    """
    gpu_callbacks = private("pallas.mosaic_gpu.interpret.gpu_callbacks")
    if wait_n is None:
        return token

    @gpu_callbacks.fail_on_exception
    def finish(*, token, thread):
        memory = gpu_callbacks._get_shared_memory()
        flying = vars(memory).setdefault(_IN_FLIGHT, {}).setdefault(thread, [])
        while len(flying) > wait_n:
            _check_reads(memory, thread, flying.pop(0), eqn.source_info)
        return token

    return private("callback").io_callback(
        finish, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, thread=interpreter.thread
    )


def _check_reads(memory: Any, thread: Any, places: list[Any], source_info: Any) -> None:
    """Tells the race detector that the tensor cores read these places of shared memory, for this thread, now."""
    if not memory.detect_races:
        return
    # Later than the copy that was waited for: equal clocks count as a race. `incr_clock` would advance one of the two clocks only.
    with memory.lock:
        memory.clocks[thread].inc(memory.thread_to_vc_position(thread))
        clock = memory.clocks[thread].copy().async_smem_clock
    races = private("pallas.mosaic_gpu.interpret.gpu_callbacks").get_races()
    for place in places:
        races.check_read(thread, clock, *place, source_info=source_info)


def _run_state(interpreter: Any, eqn: Any, token: Any, get_invals: Callable[[], Any]) -> Any:
    """pl.run_state: a buffer for each initial value, the body over them, their last contents as the result."""
    core, state_types = private("pallas.mosaic_gpu.core"), private("state.types")
    gpu_callbacks = private("pallas.mosaic_gpu.interpret.gpu_callbacks")
    shared_memory = private("pallas.mosaic_gpu.interpret.shared_memory")

    @gpu_callbacks.fail_on_exception
    def forget(token, key):
        """Ids of registers are used again: to the race detector the next owner's accesses would be another thread's."""
        if gpu_callbacks._get_shared_memory().detect_races:
            races = gpu_callbacks.get_races()
            with races.lock:
                races.writes.pop(gpu_callbacks.HostAllocationKey.from_array(key), None)
                races.reads.pop(gpu_callbacks.HostAllocationKey.from_array(key), None)
        return token

    params = eqn.params["_run_state"]
    jaxpr = params["jaxpr"]
    initialized = params.get("is_initialized", (True,) * len(jaxpr.invars))
    where = {"mesh_location": interpreter.mesh_location, "thread": interpreter.thread}
    given = iter(zip(get_invals(), eqn.invars, strict=True))
    keys, ours = [], []
    for variable, has_value in zip(jaxpr.invars, initialized, strict=True):
        value, outer = next(given) if has_value else (None, None)
        passed_on = outer is not None and isinstance(outer.aval, state_types.AbstractRef)
        ours.append(isinstance(variable.aval, state_types.AbstractRef) and not passed_on)
        if not ours[-1]:
            keys.append(value)
            continue
        inner = variable.aval.inner_aval
        token, request = gpu_callbacks.call_make_allocation_request_array(
            token=token,
            compute_unit=interpreter.thread,
            memory_space_id=shared_memory.get_memory_space_idx(core.MemorySpace.REGS),
            initial_ref_count=1,
        )
        token, key = gpu_callbacks.call_allocate_buffer(
            token=token,
            allocation_request_as_array=request,
            value=jnp.zeros(inner.shape, inner.dtype) if value is None else value,
            source_info=eqn.source_info,
            **where,
        )
        keys.append(key)
    token, _ = interpreter.interpret(jaxpr, token, *keys)
    token = _finish_wgmmas(interpreter, eqn, token, 0)
    results = []
    for variable, key, own in zip(jaxpr.invars, keys, ours, strict=True):
        if not own:
            results.append(key)
            continue
        inner = variable.aval.inner_aval
        token, value = gpu_callbacks.call_get(
            token=token,
            result_shape_and_dtype=jax.ShapeDtypeStruct(inner.shape, inner.dtype),
            allocation_key_as_array=key,
            transforms=(),
            **where,
        )
        token = private("callback").io_callback(forget, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, key)
        token = gpu_callbacks.call_deallocate_buffer(
            token=token, allocation_key_as_array=key, source_info=eqn.source_info, **where
        )
        results.append(value)
    return token, results
