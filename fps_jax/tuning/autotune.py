"""The autotuner's engine: one attention call by a real 3D window, and how fast each tuning config of the Hopper kernel does it.

`sweep` runs in the process that calls it, and a config that hangs takes that along; `autotune_run` starts one a kernel:

    python -m fps_jax.tuning.autotune '{"task": {...}, "configs": [{...}], "best": 0.1}'
"""

import datetime
import functools
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fps_jax.attention.plan import AttentionPlan
from fps_jax.attention.tiles import TileLayout, check_shape3, propose_tiles
from fps_jax.attention.windows import propose_window
from fps_jax.errors import one_line
from fps_jax.processes import say
from fps_jax.sizes import Shape3
from fps_jax.tuning.defaults import CLASSES, SCALES, SPARSE_DENSITY
from fps_jax.tuning.timing import median_seconds
from pallas_kernels.platform import target_device
from pallas_kernels.sm90 import forward, quantize
from pallas_kernels.sm90.call_shape import CallShape
from pallas_kernels.sm90.config import BLOCK_KV, ForwardConfig, scales_per_block
from pallas_kernels.sm90.tuned import TuningKey

AGREE = 1e-2  # relative L2 from the safe config's output: a config that computes something else is out
SLOW = 1.5  # a config that takes this many times the best is not timed to the end
SAFE = ForwardConfig(stages=2)  # 2 stages, no cluster

