"""Attention calls for tests and benchmarks: random data, every kind of padding and table."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pallas_kernels.sm90.config import ForwardConfig

# Whoever only names calls, as the process that starts the benchmarks does, imports neither NumPy nor jax.
if TYPE_CHECKING:
    import jax
    import numpy as np
    from jaxtyping import Bool, Int

    from pallas_kernels.pattern import TilePattern


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One call.

    scales: of a tile, None for none. padding: of `valid_slots`; table: of `permuted_table`. query_tiles: None for the keys' own.
    """

    tile: int = 256
    tiles: int = 8
    query_tiles: int | None = None
    heads: int = 2
    batch: int = 1
    head_dim: int = 128
    scales: int | None = 1
    padding: str = "tail"
    table: str = "ragged"
    dtype: str = "bfloat16"
    low: bool = False  # every score far below 0
    stages: int = 2
    cluster: int = 1
    promote_every: int = 1
    persistent: bool = False
    take_turns: bool = False
    polynomial_columns: int = 0

    @property
    def tokens_per_scale(self) -> int | None:
        return None if self.scales is None else self.tile // self.scales

    @property
    def config(self) -> ForwardConfig:
        spills = self.persistent and self.scales is None  # the copier, with 24 registers: as in `CallShape.candidates`
        return ForwardConfig(
            consumer_registers=232 if spills else 240,
            producer_registers=40 if spills else 24,
            stages=self.stages,
            cluster=self.cluster,
            promote_every=self.promote_every,
            persistent=self.persistent,
            take_turns=self.take_turns,
            polynomial_columns=self.polynomial_columns,
        )


def make_call(shape: Shape, seed: int = 0) -> "tuple[list[jax.Array], TilePattern]":
    """([q, k, v], pattern). Padding holds NaN, unused slots of the table nonsense."""
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.pattern import TilePattern

    rng = np.random.default_rng(seed)
    query_tiles = shape.tiles if shape.query_tiles is None else shape.query_tiles
    k_valid, q_valid = (valid_slots(shape.padding, tiles, shape.tile, rng) for tiles in (shape.tiles, query_tiles))
    x = []
    for tiles in (query_tiles, shape.tiles, shape.tiles):
        values = rng.standard_normal((shape.batch, tiles * shape.tile, shape.heads, shape.head_dim), np.float32)
        values[..., :2] *= 4  # outlier channels, as trained models have them
        x.append(values)
    if shape.low:
        # A padded key that scored 0 would become the maximum. -22 only: a tensor core's sums carry some 13 bits.
        x[0][..., 0], x[1][..., 0] = 16, -16
    for values, valid in zip(x, (q_valid, k_valid, k_valid), strict=True):
        values[:, ~valid] = np.nan
    x = [jnp.asarray(values, shape.dtype) for values in x]
    key_tiles, counts = permuted_table(shape.table, shape.heads, query_tiles, shape.tiles, rng)
    return x, TilePattern.build(
        key_tiles=key_tiles,
        counts=counts,
        valid=k_valid,
        q_valid=q_valid,
        tokens_per_scale=shape.tokens_per_scale,
    )


def valid_slots(padding: str, tiles: int, tile: int, rng: "np.random.Generator") -> "Bool[np.ndarray, 'S']":
    """Which of tiles * tile slots hold tokens. `padding`: none, tail, scattered, groups or single."""
    import numpy as np

    valid = np.ones((tiles, tile), bool)
    if padding == "tail":
        valid[:, -4:] = False
    elif padding == "scattered":
        valid = rng.random(valid.shape) < 0.7
        valid[:, 5] = True
    elif padding == "groups":  # the last 64 slots of each tile, and most of the last tile
        valid[:, -64:] = False
        valid[-1, 3:] = False
    elif padding == "single":  # one token a tile, the last
        valid[:, :-1] = False
    else:
        assert padding == "none"
    return valid.reshape(-1)


def permuted_table(
    table: str, heads: int, query_tiles: int, key_tiles: int, rng: "np.random.Generator"
) -> "tuple[Int[np.ndarray, '*N Tq Tk'], Int[np.ndarray, '*N Tq']]":
    """(key tiles in random order with nonsense in unused slots, counts). `table`: ragged, per_head, one or all."""
    import numpy as np

    rows = (heads, query_tiles) if table == "per_head" else (query_tiles,)
    tiles = rng.permuted(np.broadcast_to(np.arange(key_tiles, dtype=np.int32), (*rows, key_tiles)), axis=-1)
    counts = np.full(rows, key_tiles, np.int32)
    if table in ("ragged", "per_head"):  # 1 to all
        counts = (np.arange(counts.size).reshape(rows) % key_tiles + 1).astype(np.int32)
    elif table == "one":
        counts[:] = 1
    else:
        assert table == "all"
    unused = np.arange(key_tiles) >= counts[..., None]
    return np.where(unused, 10**6, tiles).astype(np.int32), counts
