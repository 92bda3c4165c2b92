"""Spatial tiles of equal size that overlap, and the linear blend of what was computed for each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MAX_TILE = 64  # latent positions: 512 pixels
MIN_OVERLAP = 8  # latent positions: 64 pixels, as in diffusers


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Tiles along one axis: [start, start + size) each."""

    size: int
    starts: tuple[int, ...]

    def weights(self, tile: int, scale: int) -> np.ndarray:
        """Weight of each of the tile's size * scale positions; over all tiles they add up to 1. float32.

        Where two tiles overlap, the first's weight falls linearly and the second's is the rest.
        """
        weights = np.ones(self.size * scale, np.float32)
        if tile > 0:
            rise = self._rise(tile, scale)
            weights[: len(rise)] = rise
        if tile + 1 < len(self.starts):
            rise = self._rise(tile + 1, scale)
            weights[-len(rise) :] = 1 - rise
        return weights

    def _rise(self, tile: int, scale: int) -> np.ndarray:
        overlap = (self.starts[tile - 1] + self.size - self.starts[tile]) * scale
        return ((np.arange(overlap) + 0.5) / overlap).astype(np.float32)


def plan_axis(length: int, *, max_tile: int = MAX_TILE, min_overlap: int = MIN_OVERLAP) -> Axis:
    """The fewest tiles of at most max_tile that cover `length` with that overlap, all of one size.

    One size, so that one compiled program does for all of them. `min_overlap` < max_tile / 2.
    """
    if length <= max_tile:
        return Axis(size=length, starts=(0,))
    count = math.ceil((length - min_overlap) / (max_tile - min_overlap))
    size = math.ceil((length + (count - 1) * min_overlap) / count)
    return Axis(size=size, starts=tuple(i * (length - size) // (count - 1) for i in range(count)))


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of a frame, rows by columns."""

    rows: Axis
    columns: Axis

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def windows(self, scale: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Rows, columns and blend weights [h, w, 1] of each tile, in units of 1/scale latent positions."""
        for i, y in enumerate(self.rows.starts):
            for j, x in enumerate(self.columns.starts):
                weights = np.outer(self.rows.weights(i, scale), self.columns.weights(j, scale))
                rows = slice(y * scale, (y + self.rows.size) * scale)
                columns = slice(x * scale, (x + self.columns.size) * scale)
                yield rows, columns, weights[:, :, None]


def plan_tiles(height: int, width: int, *, max_tile: int = MAX_TILE, min_overlap: int = MIN_OVERLAP) -> Tiles:
    """Tiles of a latent of this height and width."""
    rows, columns = (plan_axis(n, max_tile=max_tile, min_overlap=min_overlap) for n in (height, width))
    return Tiles(rows=rows, columns=columns)


def one_tile(height: int, width: int) -> Tiles:
    """The whole frame."""
    return Tiles(rows=Axis(size=height, starts=(0,)), columns=Axis(size=width, starts=(0,)))
