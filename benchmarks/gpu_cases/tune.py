"""The autotuner's sweep (`fps_jax.autotune`, the engine of fps-tune) as cases of the benchmark."""

from collections.abc import Iterator
from typing import Any


def sweep(toy: bool, *, size: str, density: float, scales: int | None, cluster: int) -> Iterator[dict[str, Any]]:
    """Configs with clusters of this size: one process, so that a hang costs no others."""
    from benchmarks.gpu_cases.speed import make_task
    from benchmarks.gpu_cases.timing import kernels, median_seconds, size_of
    from fps_jax.tuning import autotune, timing
    from pallas_kernels.tuning import ForwardConfig

    task = make_task(size_of(size, toy), density, scales)
    configs = [c for c in task.candidates if c.cluster == cluster]

    def measure(call: Any, limit: float) -> dict[str, Any]:
        return median_seconds(call, toy) if toy else timing.median_seconds(call, limit)

    with kernels(toy):
        for result in autotune.sweep(task, configs[:1] if toy else configs, measure=measure):
            yield {"part": autotune.brief(ForwardConfig(**result["config"])), **result}
