"""Fine-tuning with the approximation in place: clips to latents, latents to weights. docs/training.md is the way through it."""
