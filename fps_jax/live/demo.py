"""`fps-live demo`: the package's small model as a causal one, without a download."""

import pathlib
from typing import Any

from fps_jax.causal import CausalConfig

MODEL = pathlib.Path(__file__).parents[1] / "demo_models" / "dense"

# It was trained on whole clips of 5 latent frames, all at the same noise. So a block is a clip, and sees the first one, which keeps
# shape, size and colour: of blocks of 1 to 5 frames, windows of 5 to 10 and 4 to 25 steps that looked best, to the eye.
CAUSAL = CausalConfig(
    frames_per_block=5, steps=(1000, 917, 833, 750, 667, 583, 500, 417, 333, 250, 167, 83), window=10, sink=5
)

FACTS: dict[str, Any] = {
    "prompt": "a blue triangle moves right on a white background",
    "examples": [
        "a blue triangle moves right on a white background",
        "a red circle grows on a black background",
        "a green bar moves up on a gray background",
        "a yellow circle moves down on a black background",
    ],
    "note": "The demo model is small: it knows coloured shapes that move, on plain backgrounds. It was trained on whole clips of "
    "one second, not to go on from earlier blocks: each block starts its motion anew.",
}