# (a call, seconds above which it needn't be timed to the end) -> 'seconds' and what else there is to say, as `median_seconds`
Measure = Callable[[Callable[[], Any], float], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Self-attention in bf16, batch 1, on a token grid by a window that is proposed for a density.

    Attributes:
      grid: tokens (F, Y, X). tile: tokens of a tile; None for the first proposed one that the kernel takes.
      density: share of the token pairs; 1 is the whole grid.
      scales_per_tile: FP8 scales of a tile; None for bf16 without quantization.
    Raises: ValueError for sizes that the kernel doesn't do, or where no tile suits it.
    """

    grid: Shape3
    heads: int
    head_dim: int = 128
    density: float
    scales_per_tile: int | None
    tile: Shape3 | None = None

    def __post_init__(self):
        object.__setattr__(self, "grid", check_shape3("grid", self.grid, "tokens"))
        if isinstance(self.heads, bool) or not isinstance(self.heads, int) or self.heads < 1:
            raise ValueError(f"heads={self.heads!r} is not a positive whole number; Wan 14B has 40, 1.3B has 12")
        tile = _tile(self.grid) if self.tile is None else check_shape3("tile", self.tile, "tokens")
        object.__setattr__(self, "tile", tile)
        reason = self.call.unsupported()
        if reason is not None:
            raise ValueError(f"the Hopper kernel can't: {reason.split('; use')[0]}; choose another size")

    @functools.cached_property
    def plan(self) -> AttentionPlan:
        layout = TileLayout(self.grid, self.tile)  # pyright: ignore[reportArgumentType]  # set by __post_init__
        window = None if self.density == 1 else propose_window(layout, self.density)
        quantize = self.scales_per_tile is not None
        return AttentionPlan.build(
            self.grid, layout.tile, window, self.scales_per_tile, quantize, alignment=layout.alignment
        )

    @property
    def call(self) -> CallShape:
        """Its static side."""
        return self.plan.call_shape(head_dim=self.head_dim, dtype="bfloat16")

    @property
    def key(self) -> TuningKey:
        """What the tuned table calls it."""
        return TuningKey.of(self.call)

    @property
    def candidates(self) -> list[ForwardConfig]:
        """Every config to try."""
        return self.call.candidates()

    @property
    def flop(self) -> float:
        """Useful floating-point operations: QK and PV of the attended pairs of real tokens."""
        return 4 * self.plan.layout.num_tokens**2 * self.plan.density * self.head_dim * self.heads

    def inputs(self) -> list[jax.Array]:
        """q, k, v in tile order, bf16, random; padding holds numbers too, as it may."""
        like = (1, self.plan.layout.num_stored, self.heads, self.head_dim)
        return [jax.random.normal(key, like, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)]

    def measured_on(self) -> dict[str, Any]:
        """Machine, jax, date and this call, as a `TunedEntry` has them."""
        return {
            "gpu": target_device().device_kind,
            "jax": jax.__version__,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "grid": self.grid,
            "heads": self.heads,
            "tile": self.tile,
            "window": self.plan.window,
            "density": round(self.plan.density, 6),
            "scales_per_tile": self.scales_per_tile,
        }


def _tile(grid: Shape3) -> Shape3:
    """The first proposed tile that is whole blocks of the kernel."""
    for proposal in propose_tiles(grid):
        if proposal.stored % BLOCK_KV == 0:
            return proposal.tile
    raise ValueError(f"grid={grid} has no tile of {BLOCK_KV} stored tokens, a block of the kernel; choose a larger one")


def tasks(
    grid: Shape3,
    *,
    heads: int,
    head_dim: int = 128,
    sparse_density: float = SPARSE_DENSITY,
    classes: Sequence[str] = CLASSES,
    scales: Sequence[int] = SCALES,
) -> list[Task]:
    """One task for each key of the tuned table, most valuable first.

    Args:
      sparse_density: of the window that stands for the class 'sparse'; 'dense' is the whole grid.
      classes, scales: of the keys: 'sparse', 'dense'; 0 (bf16), 1, 2 scales of K in a block of 128 keys.
    Raises: ValueError as `Task`; for a granularity that the grid's tiles don't have; for a window wider than half of the grid.
    """
    layout = TileLayout(check_shape3("grid", grid, "tokens"), _tile(grid))
    found: list[Task] = []
    for count in (n for n in SCALES if n in scales):
        for name in (n for n in CLASSES if n in classes):
            density = sparse_density if name == "sparse" else 1.0
            task = Task(
                grid=grid, heads=heads, head_dim=head_dim, density=density, scales_per_tile=_granularity(layout, count)
            )
            if task.key.density != name:
                raise ValueError(
                    f"density={density} is the window {task.plan.window} of {layout.tile_grid} tiles, which is not {name!r} to the "
                    "tuned table; choose a lower density or a larger grid"
                )
            found.append(task)
    return found


def _granularity(layout: TileLayout, scales: int) -> int | None:
    """Scales of a tile that give a block of 128 keys so many; None for no quantization."""
    if scales == 0:
        return None
    per_tile = [n for n in layout.granularities if scales_per_block(layout.tokens_per_scale(n)) == scales]
    if not per_tile:
        raise ValueError(
            f"scales={scales}: tiles {layout.tile} of grid {layout.grid} have no such granularity; leave it out"
        )
    return per_tile[-1] if scales > 1 else per_tile[0]


def brief(config: ForwardConfig) -> str:
    """A config for people: stages and cluster, and what else is not the default."""
    plain = asdict(ForwardConfig())
    shown = {n: v for n, v in asdict(config).items() if n in ("stages", "cluster") or v != plain[n]}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def sweep(
    task: Task,
    configs: Iterable[ForwardConfig],
    *,
    best: float = math.inf,
    measure: Measure = median_seconds,
    starting: Callable[[ForwardConfig], None] = lambda config: None,
) -> Iterator[dict[str, Any]]:
    """Compares each config's output with the safe one's and times it.

    Args:
      best: seconds of the best config known before.
      measure: how to time a call. In interpret mode, which the caller opens, there is nothing to time.
      starting: told before each config, so that one that hangs is known.
    Yields: for each config 'key', 'config', 'ok', 'rel_l2_safe', 'measured_on'; of a right one what `measure` returns and 'tflops'.
    """
    pattern, where = task.plan.pattern, task.measured_on()
    operands = jax.jit(functools.partial(quantize.quantize, pattern=pattern))(*task.inputs())

    def call(config: ForwardConfig) -> jax.Array:
        # With the log-sum-exp, as the public op calls it.
        return forward.attention(operands, pattern, batch=1, dtype=jnp.dtype(jnp.bfloat16), config=config)[0]

    want = jax.block_until_ready(call(SAFE))
    for config in configs:
        starting(config)
        error = float(_rel_l2(call(config), want))
        result = {
            "key": asdict(task.key),
            "config": asdict(config),
            "ok": error <= AGREE,
            "rel_l2_safe": error,
            "measured_on": where,
        }
        if result["ok"]:
            result |= measure(functools.partial(call, config), SLOW * best)
            seconds = result["seconds"]
            # Interpret mode has words in place of seconds.
            result["tflops"] = seconds if isinstance(seconds, str) else task.flop / seconds / 1e12
            if not isinstance(seconds, str):
                best = min(best, seconds)
        yield result


@jax.jit
def _rel_l2(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())


def answer(asked: Mapping[str, Any], *, measure: Measure = median_seconds) -> None:
    """Says what was asked for: `{"device": true}` the GPU, else a sweep, each config announced before it starts."""
    if "device" in asked:
        say({"missing": forward.missing_device(), "gpu": target_device().device_kind, "jax": jax.__version__})
        return
    configs = [ForwardConfig(**config) for config in asked["configs"]]
    best = math.inf if asked["best"] is None else asked["best"]
    results = sweep(
        Task(**asked["task"]),
        configs,
        best=best,
        measure=measure,
        starting=lambda config: say({"starting": asdict(config)}),
    )
    for result in results:
        say(result)


def main(*, measure: Measure = median_seconds) -> None:
    """The process: `answer`, and for an error its one line last on stderr."""
    try:
        answer(json.loads(sys.argv[1]), measure=measure)
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {one_line(error)}")


if __name__ == "__main__":
    main()
