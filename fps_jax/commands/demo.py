"""`make demo`: the whole path on a laptop. Converts the small checkpoint shipped here, loads it, samples, writes mp4 and png."""

import pathlib
import sys
import time

from fps_jax.errors import run_cli

CHECKPOINT = pathlib.Path(__file__).parents[1] / "demo_checkpoint"


def main(arguments: list[str]) -> None:
    """Write outputs/demo (or the folder named) with checkpoint/, demo.mp4 and demo.png."""
    folder = pathlib.Path(arguments[0] if arguments else "outputs/demo")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    print("importing jax", file=sys.stderr, flush=True)
    from fps_jax import to_flax
    from fps_jax.media.video import contact_sheet, save_video
    from fps_jax.sampling.pipeline import WanPipeline

    print(f"converting {CHECKPOINT} (diffusers layout)", file=sys.stderr)
    to_flax(CHECKPOINT, folder / "checkpoint", overwrite=True)
    pipe = WanPipeline.from_pretrained(folder / "checkpoint", dtype="float32")
    pipe.show_progress = True
    print("sampling 17 frames of 192 x 112, 8 steps; the first time, most of it is compiling", file=sys.stderr)
    video = pipe("A cat walks in the snow.", height=112, width=192, num_frames=17, num_inference_steps=8)
    save_video(video, folder / "demo.mp4")
    contact_sheet(video, folder / "demo.png")
    print(f"done in {time.time() - start:.0f} s")
    print(f"  video          {folder / 'demo.mp4'}")
    print(f"  contact sheet  {folder / 'demo.png'}")
    print(
        "The weights of this checkpoint are synthetic, so the picture is noise. What it shows is that every part runs:"
    )
    print(
        "text encoder, diffusion transformer, solver, VAE and mp4. README.md says how to sample with Wan2.1's own weights."
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
