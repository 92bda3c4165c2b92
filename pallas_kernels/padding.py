"""What padded key slots hold, so that they change nothing: a copy of a valid key, whose score can't move a row's maximum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.pattern import TilePattern


def group_sources(pattern: TilePattern) -> Int[Array, "Sk/group"]:
    """For each group, the slot whose key its padded slots repeat, int32: its first valid one, else the tile's; -1 for neither."""

    # Of a pattern that is known when a program is compiled XLA would compute all this then, for seconds: its interpreter is slow.
    k_valid = jax.lax.optimization_barrier(pattern.k_valid)

    def first(size: int) -> Array:  # of each run of `size` slots: its first valid slot, or -1
        runs = k_valid.reshape(-1, size)
        slot = jnp.argmax(runs, axis=1) + jnp.arange(runs.shape[0]) * size
        return jnp.where(runs.any(1), slot, -1).astype(jnp.int32)

    of_group, of_tile = first(pattern.group_size), first(pattern.tile_size)
    return jnp.where(of_group >= 0, of_group, jnp.repeat(of_tile, pattern.tile_size // pattern.group_size))


def key_sources(pattern: TilePattern) -> Int[Array, "Sk"]:
    """For each key slot the slot whose key it holds, int32: itself where valid, and where nothing of its tile is."""
    own = jnp.arange(pattern.k_valid.shape[0], dtype=jnp.int32)
    copied = jnp.repeat(group_sources(pattern), pattern.group_size)
    return jnp.where(pattern.k_valid | (copied < 0), own, copied)
