"""Whether the claim's VAE keeps every fact of a clip, also where a diffusion model would leave noise on its latents.

    python -m benchmarks.claim.vae_gate RUN/checkpoint --output outputs/claim/vae_gate

reconstructs held-out clips as they are, and with noise of 0.3 of each channel's deviation, and lets the checker read them.
"""

import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

from benchmarks.claim import world
from benchmarks.claim.judge import FACTS, check, judge, write_strips
from benchmarks.record import write
from fps_jax.errors import parse, run_cli
from fps_jax.sizes import latent_grid

NOISE = (0.0, 0.3)
LEAST = 0.98


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Reconstruct clips and let the checker read them."""

    model: Annotated[pathlib.Path, tyro.conf.Positional]
    """A checkpoint that holds the VAE."""
    output: pathlib.Path
    """Folder to write vae_gate.json and a png for each noise into."""
    clips: int = 192
    """How many held-out clips."""
    seed: int = 200
    """Of clips and noise."""
    batch_size: int = 8
    """Clips at a time."""
    publish: str | None = None
    """Name of a file in benchmarks/results that gets the numbers too."""


def _main(arguments: list[str]) -> None:
    options = parse(Gate, arguments, prog="python -m benchmarks.claim.vae_gate")
    check(options)
    import jax
    import jax.numpy as jnp

    from fps_jax.checkpoints.open import open_model
    from fps_jax.compilation import enable_compilation_cache
    from fps_jax.files import write_json
    from fps_jax.models.vae import decode_video, encode_moments

    enable_compilation_cache()
    model = open_model(options.model)
    config, params = model.config.vae, model.load("vae", "float32")

    @jax.jit
    def reconstruct(video, noise, share):
        mean, _ = encode_moments(config, params, video.astype(jnp.float32) / 127.5 - 1)  # normalised
        return (decode_video(config, params, mean + share * noise, clip=True) + 1) / 2

    drawn = [world.make_clip(options.seed, i, True) for i in range(options.clips)]
    clips = np.stack([frames for *_, frames in drawn])
    shape = (config.z_dim, *latent_grid(world.HEIGHT, world.WIDTH, world.FRAMES))
    noise = np.random.default_rng(options.seed).standard_normal((options.clips, *shape)).astype(np.float32)
    options.output.mkdir(parents=True, exist_ok=True)
    record, passed = {"model": str(options.model), "clips": options.clips, "seed": options.seed}, True
    for share in NOISE:
        videos = []
        for first in range(0, options.clips, options.batch_size):
            rows = np.arange(first, first + options.batch_size) % options.clips  # one program
            videos.append(np.asarray(reconstruct(clips[rows], noise[rows], jnp.float32(share))))
        found = np.concatenate(videos)[: options.clips]
        judged = judge([facts for facts, *_ in drawn], [text for _, text, _ in drawn], found)
        psnr = float(10 * np.log10(1 / np.square(found - clips / 255.0).mean()))
        record[f"noise {share}"] = {"psnr": round(psnr, 2), **judged.record()}
        write_strips(judged, options.output / f"noise_{share}.png")
        shares = {name: judged.record()[name]["right"] for name in FACTS}
        passed &= min(shares.values()) >= LEAST
        print(f"noise {share}: PSNR {psnr:.1f} dB, {shares}, whole {judged.whole.mean():.3f}")
    record["passed"] = bool(passed)
    write_json(record, options.output / "vae_gate.json")
    if options.publish:
        write(options.publish, record | {"model": options.model.parent.name})
    print(f"{'passed' if passed else 'not passed'}: each fact right in {LEAST:.0%} of clips or more")


if __name__ == "__main__":
    sys.exit(run_cli(_main))
