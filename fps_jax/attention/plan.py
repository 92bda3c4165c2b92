"""What one attention call needs to know beside q, k and v: tile order, key tiles, granularity. Built once, outside jit."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Int, Shaped

from fps_jax.attention.tiles import TileLayout, propose_tiles
from fps_jax.attention.windows import (
    KeyTiles,
    block_causal_tiles,
    check_causal,
    clip_window,
    per_head_tiles,
    window_density,
    window_tiles,
)
from fps_jax.causal import CausalConfig
from fps_jax.sizes import Shape3
from pallas_kernels.block_sparse import tile_alignment
from pallas_kernels.pattern import TilePattern
from pallas_kernels.sm90.call_shape import CallShape

Window = Shape3 | tuple[Shape3, ...]  # for all heads, or one a head


@dataclass(frozen=True)
class AttentionPlan:
    """Tiles, window and quantization of self-attention on one token grid. Make it with `build`.

    Hashable, and equal where the fields are: jit compiles once for equal plans.

    Attributes:
      layout: the tile order.
      window: tiles along (F, Y, X) that a query tile attends, clipped to the tile grid; one for all heads, or one a head.
      scales_per_tile: FP8 scales of Q and K in a tile (granularity); None for no quantization.
      center_k: K minus its mean over tokens is quantized; False without quantization.
      causal: each block of frames attends itself and those before it, as when it is made from a cache; None for all frames.
      teacher_forcing: the grid has the video twice, clean and then noisy, and noisy blocks attend the clean ones before them.
    """

    layout: TileLayout
    window: Window
    scales_per_tile: int | None
    center_k: bool = False
    causal: CausalConfig | None = None
    teacher_forcing: bool = False

    @classmethod
    def build(
        cls,
        grid: Shape3,
        tile: Shape3 | None = None,
        window: Shape3 | Sequence[Shape3] | None = None,
        scales_per_tile: int | None = 1,
        quantize: bool = True,
        alignment: int | None = None,
        center_k: bool = False,
        causal: CausalConfig | None = None,
        teacher_forcing: bool = False,
    ) -> "AttentionPlan":
        """A plan, checked.

        Args:
          grid: tokens (F, Y, X): latent frames, and rows and columns of 16 x 16 pixels.
          tile: tokens of a tile; None for the proposed one.
          window: key tiles along each axis, clipped to the tile grid; one triple, or one a head; None for the whole grid.
          scales_per_tile: 1 is the paper's coarse granularity; up to one for every 64 tokens, begun or whole.
          quantize: False for sparse attention without FP8.
          alignment: of the tiles' padding (`TileLayout`); None for what is fast on the device that programs are built for. It
            changes how tokens are stored, and no result but for the order of sums.
          center_k: take the mean off K before it is rounded: exact in the softmax, and what keys have in common costs no precision.
          causal: for a block diffusion model; with one window whose time axis is whole, for tiles that no block cuts, without
            `center_k`. `portable` adds up in the order of frames, so that a block's bits are those from a cache. With quantization
            V has a scale for each channel of what enters and leaves that cache together.
          teacher_forcing: with `causal`, for training: the grid has 2 F frames, F clean ones (told time 0) and the same F noisy,
            both rotated for frames 0 to F - 1. A noisy block attends itself and the clean frames that it would find in a cache.
        Raises: ValueError for a tile that doesn't fit the grid, a window that isn't positive, a granularity the tile doesn't allow,
          frames that are no whole blocks; NotImplementedError for what a causal plan can't have.
        """
        if not isinstance(quantize, bool | np.bool_):
            raise ValueError(f"quantize={quantize!r} is not True or False")
        tile = propose_tiles(grid)[0].tile if tile is None else tile
        layout = TileLayout(grid, tile, tile_alignment() if alignment is None else alignment)
        if scales_per_tile is not None:
            layout.tokens_per_scale(scales_per_tile)
        if not isinstance(center_k, bool | np.bool_):
            raise ValueError(f"center_k={center_k!r} is not True or False")
        scales = int(scales_per_tile) if quantize and scales_per_tile else None
        plan = cls(
            layout, _window(window, layout), scales, bool(center_k) and scales is not None, causal, teacher_forcing
        )
        if causal is not None:
            plan._check_causal(causal)
        elif teacher_forcing:
            raise ValueError(
                "teacher_forcing=True without causal: a model that sees all frames at once has no context; leave it out"
            )
        return plan

    def _check_causal(self, causal: CausalConfig) -> None:
        if self.per_head:
            raise NotImplementedError("a causal plan has one window for all heads; give one")
        if self.center_k:
            raise NotImplementedError(
                "center_k=True takes the mean of all frames off the keys, those to come among them; leave it out of a causal plan"
            )
        check_causal(self.layout, self.windows[0], causal)
        if self.teacher_forcing and self.grid[0] % 2:
            raise ValueError(
                f"grid={self.grid} has an odd number of frames; teacher forcing has each of them clean and noisy"
            )
        causal.check_frames(self.grid[0] // (2 if self.teacher_forcing else 1))

    def dense(self) -> "AttentionPlan":
        """Whole-grid, unquantized attention in the same token order, to the same frames."""
        return dataclasses.replace(self, window=self.layout.tile_grid, scales_per_tile=None, center_k=False)

    def aligned(self, alignment: int) -> "AttentionPlan":
        """The same plan, its tiles padded to another alignment."""
        return dataclasses.replace(self, layout=dataclasses.replace(self.layout, alignment=alignment))

    @property
    def grid(self) -> Shape3:
        return self.layout.grid

    @property
    def tile(self) -> Shape3:
        return self.layout.tile

    @property
    def quantize(self) -> bool:
        return self.scales_per_tile is not None

    @property
    def tokens_per_scale(self) -> int | None:
        """Stored tokens that share a scale of Q or K; None without quantization."""
        return None if self.scales_per_tile is None else self.layout.tokens_per_scale(self.scales_per_tile)

    @property
    def tokens_per_value_scale(self) -> int | None:
        """Stored tokens that share V's scales: those of a cache's slot; None for all, and without quantization."""
        if self.causal is None or not self.quantize:
            return None
        return self.causal.slot_frames // self.tile[0] * math.prod(self.layout.tile_grid[1:]) * self.layout.stored

    @property
    def windows(self) -> tuple[Shape3, ...]:
        """The windows of the heads; a single one where they share it."""
        return self.window if isinstance(self.window[0], tuple) else (self.window,)  # pyright: ignore[reportReturnType]

    @property
    def per_head(self) -> bool:
        return isinstance(self.window[0], tuple)

    @property
    def whole_grid(self) -> bool:
        """Every query attends every key."""
        return self.causal is None and all(window == self.layout.tile_grid for window in self.windows)

    @functools.cached_property
    def density(self) -> float:
        """Share of all (query, key) pairs of tokens that are attended, mean over heads; padding counts nowhere."""
        if self.causal is not None:
            tokens = self.layout.valid_counts
            used = np.arange(self.key_tiles.shape[1]) < self.counts[:, None]
            pairs = tokens * np.where(used, tokens[self.key_tiles], 0).sum(1, dtype=np.int64)
            return int(pairs.sum()) / self.layout.num_tokens**2
        return float(np.mean([window_density(self.layout, window) for window in self.windows]))

    @functools.cached_property
    def _table(self) -> KeyTiles:
        if self.causal is not None:
            return block_causal_tiles(self.layout, self.windows[0], self.causal, self.teacher_forcing)
        return (
            per_head_tiles(self.layout, self.windows) if self.per_head else window_tiles(self.layout, self.windows[0])
        )

    @property
    def key_tiles(self) -> Int[np.ndarray, "*N Tq K"]:
        """Key tiles of each query tile, int32, rising; unused slots 0. A leading head axis where windows differ by head."""
        return self._table.tiles

    @property
    def counts(self) -> Int[np.ndarray, "*N Tq"]:
        """Used slots of each row of `key_tiles`, int32."""
        return self._table.counts

    @property
    def pattern(self) -> TilePattern:
        """All of it for `block_sparse_attention` or a kernel, checked. Made anew each time, as jit wants it."""
        return TilePattern.build(
            key_tiles=self.key_tiles,
            counts=self.counts,
            valid=self.layout.valid,
            tokens_per_scale=self.tokens_per_scale,
            center_k=self.center_k,
            tokens_per_value_scale=self.tokens_per_value_scale,
            ordered=self.causal is not None,
        )

    def call_shape(self, *, head_dim: int, dtype: str) -> CallShape:
        """The static side of attention by this plan, as kernels are chosen and tuned for."""
        return CallShape(
            head_dim=head_dim,
            dtype=dtype,
            tile_size=self.layout.stored,
            tokens_per_scale=self.tokens_per_scale,
            table_density=self.key_tiles.shape[-1] / self.layout.num_tiles,
            value_groups=self.tokens_per_value_scale is not None,
        )

    def to_tiles(self, x: Shaped[Array, "B S *rest"]) -> Shaped[Array, "B S_stored *rest"]:
        """Raster order to tile order, 0 at padding."""
        return self.layout.to_tiles(x)

    def from_tiles(self, x: Shaped[Array, "B S_stored *rest"]) -> Shaped[Array, "B S *rest"]:
        """Tile order back to raster order."""
        return self.layout.from_tiles(x)

    def brief(self) -> str:
        """The choice for a person: 'window (3, 3, 5), density 0.33, FP8 with 2 scales a tile'."""
        if self.whole_grid and not self.quantize:
            return "dense"
        scales = self.scales_per_tile
        quantized = "not quantized" if scales is None else f"FP8 with {scales} scale{'s' * (scales > 1)} a tile"
        quantized += ", centred K" if self.center_k else ""
        window = "the whole grid" if self.whole_grid else f"window {self.window}, density {self.density:.3f}"
        window += ", block-causal" if self.causal is not None else ""
        window += " with teacher forcing" if self.teacher_forcing else ""
        return f"{window}, {quantized}"


def _window(window: object, layout: TileLayout) -> Window:
    if window is None:
        return layout.tile_grid
    if isinstance(window, list | tuple) and len(window) and all(isinstance(w, list | tuple) for w in window):
        return tuple(clip_window(w, layout) for w in window)
    return clip_window(window, layout)  # pyright: ignore[reportArgumentType]  # refuses what is no triple
