"""A KV cache for block diffusion: what earlier blocks left, in slots of a ring, and the attention of one block to it.

A slot holds the keys and values of as many latent frames as enter and leave together (a block, where the model's window allows
it) in tile order, rotated for their own place in the video; nothing is moved or rotated again. The slots of the sink stay, the
others are a ring. Which slots a block attends is a table, data to the compiled program, so one program serves every fill and every
position of the ring. The table lists frames in the order of the video, wherever they lie: with the pattern's ordered sums a block's
attention is bit for bit the masked forward's (`AttentionPlan.build(causal=)`), in FP8 too: what a slot is rounded to rests on
nothing outside of it.
Source: guandeh17/Self-Forcing wan/modules/causal_model.py, whose cache moves its frames; only which are attended matters.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from fps_jax.attention.attend import TokenAttention
from fps_jax.attention.tiles import TileLayout, TileProposal, propose_tiles
from fps_jax.attention.windows import check_causal, clip_window, context_tiles
from fps_jax.causal import CausalConfig
from fps_jax.sizes import Shape3
from pallas_kernels.block_sparse import Implementation, attention_to_codes, block_sparse_attention, tile_alignment
from pallas_kernels.pattern import TilePattern
from pallas_kernels.reference import FP8, KeyValueCodes, key_value_codes

MAX_FRAMES = 4096  # latent frames in a cache: 17 minutes at 16 frames/s


class KVCache(NamedTuple):
    """Keys and values of all layers, in the compute dtype or as e4m3 codes with float32 scales (`reference.KeyValueCodes`).

    Codes are uint8, their bits: XLA for CPUs writes into an array of e4m3 by making all of it float16 and back.
    Zero where nothing was written: unlisted slots have to be finite.
    """

    k: Float[Array, "L B S_cache N H"]
    v: Float[Array, "L B S_cache N H"]
    k_scale: Float[Array, "L B k_groups N"] | None = None
    v_scale: Float[Array, "L B slots N H"] | None = None


class Context(NamedTuple):
    """What one block attends and where it will be kept, int32: data to the compiled program.

    key_tiles: tiles of the cache for each query tile, in the order of their frames, the block's own last; unused slots 0.
    counts: how many of a row are used.
    slots: of the block's own frames. Until it is finished they hold frames that it doesn't attend any more.
    """

    key_tiles: Int[np.ndarray, "Tq K"]
    counts: Int[np.ndarray, "Tq"]
    slots: Int[np.ndarray, "m"]


@dataclass(frozen=True)
class CacheLayout:
    """Where the latent frames of a video lie in a cache. Make it with `build`. Hashable: programs are compiled for it.

    Attributes:
      causal: blocks, window and sink.
      slot: the tile order of one slot.
      window: tiles along (F, Y, X) that a query tile attends in the frames that its block attends; F counts for nothing.
      frames: latent frames that there is room for.
      scales_per_tile: FP8 scales of Q and K in a tile; V has one for each slot and channel. None for no quantization.
    """

    causal: CausalConfig
    slot: TileLayout
    window: Shape3
    frames: int
    scales_per_tile: int | None = None

    @classmethod
    def build(
        cls,
        causal: CausalConfig,
        space: tuple[int, int],
        *,
        num_frames: int | None = None,
        tile: Shape3 | None = None,
        window: tuple[int, int] | None = None,
        alignment: int | None = None,
        scales_per_tile: int | None = None,
    ) -> "CacheLayout":
        """A layout, checked.

        Args:
          space: tokens (Y, X): rows and columns of 16 x 16 pixels.
          num_frames: latent frames that are to be made; None for no end, which takes a window.
          tile: tokens of a tile, along frames a divisor of `causal.slot_frames`; None for that of least padding, which suits
            attention to all rows and columns: a narrow window needs more tiles than that has in a small frame.
          window: key tiles along rows and columns; None for all.
          alignment: as of `AttentionPlan.build`.
          scales_per_tile: for a cache of FP8 codes, and attention in FP8; None for one in the compute dtype.
        Raises: ValueError for a tile or a number of frames that doesn't fit, and for an endless video without a window.
        """
        if num_frames is not None:
            causal.check_frames(num_frames, "num_frames")
        sizes = [size for size in (causal.window, num_frames) if size is not None]
        if not sizes:
            raise ValueError(
                "a model without a window attends all frames, so its cache grows with the video; "
                "give num_frames, or a window such as 21 frames"
            )
        if min(sizes) > MAX_FRAMES:
            n, alone = causal.frames_per_block, int(causal.first_frame_alone)
            fit = (MAX_FRAMES - alone) // n + alone
            raise ValueError(
                f"a block would attend {min(sizes)} latent frames, more than {MAX_FRAMES}, which {fit} blocks of {n} fit into; "
                "make fewer, or give a window, such as 21 frames"
            )
        size = causal.slot_frames
        grid = (size, *space)
        if tile is None:
            tile = _proposed_tile(grid)
        slot = TileLayout(grid, tile, tile_alignment() if alignment is None else alignment)
        whole = slot.tile_grid if window is None else clip_window((slot.tile_grid[0], *window), slot)
        check_causal(slot, whole, causal)
        if scales_per_tile is not None:
            slot.tokens_per_scale(scales_per_tile)
        return cls(causal, slot, whole, min(sizes) // size * size, scales_per_tile)

    @property
    def slots(self) -> int:
        return self.frames // self.causal.slot_frames

    def block_layout(self, num_frames: int) -> TileLayout:
        """The tile order of a block of so many frames: slots, one after the other."""
        return TileLayout((num_frames, *self.slot.grid[1:]), self.slot.tile, self.slot.alignment)

    def slot_of(self, index: int) -> int:
        """The slot of the frames that are `index`-th among all slots of the video."""
        sink = self.causal.sink // self.causal.slot_frames
        return index if index < sink else sink + (index - sink) % (self.slots - sink)

    def context(self, start: int, since: int = 0) -> Context:
        """What the block that starts at a latent frame attends. Raises ValueError where there is no room for it.

        since: of the frames behind the sink, those before this one are left out.
        """
        start, end = self.causal.block(start)
        size = self.causal.slot_frames
        if end > self.frames != self.causal.window:  # as large as the window it is a ring
            raise ValueError(
                f"the cache has room for {self.frames} latent frames and the next block ends at {end}; "
                "begin with a larger num_frames, or with a window and without num_frames, which has no end"
            )
        frames = [f for f in self.causal.attended(end)[::size] if f < self.causal.sink or f >= since]
        attended = [self.slot_of(frame // size) for frame in frames]
        along = self.slot.tile_grid[0]
        frame_tiles = [slot * along + i for slot in attended for i in range(along)]
        row = context_tiles(self.slot, frame_tiles, self.window)
        widest = self.slots * along * (row.shape[1] // len(frame_tiles))
        row = np.pad(row, ((0, 0), (0, widest - row.shape[1])))
        key_tiles = np.tile(row, ((end - start) // self.slot.tile[0], 1)).astype(np.int32)
        used = len(frame_tiles) * (widest // (self.slots * along))
        own = np.array([self.slot_of(i) for i in range(start // size, end // size)], np.int32)
        return Context(key_tiles, np.full(len(key_tiles), used, np.int32), own)

    def zeros(self, num_layers: int, batch: int, heads: int, head_dim: int, dtype: Any) -> KVCache:
        """An empty cache. dtype: the compute dtype, which codes don't have."""
        tokens = self.slots * self.slot.num_stored
        shape = (num_layers, batch, tokens, heads, head_dim)
        if self.tokens_per_scale is None:
            return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        k_scale = jnp.ones((num_layers, batch, tokens // self.tokens_per_scale, heads), jnp.float32)
        v_scale = jnp.ones((num_layers, batch, self.slots, heads, head_dim), jnp.float32)
        return KVCache(jnp.zeros(shape, jnp.uint8), jnp.zeros(shape, jnp.uint8), k_scale, v_scale)

    def kept(self, k: Float[Array, "B S N H"], v: Float[Array, "B S N H"]) -> KVCache:
        """A block's keys and values of one layer, tokens in tile order, as a cache of this layout keeps them: without L."""
        if self.tokens_per_scale is None:
            return KVCache(k, v)
        valid = jnp.asarray(np.tile(self.slot.valid, k.shape[1] // self.slot.num_stored))
        per_slot = self.slot.num_stored
        codes = key_value_codes(k, v, valid, tokens_per_scale=self.tokens_per_scale, tokens_per_value_scale=per_slot)
        k, v = (lax.bitcast_convert_type(x, jnp.uint8) for x in (codes.k, codes.v))
        return KVCache(k, v, codes.k_scale, codes.v_scale)

    @property
    def tokens_per_scale(self) -> int | None:
        """Stored tokens that share a scale of Q or K; None without quantization."""
        return None if self.scales_per_tile is None else self.slot.tokens_per_scale(self.scales_per_tile)

    def write(self, cache: KVCache, block: KVCache, slots: Array, *, axis: int = 2) -> KVCache:
        """The cache with a block's keys and values, as `kept` has them, in its slots. In place where the cache is donated.

        axis: of the tokens: 2 behind the layers, 1 in a single one's.
        """
        return jax.tree.map(lambda x, own: self._put(x, own, slots, axis), cache, block)

    def read(self, x: Float[Array, "L B S_cache N H"], end: int) -> Float[Array, "L B S N H"]:
        """`cache.k` or `cache.v` of the frames that are attended up to `end`, in the video's order, tokens in raster order."""
        size, stored = self.causal.slot_frames, self.slot.num_stored
        slots = [self.slot_of(frame // size) for frame in self.causal.attended(end)[::size]]
        parts = [x[:, :, slot * stored : (slot + 1) * stored] for slot in slots]
        return jnp.concatenate([jax.vmap(self.slot.from_tiles)(part) for part in parts], axis=2)

    def _put(self, x: Array, own: Array, slots: Array, axis: int) -> Array:
        stored = x.shape[axis] // self.slots  # of tokens, or of groups of them
        for i in range(slots.shape[0]):
            part = lax.slice_in_dim(own, i * stored, (i + 1) * stored, axis=axis)
            x = lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), slots[i] * stored, axis)
        return x


def _row_major(tree: Any) -> Any:
    """Arrays as they lie in memory. XLA for GPUs else has all layers' cache lie as a kernel wants one's: a second cache."""
    return jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), tree)


def _proposed_tile(grid: Shape3) -> Shape3:
    """The tile of least padding for one slot; of 64 tokens, half a block of the Hopper kernel, only where that saves much."""

    def cost(p: TileProposal) -> tuple[float, float]:
        return round(p.waste + 0.3 * (p.stored < 128), 3), max(p.tile) / min(p.tile)

    return min((p for p in propose_tiles(grid) if grid[0] % p.tile[0] == 0), key=cost).tile


@dataclass(frozen=True)
class CachedAttention(TokenAttention):
    """One block's attention to itself and to what is in the cache. `taps` takes its part of the cache by the names of `KVCache`.

    Attributes:
      where: the cache's layout.
      num_frames: of the block.
      cache, context: arrays, inside a compiled program traced ones.
    """

    where: CacheLayout
    num_frames: int
    cache: KVCache
    context: Context
    implementation: Implementation = "auto"

    @property
    def layout(self) -> TileLayout:
        return self.where.block_layout(self.num_frames)

    def __call__(self, q: Array, k: Array, v: Array, /, *, layer: Array, taps: dict[str, Array] | None) -> Array:
        where, own = self.where, _row_major(self.where.kept(k, v))
        if taps is not None:
            taps.update({name: x for name, x in own._asdict().items() if x is not None})
        # One operand for the kernel: the block's own lie where they will be kept, over frames that are no longer attended.
        kept = _row_major(jax.tree.map(lambda x: x[layer], self.cache))
        kept = where.write(kept, own, jnp.asarray(self.context.slots), axis=1)
        pattern = TilePattern.build(
            key_tiles=self.context.key_tiles,
            counts=self.context.counts,
            valid=np.tile(where.slot.valid, where.slots),
            q_valid=self.layout.valid,
            tokens_per_scale=where.tokens_per_scale,
            tokens_per_value_scale=None if where.tokens_per_scale is None else where.slot.num_stored,
            ordered=True,
        )
        if kept.k_scale is None or kept.v_scale is None:
            return block_sparse_attention(q, kept.k, kept.v, pattern, implementation=self.implementation)
        keys, values = (lax.bitcast_convert_type(x, FP8) for x in (kept.k, kept.v))
        codes = KeyValueCodes(keys, values, kept.k_scale, kept.v_scale)
        return attention_to_codes(q, codes, pattern, implementation=self.implementation)
