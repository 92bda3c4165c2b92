"""A step of `fps-train-vae` on a CPU: how long its one program compiles, and how long it then takes.

    python -m benchmarks.vae_step_cpu     # three minutes on 2 cores, each size in a process of its own

The command's own step (gradient and AdamW) on 64 x 64 pixels, with its default sizes (base dim 8, 2 residual blocks a stage) and
those of the demo's VAE (1 block), a batch of 4: one image, 9 frames, 17 frames. Compiled anew, without a cache.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

SIZE, BATCH, STEPS = 64, 4, 5
CASES = [(frames, blocks) for blocks in (1, 2) for frames in (1, 9, 17)]


def _measure(frames: int, blocks: int) -> dict[str, Any]:
    import jax
    import numpy as np

    from fps_jax.config import VAEConfig
    from fps_jax.models.init import init_vae_for_training
    from fps_train import vae
    from fps_train.vae_options import VAETraining

    z = 6
    config = VAEConfig(
        base_dim=8, z_dim=z, num_res_blocks=blocks, latents_mean=(0.0,) * z, latents_std=(1.0,) * z
    )  # fmt: skip
    options, images = VAETraining(batch_size=BATCH), frames == 1
    step = vae._step(config, options, images)
    state = vae.initial_state(options, init_vae_for_training(config, jax.random.key(0)), images=images)
    video = np.random.default_rng(0).integers(0, 256, (BATCH, frames, SIZE, SIZE, 3), np.uint8)
    start, cpu = time.perf_counter(), time.process_time()
    compiled = step.lower(state, video).compile()
    found = {"compile_s": round(time.perf_counter() - start, 1), "compile_cpu_s": round(time.process_time() - cpu, 1)}
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        state, measured = jax.block_until_ready(compiled(state, video))
        seconds.append(round(time.perf_counter() - start, 4))
    assert np.isfinite(float(measured["loss"]))
    return {**found, "seconds": seconds[1:], "median_s": statistics.median(seconds[1:])}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(_measure(*map(int, sys.argv[1:]))))
        return
    from benchmarks.record import write

    rows = {}
    for frames, blocks in CASES:
        command = [sys.executable, "-m", "benchmarks.vae_step_cpu", str(frames), str(blocks)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[f"{frames} frames, {blocks} blocks"] = found = json.loads(done.stdout)
        print(frames, blocks, found, flush=True)
    case = f"{SIZE} x {SIZE} pixels, batch {BATCH}, float32"
    write("vae_step_cpu", {"what": "a step of fps-train-vae on a CPU", "case": case, "rows": rows})


if __name__ == "__main__":
    main()
