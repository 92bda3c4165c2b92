"""Block-sparse attention in plain XLA, for any device: work and memory are those of the listed tiles, but for short heads.

`head` has what one head reads, `forward` and `backward` what is computed of it.
"""
