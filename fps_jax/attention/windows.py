"""Sliding-tile windows: which key tiles a query tile attends.

Source: STA (arXiv 2502.04507) section 3, used by FPSAttention (arXiv 2506.04648) section 3.3: a window counted in tiles, centred
on the query's tile and shifted inward at the border, so that every query tile sees the same number of key tiles.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fps_jax.attention.tiles import TileLayout, check_shape3
from fps_jax.causal import CausalConfig
from fps_jax.sizes import Shape3


class KeyTiles(NamedTuple):
    """The table a kernel reads, int32 NumPy.

    tiles: `[Tq, K]`, or `[N, Tq, K]` with a window per head: key tiles of each query tile, rising but for those in a cache, which
      are in the order of their frames; unused slots 0.
    counts: `[Tq]` or `[N, Tq]`: how many of a row are used.
    """

    tiles: Int[np.ndarray, "*N Tq K"]
    counts: Int[np.ndarray, "*N Tq"]


def clip_window(window: Shape3, layout: TileLayout) -> Shape3:
    """The window, no wider than the tile grid. Raises ValueError for anything but three positive whole numbers."""
    f, y, x = (
        min(w, n) for w, n in zip(check_shape3("window", window, "tiles, 1 or more"), layout.tile_grid, strict=True)
    )
    return f, y, x


def axis_window(num_tiles: int, width: int) -> Int[np.ndarray, "n width"]:
    """Key tiles of each query tile along one axis: first = clip(i - width // 2, 0, n - width)."""
    first = np.clip(np.arange(num_tiles) - width // 2, 0, num_tiles - width)
    return (first[:, None] + np.arange(width)).astype(np.int32)


def window_tiles(layout: TileLayout, window: Shape3) -> KeyTiles:
    """Table of one window for all heads. The window is clipped to the tile grid."""
    window = clip_window(window, layout)
    f, y, x = (axis_window(n, w) for n, w in zip(layout.tile_grid, window, strict=True))
    _, num_y, num_x = layout.tile_grid
    tiles = (
        (f[:, None, None, :, None, None] * num_y + y[None, :, None, None, :, None]) * num_x
        + x[None, None, :, None, None, :]
    ).reshape(layout.num_tiles, -1)
    return _frozen(tiles, np.full(layout.num_tiles, tiles.shape[1], np.int32))


def per_head_tiles(layout: TileLayout, windows: Sequence[Shape3]) -> KeyTiles:
    """Table with a window for each head; shorter rows end in unused slots."""
    tables = [window_tiles(layout, window) for window in windows]
    longest = max(t.tiles.shape[1] for t in tables)
    tiles = np.stack([np.pad(t.tiles, ((0, 0), (0, longest - t.tiles.shape[1]))) for t in tables])
    return _frozen(tiles, np.stack([t.counts for t in tables]))


def context_tiles(layout: TileLayout, frame_tiles: Sequence[int], window: Shape3) -> Int[np.ndarray, "Y*X K"]:
    """Key tiles of the query tiles at each row and column, for queries that attend some frames of a video.

    Args:
      layout: of the queries; its tiles along rows and columns are the keys' too.
      frame_tiles: where the attended tiles lie along frames, in the order that keys are to be listed in.
      window: of which only rows and columns count.
    """
    _, num_y, num_x = layout.tile_grid
    _, width_y, width_x = clip_window(window, layout)
    y, x = axis_window(num_y, width_y), axis_window(num_x, width_x)
    place = (y[:, None, :, None] * num_x + x[None, :, None, :]).reshape(num_y * num_x, 1, -1)
    frames = np.asarray(frame_tiles, np.int32)[None, :, None] * (num_y * num_x)
    return (frames + place).reshape(num_y * num_x, -1)


def block_causal_tiles(
    layout: TileLayout, window: Shape3, causal: CausalConfig, teacher_forcing: bool = False
) -> KeyTiles:
    """Table of a whole video: each block's queries attend the frames that they attend when it is made block after block.

    Within those frames rows and columns have the window. Rows are as wide as the longest, and rise.

    Args:
      teacher_forcing: the layout has the video twice, clean and then noisy: a clean block attends clean ones, a noisy block itself
        and the clean ones before it.
    Source: guandeh17/Self-Forcing wan/modules/causal_model.py (the masks of its training, and its cache's sink).
    """
    copies = 2 if teacher_forcing else 1
    frames, tile = layout.grid[0] // copies, layout.tile[0]
    rows = []
    for copy in range(copies):
        for start, end in causal.blocks(frames):
            own = frames * copy  # where the block itself is taken from
            attended = [frame + own * (frame >= start) for frame in causal.attended(end)[::tile]]
            row = context_tiles(layout, [frame // tile for frame in attended], window)
            rows += [row] * ((end - start) // tile)
    longest = max(row.shape[1] for row in rows)
    tiles = np.concatenate([np.pad(row, ((0, 0), (0, longest - row.shape[1]))) for row in rows])
    counts = np.concatenate([np.full(len(row), row.shape[1]) for row in rows])
    return _frozen(tiles, counts)


def check_causal(layout: TileLayout, window: Shape3, causal: CausalConfig) -> None:
    """Raises ValueError where blocks can't be cut into such tiles, NotImplementedError for a window along frames."""
    size = causal.slot_frames
    if size % layout.tile[0]:
        raise ValueError(
            f"tile={layout.tile} has {layout.tile[0]} latent frames and would cross what enters and leaves the cache together, "
            f"{size} frames of these blocks, window and sink; use 1 frame, or a divisor of {size}"
        )
    if window[0] != layout.tile_grid[0]:
        raise NotImplementedError(
            f"window={window} narrows the time axis, which a causal model's own window does; "
            f"use {layout.tile_grid[0]} for its first number"
        )


def _frozen(tiles: np.ndarray, counts: np.ndarray) -> KeyTiles:
    tiles, counts = tiles.astype(np.int32), counts.astype(np.int32)
    tiles.flags.writeable = counts.flags.writeable = False
    return KeyTiles(tiles, counts)


def window_density(layout: TileLayout, window: Shape3) -> float:
    """Share of all (query, key) pairs of tokens that the window keeps, padding left out; 1 is dense attention."""
    kept = 1
    for n, tile, tiles, width in zip(
        layout.grid, layout.tile, layout.tile_grid, clip_window(window, layout), strict=True
    ):
        lengths = np.minimum(tile, n - tile * np.arange(tiles))
        kept *= int((lengths * lengths[axis_window(tiles, width)].sum(1)).sum())  # windows are products of intervals
    return kept / layout.num_tokens**2


def propose_window(layout: TileLayout, density: float) -> Shape3:
    """The window whose density is nearest to a target, as even in tokens along the axes as that allows.

    Raises: ValueError for a density outside (0, 1].
    """
    check_density(density)
    off = {window: abs(math.log(window_density(layout, window) / density)) for window in _all_windows(layout.tile_grid)}
    # 5% of the density weigh as much as a side e times longer than another.
    return min(off, key=lambda window: (round(off[window] / 0.05 + _unevenness(layout, window), 9), window))


def _all_windows(tile_grid: Shape3) -> Iterator[Shape3]:
    f, y, x = tile_grid
    return itertools.product(range(1, f + 1), range(1, y + 1), range(1, x + 1))


def check_density(density: object) -> None:
    """Raises ValueError for what is no number in (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(
            f"density={density!r} is not a number in (0, 1]; 1 is dense attention, the paper's windows keep 0.1 to 0.3"
        )


def _unevenness(layout: TileLayout, window: Shape3) -> float:
    """Spread of the window's side lengths in tokens. An axis that is open to its end counts as long as the longest."""
    sides = [min(w * t, n) for w, t, n in zip(window, layout.tile, layout.grid, strict=True)]
    longest = max(sides)
    open_axis = [w == n for w, n in zip(window, layout.tile_grid, strict=True)]
    logs = [math.log(longest if is_open else side) for side, is_open in zip(sides, open_axis, strict=True)]
    return max(logs) - min(logs)
