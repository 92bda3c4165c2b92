"""`fps-live demo`: the package's small model as a causal one, without a download."""

import pathlib
from typing import Any

from fps_jax.causal import CausalConfig

MODEL = pathlib.Path(__file__).parents[1] / "demo_models" / "dense"

# It was trained on whole clips of 5 latent frames, all at the same noise, each of which sees the others. So a block is a clip, and
# sees itself alone: of blocks of 1 to 5 frames, windows of 5 to 10, sinks of 0 to 5 and 4 to 25 steps that looked best, to the eye.
# With a window of 10 shape and place last longer, but another prompt's colours and background mix with the old ones.
CAUSAL = CausalConfig(frames_per_block=5, steps=(1000, 917, 833, 750, 667, 583, 500, 417, 333, 250, 167, 83), window=5)

FACTS: dict[str, Any] = {
    "prompt": "a blue triangle moves right on a white background",
    "examples": [
        "a blue triangle moves right on a white background",
        "a red circle grows on a black background",
        "a green bar moves up on a gray background",
        "a yellow circle moves down on a black background",
    ],
    "note": "A small model for trying the page: it knows circles, bars and triangles that move, on plain backgrounds. It wasn't "
    "trained for block diffusion, so its motion doesn't go on from block to block: each is a clip of a second, which starts anew.",
}
