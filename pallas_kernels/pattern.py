"""What an attention call needs beside q, k and v: which key tiles a query tile attends, what is padding, what shares a scale."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TilePattern:
    """One record for every implementation of attention, from `build`. A pytree: the arrays may be traced, the sizes are static.

    Attributes:
      key_tiles: int32, the key tiles of each query tile, for all heads or per head; each at most once in a row. Slots from
        `counts` on are unused and hold any tile.
      counts: int32, used slots of each row, 1 or more.
      q_valid, k_valid: False at padded slots, which may hold anything, NaN too. The output is 0 at padded queries; every tile
        that is listed has a valid key.
      tile_size: stored tokens of a tile, of queries as of keys.
      tokens_per_scale: stored tokens that share an FP8 scale of Q or K, a divisor of the tile (to the specification alone: of
        all tokens); None for no quantization.
      center_k: K minus its mean over valid tokens is quantized: softmax doesn't see it, and what keys share costs no precision.
        Without quantization it does nothing.
      tokens_per_value_scale: stored tokens that share a channel's FP8 scale of V, whole tiles; None for all. With it the rounding
        of a group of tokens rests on no others, as a cache needs that is written once (`reference.value_scales`).
      ordered: 'portable' adds up in the table's order and in steps of one size, so that a row's bits depend on which tiles it lists
        in which order, and on nothing else: not on where they lie in k, how many others there are, nor how wide the table is.
    """

    key_tiles: Int[Array, "*N Tq K"]
    counts: Int[Array, "*N Tq"]
    q_valid: Bool[Array, "Sq"]
    k_valid: Bool[Array, "Sk"]
    tile_size: int = field(metadata={"static": True})
    tokens_per_scale: int | None = field(metadata={"static": True})
    center_k: bool = field(default=False, metadata={"static": True})
    tokens_per_value_scale: int | None = field(default=None, metadata={"static": True})
    ordered: bool = field(default=False, metadata={"static": True})

    @classmethod
    def build(
        cls,
        *,
        key_tiles: Int[Array, "*N Tq K"] | Int[np.ndarray, "*N Tq K"],
        counts: Int[Array, "*N Tq"] | Int[np.ndarray, "*N Tq"],
        valid: Bool[Array, "Sk"] | Bool[np.ndarray, "Sk"],
        q_valid: Bool[Array, "Sq"] | Bool[np.ndarray, "Sq"] | None = None,
        tokens_per_scale: int | None = None,
        center_k: bool = False,
        tokens_per_value_scale: int | None = None,
        ordered: bool = False,
    ) -> "TilePattern":
        """A pattern, checked. What is NumPy is also checked for its values; inside jit only shapes can be.

        Args:
          valid: `k_valid`. q_valid: None where queries and keys are the same tokens.
        Raises: ValueError for what doesn't fit together.
        """
        q_valid = valid if q_valid is None else q_valid
        tile_size = _tile_size(key_tiles, counts, valid, q_valid)
        _check_values(key_tiles, counts, valid, tile_size)
        if tokens_per_scale is not None and (tokens_per_scale < 1 or tile_size % tokens_per_scale):
            raise ValueError(
                f"tokens_per_scale={tokens_per_scale} doesn't divide the {tile_size} stored tokens of a tile; use a divisor"
            )
        if tokens_per_value_scale is not None:
            keys = np.shape(valid)[0]
            if tokens_per_value_scale < 1 or tokens_per_value_scale % tile_size or keys % tokens_per_value_scale:
                raise ValueError(
                    f"tokens_per_value_scale={tokens_per_value_scale} is no number of whole tiles of {tile_size} stored tokens "
                    f"that divides the {keys} keys"
                )
            if tokens_per_scale is None:
                raise ValueError(
                    f"tokens_per_value_scale={tokens_per_value_scale} without tokens_per_scale: nothing is quantized; give both"
                )
        return cls(
            key_tiles=jnp.asarray(key_tiles, jnp.int32),
            counts=jnp.asarray(counts, jnp.int32),
            q_valid=jnp.asarray(q_valid),
            k_valid=jnp.asarray(valid),
            tile_size=tile_size,
            tokens_per_scale=tokens_per_scale,
            center_k=center_k,
            tokens_per_value_scale=tokens_per_value_scale,
            ordered=ordered,
        )

    def check_operands(self, q: Any, k: Any) -> None:
        """Raises ValueError for q and k, `[B, S, N, H]`, that have other tokens or heads than this is of."""
        tables, (valid, q_valid) = self.key_tiles.shape, (self.k_valid.shape, self.q_valid.shape)
        if q.shape[1] != k.shape[1] and valid == q_valid:
            raise ValueError(
                f"q has {q.shape[1]} tokens and k {k.shape[1]}; pass q_valid where they are not the same tokens"
            )
        if len(tables) == 3 and tables[0] != q.shape[2]:
            raise ValueError(f"key_tiles has tables for {tables[0]} heads, q has {q.shape[2]} heads")
        if valid != k.shape[1:2] or q_valid != q.shape[1:2]:
            raise ValueError(
                f"valid {valid} and q_valid {q_valid} must be one bool for each of {k.shape[1]} keys and {q.shape[1]} queries"
            )

    @property
    def centers_keys(self) -> bool:
        """Whether the mean is taken off K: `center_k` where there is quantization."""
        return self.center_k and self.tokens_per_scale is not None

    @property
    def num_key_tiles(self) -> int:
        """Key tiles that there are."""
        return self.k_valid.shape[0] // self.tile_size

    @property
    def group_size(self) -> int:
        """Stored tokens of a group: those that share a scale, or a tile without quantization."""
        return self.tokens_per_scale or self.tile_size


def _tile_size(key_tiles: Any, counts: Any, valid: Any, q_valid: Any) -> int:
    """The stored size of a tile, from shapes that fit together; ValueError for others."""
    key_shape, count_shape = np.shape(key_tiles), np.shape(counts)
    if len(key_shape) not in (2, 3) or count_shape != key_shape[:-1] or 0 in key_shape:
        raise ValueError(
            f"key_tiles {key_shape} and counts {count_shape} must be [Tq, K] and [Tq], or [N, Tq, K] and [N, Tq]"
        )
    for name, table in (("key_tiles", key_tiles), ("counts", counts)):
        if not jnp.issubdtype(table.dtype, jnp.integer):
            raise ValueError(f"{name} is {table.dtype}; pass int32")
    if len(np.shape(valid)) != 1 or len(np.shape(q_valid)) != 1:
        raise ValueError(
            f"valid {np.shape(valid)} and q_valid {np.shape(q_valid)} must be one bool for each key and each query"
        )
    (keys,), (queries,), tiles = np.shape(valid), np.shape(q_valid), key_shape[-2]
    if queries % tiles or queries == 0:
        raise ValueError(
            f"q has {queries} tokens for {tiles} rows of key_tiles; every tile must have the same stored size"
        )
    tile_size = queries // tiles
    if keys % tile_size:
        raise ValueError(f"k has {keys} tokens, no multiple of the {tile_size} stored tokens of a tile")
    return tile_size


def _check_values(key_tiles: Any, counts: Any, valid: Any, tile_size: int) -> None:
    """Raises ValueError for NumPy arrays that list what isn't there."""
    if isinstance(valid, np.ndarray) and not valid.reshape(-1, tile_size).any(1).all():
        empty = int(np.argmin(valid.reshape(-1, tile_size).any(1)))
        raise ValueError(
            f"valid has no valid key in tile {empty}; leave the tile out, or list it nowhere and mark one key"
        )
    if not (isinstance(counts, np.ndarray) and isinstance(key_tiles, np.ndarray)):
        return
    width, k_tiles = key_tiles.shape[-1], np.shape(valid)[0] // tile_size
    if counts.min() < 1 or counts.max() > width:
        raise ValueError(f"counts lie in [{counts.min()}, {counts.max()}]; each must be in [1, {width}]")
    used = np.arange(width) < counts[..., None]
    ordered = np.sort(np.where(used, key_tiles, -1 - np.arange(width)), axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(
            "key_tiles lists a tile twice in a row; list each once, and let counts leave the other slots out"
        )
    bad = used & ((key_tiles < 0) | (key_tiles >= k_tiles))
    if bad.any():
        raise ValueError(f"key_tiles holds tile {key_tiles[bad][0]}; k has {k_tiles} tiles, numbered from 0")
