"""The autotuner: times every config that fits, for each key of the tuned table, and picks the fastest right one."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

_AGREE = 1e-2  # relative L2 from the safe config's output: a config that computes something else is out


def sweep(toy: bool, *, size: str, density: float, scales: int | None, cluster: int) -> Iterator[dict[str, Any]]:
    """Configs with clusters of this size: one process, so that a hang costs no others."""
    import jax
    import numpy as np

    from benchmarks.gpu_cases import speed
    from benchmarks.gpu_cases.timing import kernels, median_seconds, size_of
    from pallas_kernels import fwd_sm90, tuning

    shape = size_of(size, toy)
    plan = speed.build_plan(shape, density, scales)
    table, _ = speed.call_arguments(plan)
    key, fits = speed.tuning_of(plan, shape.head_dim)
    found = [c for c in tuning.candidates(head_dim=shape.head_dim, **fits) if c.cluster == cluster]
    # 232 and 40 spill with two stages.
    found += [dataclasses.replace(c, consumer_registers=232, producer_registers=40) for c in found if c.stages > 2]
    x = speed.random_inputs(plan, shape)
    with kernels(toy):
        operands = jax.jit(lambda q, k, v: speed.make_operands(plan, q, k, v))(*x)
        fixed = {"batch": 1, "tile_size": plan.layout.stored, "dtype": x[0].dtype, "with_lse": False}
        safe = tuning.ForwardConfig(stages=2)
        want = np.asarray(fwd_sm90.attention(operands, **table, **fixed, config=safe)[0][:, ::7], np.float32)
        for config in found[:1] if toy else found:

            def call(config: Any = config) -> Any:
                return fwd_sm90.attention(operands, **table, **fixed, config=config)[0]

            got = np.asarray(call()[:, ::7], np.float32)
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            yield {
                "part": f"{config.stages} stages, {config.consumer_registers} registers",
                "ok": error <= _AGREE,
                "rel_l2_safe": error,
                "key": dataclasses.asdict(key),
                "config": dataclasses.asdict(config),
                **median_seconds(call, toy),
            }


def fastest(records: Iterable[dict[str, Any]]) -> dict[Any, Any]:
    """{TuningKey: ForwardConfig} of the tune stage's records: measured, right, fastest."""
    from pallas_kernels.tuning import ForwardConfig, TuningKey

    best: dict[TuningKey, tuple[float, ForwardConfig]] = {}
    for record in records:
        for part in record["parts"]:
            seconds = part.get("seconds")
            if record["stage"] != "tune" or not isinstance(seconds, float) or not part.get("ok"):
                continue
            key, config = TuningKey(**part["key"]), ForwardConfig(**part["config"])
            if key not in best or seconds < best[key][0]:
                best[key] = (seconds, config)
    return {key: config for key, (_, config) in best.items()}
