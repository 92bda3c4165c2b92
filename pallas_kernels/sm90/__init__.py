"""The Hopper kernels (docs/kernels.md). `config`, `call_shape` and `tuned` import no jax; the others import all of Mosaic GPU."""
