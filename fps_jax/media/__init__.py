"""Pictures and videos as arrays, in and out of files. Knows nothing of models; uses the leaves at the top of `fps_jax` only."""
