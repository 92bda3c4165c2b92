"""Processes of the autotuner for its tests. First argument: how configs fare in JSON, or 'interpret' for the real ones.

A key is 'dense/1 4x2': density class and scales (left out: any), then stages x cluster. Its value is the seconds of a call, or
'wrong', 'hang', 'crash'; 'start' is what the process does before its first config.
"""

import contextlib
import json
import sys
import time

from fps_jax.processes import say


def pretend(fates: dict) -> None:
    asked = json.loads(sys.argv[2])
    if "device" in asked:
        misbehave(fates.get("device"))
        say({"missing": fates.get("missing"), "gpu": "Pretended H200", "jax": "0"})
        return
    task = asked["task"]
    density = "dense" if task["density"] == 1 else "sparse"
    scales = {None: 0, 1: 1}.get(task["scales_per_tile"], 2)
    misbehave(fates.get(f"{density}/{scales} start"))
    for config in asked["configs"]:
        say({"starting": config})
        name = f"{config['stages']}x{config['cluster']}"
        fate = fates.get(f"{density}/{scales} {name}", fates.get(name, 1.0))
        misbehave(fate)
        result = {
            "key": {"head_dim": task["head_dim"], "density": density, "scales": scales},
            "config": config,
            "ok": fate != "wrong",
            "rel_l2_safe": float("nan") if fate == "wrong" else 0.0,
            "measured_on": {"gpu": "Pretended H200", "grid": task["grid"], "best_before": asked["best"]},
        }
        if result["ok"]:
            result |= {"seconds": fate, "tflops": 100 / fate}
        say(result)


def misbehave(fate: object) -> None:
    if fate == "hang":
        time.sleep(100)
    if fate == "crash":
        sys.exit("RuntimeError: no such instruction")


def interpret() -> None:
    """The real thing in interpret mode, which has no times: its own, rising."""
    from fps_jax.tuning import autotune
    from pallas_kernels.interpret import interpret

    del sys.argv[1]
    device = "device" in json.loads(sys.argv[1])
    seconds = iter(range(1, 100))
    if device:
        say({"missing": None, "gpu": "Interpreted", "jax": "0"})
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(interpret(detect_races=False))
        autotune.main(measure=lambda call, limit: {"seconds": float(next(seconds)), "limit": limit})


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else pretend(json.loads(sys.argv[1]))
