"""Attention calls whose results are checked: random data, every kind of padding, table and granularity."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from pallas_kernels.sm90.config import ForwardConfig

if TYPE_CHECKING:  # the process that starts the others imports no jax
    import jax

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


_BF16: dict[str, Any] = {"scales": None}
_PAIR: dict[str, Any] = {"cluster": 2}
_MANY: dict[str, Any] = {"tiles": 10, "heads": 4, "batch": 2}
SHAPES: dict[str, dict[str, Shape]] = {
    "first": {"one tile": Shape(tile=128, tiles=2, heads=1, padding="none", table="one")},
    "tables": {
        "ragged": Shape(tiles=12),
        "every tile": Shape(table="all"),
        "one tile a row": Shape(table="one"),
        "per head": Shape(heads=5, table="per_head"),
        "more keys than queries": Shape(query_tiles=3, table="all"),
        "four stages": Shape(tiles=16, stages=4),
        "batch and heads": Shape(batch=3, heads=5, scales=2),
        "many tiles": Shape(tiles=24, heads=1, stages=4),
    },
    "padding": {
        "none": Shape(padding="none"),
        "scattered": Shape(padding="scattered", scales=2),
        "whole groups": Shape(padding="groups", scales=4),
        "one token a tile": Shape(padding="single"),
        "low scores": Shape(padding="groups", scales=4, low=True),
    },
    "granularity": {
        f"tile {tile}, {scales} scales": Shape(tile=tile, tiles=6, scales=scales, padding="scattered")
        for tile, numbers in ((128, (1, 2)), (256, (1, 2, 4)), (384, (1, 2, 3, 6)))
        for scales in numbers
    },
    "head dim 64": {
        "two stages": Shape(head_dim=64, scales=4),
        "eight stages": Shape(head_dim=64, stages=8, tiles=12),
        "float16": Shape(head_dim=64, dtype="float16"),
        "float32": Shape(dtype="float32", tiles=4),
    },
    "clusters": {
        "ragged": Shape(**_PAIR, tiles=12),
        "every tile": Shape(**_PAIR, table="all", stages=4),
        "two scales a block": Shape(**_PAIR, scales=4, padding="groups"),
        "per head": Shape(**_PAIR, table="per_head", heads=5),
        "head dim 64": Shape(**_PAIR, head_dim=64, stages=4),
    },
    "promotion": {f"every {n} steps": Shape(tiles=12, table="all", stages=4, promote_every=n) for n in (2, 4, 8)},
    "polynomials": {
        "16 columns": Shape(tiles=12, stages=4, polynomial_columns=16),
        "32 columns, two scales a block": Shape(padding="groups", scales=4, polynomial_columns=32),
    },
    # More blocks of rows than a GPU runs at a time.
    "persistent": {
        "ragged": Shape(**_MANY, persistent=True),
        "every tile": Shape(**_MANY, persistent=True, table="all", stages=4, scales=4),
        "bf16": Shape(**_MANY, **_BF16, persistent=True),
    },
    "turns": {
        "ragged": Shape(tiles=12, take_turns=True),
        "every tile": Shape(**_MANY, table="all", scales=4, take_turns=True, stages=4),
        "bf16": Shape(**_BF16, take_turns=True),
    },
    "persistent clusters": {
        "ragged": Shape(**_MANY, **_PAIR, persistent=True),
        "bf16": Shape(**_MANY, **_BF16, **_PAIR, persistent=True),
    },
    "bf16": {
        "ragged": Shape(**_BF16, tiles=12),
        "every tile": Shape(**_BF16, table="all", padding="scattered"),
        "per head": Shape(**_BF16, table="per_head", heads=5, batch=2),
        "low scores": Shape(**_BF16, padding="groups", low=True),
        "head dim 64": Shape(**_BF16, head_dim=64, stages=4),
    },
    "bf16 clusters": {
        "ragged": Shape(**_BF16, **_PAIR, tiles=12),
        "head dim 64": Shape(**_BF16, **_PAIR, head_dim=64, stages=4),
    },
}

# Quantization alone: tile, scales, head dim, padding.
QUANTIZED = (
    (256, 1, 128, "tail"),
    (256, 4, 128, "groups"),
    (256, 2, 64, "scattered"),
    (128, 2, 128, "single"),
    (384, 3, 128, "scattered"),
    (384, 1, 64, "groups"),
)
# The public op, forward and backward.
OPERATIONS = {
    "fp8": Shape(tiles=6, padding="scattered", scales=2),
    "fp8, per head": Shape(tiles=6, heads=3, table="per_head", batch=2),
    "bf16": Shape(tiles=6, scales=None),
    "float32": Shape(tiles=4, dtype="float32"),
}


def make_call(shape: Shape, seed: int = 0) -> tuple[list["jax.Array"], "TilePattern"]:
    """([q, k, v], pattern). Padding holds NaN, unused slots of the table nonsense."""
    import jax.numpy as jnp

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


def valid_slots(padding: str, tiles: int, tile: int, rng: np.random.Generator) -> Bool[np.ndarray, "tiles*tile"]:
    """Which slots hold tokens. `padding`: none, tail, scattered, groups or single."""
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
    table: str, heads: int, query_tiles: int, key_tiles: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "*N Tq Tk"], Int[np.ndarray, "*N Tq"]]:
    """(key tiles in random order with nonsense in unused slots, counts). `table`: ragged, per_head, one or all."""
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
