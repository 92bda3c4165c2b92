"""Attention on a mesh: queries stay where they are, keys and values of a sample come together.

A sample's tokens are shared out over the axis `context`, its heads over `tensor`, samples over `data` and `fsdp`. Each device
gathers the keys and values of its heads along `context`, rounded to FP8 where the plan rounds, and attends with its own queries, by
its own rows of the table; dK and dV are summed by a reduce-scatter. FP8 scales are those of one device, bit for bit.

Both kinds of attention run inside a `shard_map`: neither a kernel nor cuDNN's attention lets XLA share out its operands.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from fps_jax.attention.attend import SAVED, DenseAttention, PlannedAttention, TokenAttention, dense_attention
from fps_jax.attention.tiles import TileLayout
from fps_jax.mesh import BATCH
from pallas_kernels.block_sparse import gathered
from pallas_kernels.pattern import TilePattern
from pallas_kernels.platform import target_platform


@dataclass(frozen=True)
class PaddedLayout(TileLayout):
    """A layout with empty tiles at its end, so that its number of tiles is a multiple of `multiple`."""

    multiple: int = 1

    @property
    def num_tiles(self) -> int:
        return -(-math.prod(self.tile_grid) // self.multiple) * self.multiple


@dataclass(frozen=True)
class ShardedAttention(TokenAttention):
    """`inner` on a mesh with the axes `fps_jax.mesh.AXES`, alike on every device. Raster order needs tokens that `context` divides.

    Samples that `data` x `fsdp` doesn't divide are computed by all of them.
    """

    inner: DenseAttention | PlannedAttention
    mesh: Mesh

    @property
    def layout(self) -> TileLayout | None:
        layout = self.inner.layout
        if layout is None:
            return None
        return PaddedLayout(layout.grid, layout.tile, layout.alignment, self.mesh.shape["context"])

    def place(self, x: Array, *, tokens: bool = True, samples: bool = True) -> Array:
        rest = (None,) * (x.ndim - 2)
        spec = PartitionSpec(self._rows(x) if samples else None, self._tokens(x) if tokens else None, *rest)
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def place_text(self, x: Array) -> Array:
        return self.place(x, tokens=self._shares_text(x))

    def cross(self, q: Array, k: Array, v: Array) -> Array:
        shared_out = self._shares_text(k)
        queries, keys = self._spec(q), self._spec(k, shared_out)

        def local(q, k, v):
            if shared_out:
                return dense_attention(q, gathered(k, "context"), gathered(v, "context"))
            # Each device's part of dK and dV is its own; their sum over `context` is the gradient.
            return dense_attention(q, *(lax.pcast(x, "context", to="varying") for x in (k, v)))

        return self._map(local, (queries, keys, keys), queries)(q, k, v)

    def __call__(self, q: Array, k: Array, v: Array, /, *, layer: Array, taps: dict[str, Array] | None) -> Array:
        tokens = self._spec(q)
        if isinstance(self.inner, DenseAttention):
            if self._tokens(q) is None:
                raise ValueError(
                    f"{q.shape[1]} tokens are no multiple of the mesh's context={self.mesh.shape['context']}, as dense "
                    "attention needs; use another context, or a schedule, whose tiles are padded"
                )

            def dense(q, k, v):
                return dense_attention(q, gathered(k, "context"), gathered(v, "context"), name=SAVED)

            return self._map(dense, (tokens,) * 3, tokens)(q, k, v)
        inner, plan, layout = self.inner, self.inner.plan, self.layout
        assert layout is not None
        extra = layout.num_tiles - plan.layout.num_tiles
        over = "context" if self.mesh.shape["context"] > 1 else None
        heads = ("tensor",) if plan.per_head else ()
        whole = [(0, 0)] * len(heads)
        # An empty tile's queries are all padding: they attend the first tile, and the output is 0.
        tiles = np.pad(plan.key_tiles, (*whole, (0, extra), (0, 0)))
        counts = np.pad(plan.counts, (*whole, (0, extra)), constant_values=1)

        def planned(q, k, v, layer, tiles, counts, q_valid, k_valid):
            # Not `build`, which refuses an empty tile: those at the end stand in no row but their own.
            pattern = TilePattern(
                key_tiles=tiles,
                counts=counts,
                q_valid=q_valid,
                k_valid=k_valid,
                tile_size=layout.stored,
                tokens_per_scale=plan.tokens_per_scale,
                center_k=plan.center_k,
                tokens_per_value_scale=plan.tokens_per_value_scale,
            )
            return inner.rows(q, k, v, pattern, layer=layer, over=over)

        spec = PartitionSpec
        tables = (spec(*heads, "context", None), spec(*heads, "context"), spec("context"), spec())
        run = self._map(planned, (tokens, tokens, tokens, spec(), *tables), tokens)
        valid = jnp.asarray(layout.valid)
        return run(q, k, v, jnp.asarray(layer), jnp.asarray(tiles), jnp.asarray(counts), valid, valid)

    def _rows(self, x: Array) -> tuple[str, ...] | None:
        """Axes that share out the samples of x."""
        return None if x.shape[0] % math.prod(self.mesh.shape[axis] for axis in BATCH) else BATCH

    def _tokens(self, x: Array) -> str | None:
        """The axis that shares out the tokens of x; None where it doesn't divide them, and every device has all."""
        return None if x.shape[1] % self.mesh.shape["context"] else "context"

    def _shares_text(self, x: Array) -> bool:
        """Whether each device along `context` makes keys and values of its part of the text, and gathers the others'.

        Gradients of their weights, which are summed over samples, then are of `context`'s parts too, and scattered to the shards;
        else XLA sums them whole. Where no other device has samples there is no such sum.
        """
        return math.prod(self.mesh.shape[axis] for axis in BATCH) > 1 and self._tokens(x) is not None

    def _spec(self, x: Array, tokens: bool = True) -> PartitionSpec:
        return PartitionSpec(self._rows(x), self._tokens(x) if tokens else None, "tensor", None)

    def _map(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        # What the Hopper kernel returns says nothing of the axes that it varies over
        check = target_platform() != "gpu"
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check)


def on_mesh(attention: TokenAttention, mesh: Mesh | None) -> TokenAttention:
    """`attention` on that mesh; as it is on one device, None."""
    if mesh is None:
        return attention
    assert isinstance(attention, DenseAttention | PlannedAttention)
    return ShardedAttention(attention, mesh)


def on_one_device(attention: TokenAttention) -> TokenAttention:
    """What `on_mesh` was given."""
    return attention.inner if isinstance(attention, ShardedAttention) else attention
