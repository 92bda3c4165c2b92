"""Attention calls whose results are checked: every kind of padding, table and granularity."""

from typing import Any

from pallas_kernels.testing import Shape

_BF16: dict[str, Any] = {"scales": None}
_PAIR: dict[str, Any] = {"cluster": 2}
_MANY: dict[str, Any] = {"tiles": 10, "heads": 4, "batch": 2}
_SMALL: dict[str, Any] = {"tile": 128, "heads": 1, "padding": "none", "stages": 2}
SHAPES: dict[str, dict[str, Shape]] = {
    # Rungs of the ladder: one thing more at each.
    "first": {
        "one tile": Shape(**_SMALL, tiles=2, table="one"),
        "two stages": Shape(**_SMALL, tiles=2, table="all"),
        "a ring that wraps": Shape(**_SMALL, tiles=6, table="all"),
        "cluster, one tile": Shape(**_SMALL | {"tile": 256}, tiles=2, table="one", cluster=2),
        "turns": Shape(**_SMALL, tiles=2, table="all", take_turns=True),
        "persistent": Shape(**_SMALL, tiles=6, table="all", persistent=True),
    },
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
