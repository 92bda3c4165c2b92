"""Attention kernels and their definition. Imports jax, numpy and jaxtyping only."""
