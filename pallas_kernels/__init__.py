"""Attention kernels and their definition. Imports jax, numpy and jaxtyping only. Empty for now."""
