"""The 3D tile grid: one unit for sparsity and for quantization, and the token order that follows from it.

Source: FPSAttention (arXiv 2506.04648) section 3.2 (one tile for both); STA (arXiv 2502.04507) (tile order). Short edge tiles, the
padding and the sub-tiles are ours.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from fps_jax.sizes import Shape3

GROUP = 64  # tokens at most of the smallest group that has a scale: rows of one Hopper matrix instruction
_MAX_STORED = 2048  # a tile is a unit of on-chip work


def check_shape3(name: str, value: object, unit: str) -> Shape3:
    """Three positive whole numbers, or a ValueError that names the argument."""
    if (
        not isinstance(value, tuple | list)
        or len(value) != 3
        or not all(isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 1 for n in value)
    ):
        raise ValueError(f"{name}={value!r} is not three positive whole numbers ({unit} along F, Y, X)")
    f, y, x = (int(n) for n in value)
    return f, y, x


@dataclass(frozen=True)
class TileLayout:
    """A token grid cut into tiles: how tokens are ordered and padded.

    Tiles are numbered in raster order over (F, Y, X). The last tile of an axis may be short; every tile is stored with the same
    number of slots. A tile has a part for each 64 tokens that it has or has begun. Where an axis of it (or two) can be cut into as
    many, each part holds such a sub-tile, so that finer scales follow space, and is padded to a multiple of `alignment` slots; else
    a tile is filled in raster order, 64 slots a part.

    Which tokens are in a tile and in a part of it, and so which share a scale, is the same for every alignment: that only says how
    many padded slots there are between them.

    Attributes:
      grid: tokens (F, Y, X).
      tile: tokens of a whole tile.
      alignment: slots, a divisor of 64. 64 is what the Hopper kernel takes; what is fast on a device: `tile_alignment`.
    Raises: ValueError for a tile that doesn't fit, naming tiles that do, and for another alignment.
    """

    grid: Shape3
    tile: Shape3
    alignment: int = GROUP

    def __post_init__(self):
        object.__setattr__(self, "grid", check_shape3("grid", self.grid, "tokens"))
        object.__setattr__(self, "tile", check_shape3("tile", self.tile, "tokens"))
        whole = isinstance(self.alignment, int | np.integer) and not isinstance(self.alignment, bool)
        if not whole or self.alignment < 1 or GROUP % self.alignment:
            raise ValueError(
                f"alignment={self.alignment!r} is not a divisor of {GROUP} slots; use 8, or 64 for the Hopper kernel"
            )
        object.__setattr__(self, "alignment", int(self.alignment))
        too_large = any(t > n for t, n in zip(self.tile, self.grid, strict=True))
        if too_large or self.parts * GROUP > _MAX_STORED:  # whatever the alignment: a schedule is one on every device
            rule = "is larger than the grid" if too_large else f"stores more than {_MAX_STORED} tokens; too many for"
            good = ", ".join(str(p.tile) for p in propose_tiles(self.grid)[:3])
            raise ValueError(f"tile={self.tile} {rule} {self.grid}; good tiles for it: {good}")

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tile_grid(self) -> Shape3:
        """Tiles along each axis."""
        f, y, x = (-(-n // t) for n, t in zip(self.grid, self.tile, strict=True))
        return f, y, x

    @property
    def num_tiles(self) -> int:
        return math.prod(self.tile_grid)

    @property
    def parts(self) -> int:
        """Parts of a tile, the smallest groups that have a scale: one for each 64 tokens, begun or whole."""
        return _parts(self.tile)

    @property
    def part_slots(self) -> int:
        """Slots of one part."""
        return _part_slots(self.tile, self.alignment)

    @property
    def stored(self) -> int:
        """Slots of one tile."""
        return self.parts * self.part_slots

    @property
    def num_stored(self) -> int:
        """Slots in all: S_stored."""
        return self.num_tiles * self.stored

    @property
    def waste(self) -> float:
        """Padded slots for each token."""
        return self.num_stored / self.num_tokens - 1

    @property
    def allowed_scales(self) -> tuple[int, ...]:
        """Numbers of scales a tile that share its parts out evenly."""
        return tuple(n for n in range(1, self.parts + 1) if self.parts % n == 0)

    @property
    def granularities(self) -> tuple[int, int, int]:
        """Scales a tile that are called coarse, intermediate and fine: 1, one between, and the most up to 4."""
        allowed = [n for n in self.allowed_scales if n <= 4]
        return 1, allowed[len(allowed) // 2], allowed[-1]

    def tokens_per_scale(self, scales_per_tile: int) -> int:
        """Slots that share a scale. Raises ValueError, naming the allowed numbers, for one that the tile doesn't allow."""
        whole = isinstance(scales_per_tile, int | np.integer) and not isinstance(scales_per_tile, bool)
        if not whole or scales_per_tile not in self.allowed_scales:
            allowed = ", ".join(map(str, self.allowed_scales))
            raise ValueError(
                f"scales_per_tile={scales_per_tile!r} doesn't share out evenly the {self.parts} parts, one for each {GROUP} tokens "
                f"begun, of tile {self.tile}; allowed: {allowed}"
            )
        return self.stored // int(scales_per_tile)

    @property
    def sub_tile(self) -> Shape3 | None:
        """What a part holds of a whole tile; None where the tile is filled in raster order."""
        return _sub_tile(self.tile)

    @functools.cached_property
    def slots(self) -> Int[np.ndarray, "S"]:
        """The slot of each token in raster order, int32."""
        place = np.stack(np.unravel_index(np.arange(self.num_tokens), self.grid))
        size = np.array(self.tile)[:, None]
        tile_of, inside = place // size, place % size
        tile = np.ravel_multi_index(tuple(tile_of), self.tile_grid)
        cuts, sub_tile = _cuts(self.tile, self.parts), self.sub_tile
        if cuts is None or sub_tile is None:
            part, slots_of_bucket = np.zeros_like(tile), self.stored
        else:
            part = np.ravel_multi_index(tuple(inside // np.array(sub_tile)[:, None]), cuts)
            slots_of_bucket = self.part_slots
        bucket = np.asarray(tile * (self.stored // slots_of_bucket) + part)
        order = np.argsort(bucket, kind="stable")  # tokens of a bucket stay in raster order
        first = np.searchsorted(bucket[order], bucket[order])  # where its bucket starts
        slots = np.empty(self.num_tokens, np.int32)
        slots[order] = bucket[order] * slots_of_bucket + np.arange(self.num_tokens) - first
        slots.flags.writeable = False
        return slots

    @functools.cached_property
    def tokens(self) -> Int[np.ndarray, "S_stored"]:
        """The token of each slot, int32; 0 at padding (see `valid`)."""
        tokens = np.zeros(self.num_stored, np.int32)
        tokens[self.slots] = np.arange(self.num_tokens, dtype=np.int32)
        tokens.flags.writeable = False
        return tokens

    @functools.cached_property
    def valid(self) -> Bool[np.ndarray, "S_stored"]:
        """True where a slot holds a token."""
        valid = np.zeros(self.num_stored, bool)
        valid[self.slots] = True
        valid.flags.writeable = False
        return valid

    @functools.cached_property
    def valid_counts(self) -> Int[np.ndarray, "T"]:
        """Tokens in each tile, int32."""
        return self.valid.reshape(self.num_tiles, self.stored).sum(1).astype(np.int32)

    def to_tiles(self, x: Shaped[Array, "B S *rest"]) -> Shaped[Array, "B S_stored *rest"]:
        """Raster order to tile order; 0 at padding. A gather, and so is its gradient: exact and repeatable."""
        return _to_tiles(self, _with_tokens(x, self.num_tokens, f"the {self.grid} tokens of the grid"))

    def from_tiles(self, x: Shaped[Array, "B S_stored *rest"]) -> Shaped[Array, "B S *rest"]:
        """Tile order back to raster order; padding is dropped, and gets a zero gradient."""
        return _from_tiles(self, _with_tokens(x, self.num_stored, f"the stored tokens of tiles {self.tile}"))


def _with_tokens(x: Array, count: int, what: str) -> Array:
    x = jnp.asarray(x)
    if x.ndim < 2 or x.shape[1] != count:
        raise ValueError(f"x has shape {x.shape}; axis 1 must hold {count} tokens, {what}")
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_tiles(layout: TileLayout, x: Array) -> Array:
    return _scatter(layout, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_tiles(layout: TileLayout, x: Array) -> Array:
    return _collect(layout, x)


def _scatter(layout: TileLayout, x: Array) -> Array:
    valid = jnp.asarray(layout.valid).reshape(1, -1, *(1,) * (x.ndim - 2))
    return jnp.where(valid, jnp.take(x, jnp.asarray(layout.tokens), axis=1), jnp.zeros((), x.dtype))


def _collect(layout: TileLayout, x: Array) -> Array:
    return jnp.take(x, jnp.asarray(layout.slots), axis=1)


# Each is the other's transpose.
_to_tiles.defvjp(lambda layout, x: (_scatter(layout, x), None), lambda layout, _, g: (_collect(layout, g),))
_from_tiles.defvjp(lambda layout, x: (_collect(layout, x), None), lambda layout, _, g: (_scatter(layout, g),))


def _parts(tile: Shape3) -> int:
    return -(-math.prod(tile) // GROUP)


def _part_slots(tile: Shape3, alignment: int) -> int:
    sub_tile = _sub_tile(tile)
    # In raster order the first parts are full: with fewer slots another token would begin the next.
    return GROUP if sub_tile is None else -(-math.prod(sub_tile) // alignment) * alignment


def _sub_tile(tile: Shape3) -> Shape3 | None:
    cuts = _cuts(tile, _parts(tile))
    if cuts is None:
        return None
    f, y, x = (t // c for t, c in zip(tile, cuts, strict=True))
    return f, y, x


@functools.lru_cache(maxsize=256)
def _cuts(tile: Shape3, parts: int) -> Shape3 | None:
    """Parts along (F, Y, X), `parts` in all, that divide the tile: one axis where possible, the last first, else several."""
    options = [
        (f, y, parts // (f * y))
        for f in range(1, parts + 1)
        for y in range(1, parts + 1)
        if parts % (f * y) == 0 and all(t % c == 0 for t, c in zip(tile, (f, y, parts // (f * y)), strict=True))
    ]
    if not options:
        return None
    # fewest axes cut, then the last axes
    return min(options, key=lambda cuts: (sum(c > 1 for c in cuts), cuts))


@dataclass(frozen=True)
class TileProposal:
    """A tile for a grid. `waste`: padded slots for each token; `tile_grid`: tiles along each axis, the steps of a window.

    `stored` and `waste` are as the Hopper kernel has them (alignment 64).
    """

    tile: Shape3
    stored: int
    tile_grid: Shape3
    waste: float


def propose_tiles(grid: Shape3) -> list[TileProposal]:
    """Tiles for a grid, best first: little padding, windows of fine steps, sub-tiles for finer scales. The same on every device.

    Tiles store 128, 256 or 384 tokens, whole blocks of the Hopper kernel; 64 only where that saves much padding. A grid of fewer
    than 2,048 tokens would be a handful of such tiles, and every window one of them: it is cut into at least 15, at least two
    along each axis that has two tokens, of any size up to 128; larger ones come after all of those.
    """
    return list(_proposals(check_shape3("grid", grid, "tokens")))


@functools.lru_cache(maxsize=256)
def _proposals(grid: Shape3) -> tuple[TileProposal, ...]:
    found = [p for p in _candidates(grid, max(_COST_OF_SIZE)) if p.stored in _COST_OF_SIZE]
    found.sort(key=lambda p: (_cost(grid, p), p.tile))
    if math.prod(grid) >= _SMALL_GRID:
        return tuple(found)
    small = [p for p in _candidates(grid, 128) if _has_windows(grid, p)]
    small.sort(key=lambda p: (_small_cost(grid, p), p.tile))
    return tuple(dict.fromkeys(small + found))


def _candidates(grid: Shape3, most: int) -> Iterator[TileProposal]:
    """Every tile of up to `most` tokens."""
    for f in range(1, min(grid[0], most) + 1):
        for y in range(1, min(grid[1], most // f) + 1):
            for x in range(1, min(grid[2], most // (f * y)) + 1):
                stored = _parts((f, y, x)) * GROUP
                counts = (-(-grid[0] // f), -(-grid[1] // y), -(-grid[2] // x))
                yield TileProposal((f, y, x), stored, counts, math.prod(counts) * stored / math.prod(grid) - 1)


# What a choice is worth beside padding, as a share of the attention's time. Judgement, not measurement: 256 slots take four
# scales and are half as many rows in the table as 128; 384 makes coarse windows; 64 fills half a block of the kernel.
_COST_OF_SIZE = {64: 0.3, 128: 0.02, 256: 0.0, 384: 0.02}
_COST_OF_RASTER_ORDER = 0.04  # finer scales then follow lines of tokens, not blocks
_COST_OF_ELONGATION = 0.02  # for each doubling of the longest side against the shortest
_COST_OF_A_CLOSED_AXIS = 0.06  # fewer than three tiles along an axis: no window can be narrow along it


def _cost(grid: Shape3, p: TileProposal) -> float:
    padding = (1 + p.waste) ** 2 - 1  # padded queries times padded keys
    # Ties are ties, in whatever order it is summed
    return round(padding + _COST_OF_SIZE[p.stored] + _cost_of_shape(grid, p), 9)


def _cost_of_shape(grid: Shape3, p: TileProposal) -> float:
    closed = sum(count < 3 <= length for count, length in zip(p.tile_grid, grid, strict=True))
    return (
        _COST_OF_RASTER_ORDER * (_sub_tile(p.tile) is None)
        + _COST_OF_ELONGATION * math.log2(max(p.tile) / min(p.tile))
        + _COST_OF_A_CLOSED_AXIS * closed
    )


# A grid of fewer tokens is a toy's or a test's, most often on a CPU: large tiles gain nothing there.
_SMALL_GRID = 2048
_FEWEST_TILES = 15  # of 12, the default schedule's early and late window would both be two
_GOOD_TILES = 24  # a window of two tiles along each axis is a third of the grid
_COST_OF_OTHER_TILES = 0.2  # for each halving or doubling of that: coarser windows, or smaller matmuls


def _has_windows(grid: Shape3, p: TileProposal) -> bool:
    """Whether there are tiles to choose from, in all and along each axis, as far as there are tokens."""
    along = all(count >= min(2, length) for count, length in zip(p.tile_grid, grid, strict=True))
    return along and math.prod(p.tile_grid) >= min(_FEWEST_TILES, math.prod(grid))


def _small_cost(grid: Shape3, p: TileProposal) -> float:
    tiles = math.prod(p.tile_grid)
    stored = tiles * _parts(p.tile) * _part_slots(p.tile, 8)
    padding = (stored / math.prod(grid)) ** 2 - 1
    return round(padding + _COST_OF_OTHER_TILES * abs(math.log2(tiles / _GOOD_TILES)) + _cost_of_shape(grid, p), 9)
