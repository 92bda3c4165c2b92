"""Seconds of a call on a GPU, and the sizes that are measured."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_cases.results import NOT_MEASURED
from fps_jax.tuning import timing

BF16_LIMIT, FP8_LIMIT = 989e12, 1979e12  # FLOP/s of an H100 or H200, dense, by datasheet


@dataclass(frozen=True, kw_only=True)
class Size:
    """Self-attention of a model at a resolution. `tile`: None for the proposed one."""

    heads: int
    grid: tuple[int, int, int]
    head_dim: int = 128
    tile: tuple[int, int, int] | None = None

    @property
    def tokens(self) -> int:
        """Without padding: what a dense baseline has to do."""
        return math.prod(self.grid)

    def flop(self, density: float = 1.0) -> float:
        """Useful floating-point operations forward: QK and PV of the attended pairs of real tokens."""
        return 4 * self.tokens**2 * density * self.head_dim * self.heads


SIZES = {
    "14B": Size(heads=40, grid=(21, 45, 80)),  # Wan 14B, 720p, 81 frames
    "1.3B": Size(heads=12, grid=(21, 30, 52)),  # Wan 1.3B, 480p, 81 frames
}
_TOY = Size(heads=1, grid=(4, 8, 16), head_dim=64, tile=(2, 8, 16))


def size_of(name: str, toy: bool) -> Size:
    return _TOY if toy else SIZES[name]


def median_seconds(call: Callable[[], Any], toy: bool, rounds: int = 7) -> dict[str, Any]:
    """As `fps_jax.tuning.timing.median_seconds`. At toy size the call runs once, and isn't timed."""
    if not toy:
        return timing.median_seconds(call, rounds=rounds)
    import jax

    jax.block_until_ready(call())
    return {"seconds": NOT_MEASURED}


def rates(timing: dict[str, Any], flop: float, limit: float) -> dict[str, Any]:
    """The timing with TFLOP/s of useful work and their share of the tensor cores' datasheet limit."""
    seconds = timing["seconds"]
    if isinstance(seconds, str):
        return {**timing, "tflops": NOT_MEASURED, "share_of_limit": NOT_MEASURED}
    return {**timing, "tflops": flop / seconds / 1e12, "share_of_limit": flop / seconds / limit}
