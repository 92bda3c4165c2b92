"""What tests of streams share beside conftest's `pipe` and `boat`: a small size, two prompts, blocks of two latent frames."""

from fps_jax import CausalConfig

SIZE = {"height": 32, "width": 48}
BOAT, STORM = "A boat sails.", "The storm clears."
CAUSAL = CausalConfig(frames_per_block=2, window=4, steps=(1000, 500))
