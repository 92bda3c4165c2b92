"""The static side of an attention call, and all that the Hopper forward kernel makes of it. Imports no jax.

A config that would not fit shared memory fails to launch: it is refused here, before anything is launched.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

from pallas_kernels.sm90.config import (
    BLOCK_KV,
    BLOCK_Q,
    BLOCK_ROWS,
    CONSUMERS,
    SHARED_MEMORY,
    VALID_ROWS,
    ForwardConfig,
    scales_per_block,
)

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BARRIER = 8  # bytes
_OVERHEAD = 2049  # bytes that Mosaic and ptxas add, read from every kernel of benchmarks/results/kernel_report.json


@dataclass(frozen=True, kw_only=True)
class CallShape:
    """What is static of a call and decides how it is computed: by which implementation, and with which config.

    Attributes:
      dtype: name of q's, k's, v's and the output's: 'float32', 'bfloat16' or 'float16'.
      tile_size: stored tokens of a tile. tokens_per_scale: those that share a scale of Q or K; None without quantization.
      table_density: width of the table by the number of key tiles; 1 where every row has room for all.
      value_groups: V has scales for groups of tokens.
    Raises: ValueError for another dtype.
    """

    head_dim: int
    dtype: str
    tile_size: int
    tokens_per_scale: int | None
    table_density: float
    value_groups: bool = False

    def __post_init__(self):
        if self.dtype not in _BYTES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(_BYTES)}; convert q, k and v")

    @classmethod
    def of(cls, pattern: Any, *, head_dim: int, dtype: Any) -> "CallShape":
        """Of a call by a `TilePattern`. dtype: a NumPy one."""
        return cls(
            head_dim=head_dim,
            dtype=str(dtype),
            tile_size=pattern.tile_size,
            tokens_per_scale=pattern.tokens_per_scale,
            table_density=pattern.key_tiles.shape[-1] / pattern.num_key_tiles,
            value_groups=pattern.tokens_per_value_scale is not None,
        )

    @property
    def operand_bytes(self) -> int:
        """Of an element of q, k, v as the kernel reads them: 1 in FP8 mode, 2 in bf16 mode."""
        return _BYTES[self.dtype] if self.tokens_per_scale is None else 1

    @property
    def output_bytes(self) -> int:
        """Of an element of the output."""
        return _BYTES[self.dtype]

    @property
    def blocks_per_tile(self) -> int:
        """Blocks of 128 keys, and of as many query rows, of a tile."""
        return self.tile_size // BLOCK_KV

    @property
    def scales(self) -> int:
        """Scales of K in a block of 128 keys; 0 without quantization."""
        return 0 if self.tokens_per_scale is None else scales_per_block(self.tokens_per_scale)

    def unsupported(self) -> str | None:
        """Why the kernel can't compute such a call; None where it can. Says nothing of the device (`forward.missing_device`)."""
        if self.head_dim not in (64, 128):
            return f"head dim {self.head_dim} is not 64 or 128; use 'portable'"
        if self.tile_size % BLOCK_KV:
            return (
                f"tiles of {self.tile_size} stored tokens are not whole blocks of {BLOCK_KV}; "
                f"use tiles that store 128, 256 or 384 with alignment={BLOCK_Q}"
            )
        if self.tokens_per_scale is None:
            if self.dtype == "float32":
                return f"{self.dtype} without quantization has no tensor-core matmul; pass bfloat16 or float16"
        elif self.tokens_per_scale % BLOCK_Q:
            return f"tokens_per_scale={self.tokens_per_scale} is not a multiple of {BLOCK_Q}, the rows of a matrix instruction"
        return None

    def shared_memory_bytes(self, config: ForwardConfig) -> int:
        """Of a thread block: queries, the ring of key blocks, the output's staging, log-sum-exp, barriers."""
        q = BLOCK_ROWS * self.head_dim * self.operand_bytes
        k = BLOCK_KV * self.head_dim * self.operand_bytes
        v = (self.head_dim + VALID_ROWS) * BLOCK_KV * self.operand_bytes
        out = BLOCK_ROWS * self.head_dim * self.output_bytes
        lse = BLOCK_ROWS * 4
        barriers = (2 * CONSUMERS + 4 * config.stages) * _BARRIER
        aligned = [-(-n // 1024) * 1024 for n in (q, config.stages * k, config.stages * v, out, lse)]
        return sum(aligned) + barriers + _OVERHEAD

    def check_fits(self, config: ForwardConfig) -> None:
        """Raises ValueError for a config that needs more shared memory than a thread block may have."""
        need = self.shared_memory_bytes(config)
        if need > SHARED_MEMORY:
            raise ValueError(
                f"stages={config.stages} at head dim {self.head_dim} needs {need} bytes of shared memory, a block has "
                f"{SHARED_MEMORY}; use fewer stages"
            )

    def candidates(self) -> list[ForwardConfig]:
        """Every config that fits: what the autotuner measures, and what is lowered and compiled in CI."""
        found: list[ForwardConfig] = []
        for persistent, take_turns, cluster, stages in itertools.product(
            (False, True), (False, True), (1, 2), (2, 4, 8)
        ):
            config = ForwardConfig(stages=stages, cluster=cluster, persistent=persistent, take_turns=take_turns)
            if persistent and self.operand_bytes == 2:  # the copier's second loop spills 68 bytes with 24 registers
                config = replace(config, consumer_registers=232, producer_registers=40)
            if self.shared_memory_bytes(config) <= SHARED_MEMORY and self.blocks_per_tile % cluster == 0:
                found.append(config)
                if self.operand_bytes == 1 and stages == 4 and not persistent:
                    found += [replace(config, polynomial_columns=columns) for columns in (16, 32)]
        return found
