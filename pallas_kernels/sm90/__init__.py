"""The Hopper kernels (docs/kernels.md). `config` and `tuned` import no jax; the others import Mosaic GPU, which takes a second."""
