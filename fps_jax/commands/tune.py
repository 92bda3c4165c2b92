"""fps-tune: the fastest configs of the Hopper attention kernel on your GPU, written to the tuned table that attention reads."""

import os
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

from fps_jax.errors import parse, run_cli
from fps_jax.progress import Quiet
from fps_jax.sizes import latent_grid, token_grid
from fps_jax.tuning.defaults import CLASSES, DEADLINE, SCALES, SPARSE_DENSITY, DensityClass, Scales

# (heads, height, width) of 81 frames
_PRESETS = {
    "14B-720p": (40, 720, 1280),
    "14B-480p": (40, 480, 832),
    "1.3B-480p": (12, 480, 832),
}


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Time every tuning config of the Hopper attention kernel and keep the fastest.

    For each key of the tuned table (sparse or dense; bf16, or FP8 with one or two scales in a block of 128 keys) every config that
    fits is run on random data with a real 3D window. One whose output isn't that of a safe config is out. A config that hangs
    the GPU is ended, reported, and nothing more like it is tried.
    """

    preset: Literal["14B-720p", "14B-480p", "1.3B-480p"] = "14B-720p"
    """Model and size to tune for: 81 frames of 1280 x 720 or 832 x 480."""
    grid: tuple[int, int, int] | None = None
    """Tokens along frames, rows and columns, in place of the preset's: (frames - 1) / 4 + 1, height / 16, width / 16."""
    heads: int | None = None
    """Attention heads, in place of the preset's."""
    head_dim: int = 128
    """64 or 128; every Wan model has 128."""
    density: float = SPARSE_DENSITY
    """Density of the window that stands for all sparse ones."""
    classes: tuple[DensityClass, ...] = CLASSES
    """Keys to measure, by density. Keys that aren't measured keep their entries."""
    scales: tuple[Scales, ...] = SCALES
    """Keys to measure, by FP8 scales in a block of 128 keys; 0 is bf16."""
    output: pathlib.Path | None = None
    """The table to write; the one that attention reads if left out: FPS_TUNED_TABLE, else the installed package's own."""
    deadline: float = DEADLINE
    """Seconds without an answer that mean a hang. Starting takes about 20."""
    dry_run: bool = False
    """List what would be measured; needs no GPU."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-tune."""
    sys.exit(run_cli(lambda args: _tune(parse(Tune, args, prog="fps-tune")), argv))


def _tune(options: Tune) -> None:
    if not 1 <= options.deadline <= 3600:
        raise ValueError(f"deadline={options.deadline} is not in 1 to 3600 seconds; 90 are enough for a large grid")
    from fps_jax.tuning import autotune, autotune_run
    from pallas_kernels.sm90 import tuned

    heads, height, width = _PRESETS[options.preset]
    tasks = autotune.tasks(
        token_grid(latent_grid(height, width, 81)) if options.grid is None else options.grid,
        heads=heads if options.heads is None else options.heads,
        head_dim=options.head_dim,
        sparse_density=options.density,
        classes=options.classes,
        scales=options.scales,
    )
    if not tasks:
        raise ValueError("classes and scales name no key; leave them out for all")
    output = tuned.table_path() if options.output is None else options.output.absolute()
    table = _old_entries(output)
    if options.dry_run:
        print(_plan_text(tasks))
        print(f"would write {output}")
        return
    found = autotune_run.find_device(deadline=options.deadline)
    start = time.monotonic()
    _tell(f"{found['gpu']}, jax {found['jax']}: {_amount(tasks)}")
    all_results = []
    for _, results in autotune_run.run(tasks, tell=_tell, deadline=options.deadline):
        all_results.append(results)
        best = tuned.fastest(results)
        if best:  # after every key, for whoever ends it early
            table |= best
            tuned.write_tuned_table(table, path=output)
    print(_table_text(tasks, all_results))
    without = [autotune_run.key_name(t.key) for t, r in zip(tasks, all_results, strict=True) if not tuned.fastest(r)]
    if len(without) < len(tasks):
        print(f"wrote {output} in {time.monotonic() - start:.0f} s")
        if output != tuned.table_path():
            print(f"attention reads it where {tuned.TABLE_VARIABLE}={output} is set")
    if without:
        raise ValueError(
            f"no config measured for {'; '.join(without)}: see above; what the table had for them it still has"
        )


def _old_entries(output: pathlib.Path) -> dict[Any, Any]:
    """What the table holds before: the output's entries, else the package's own. Raises OSError if it couldn't be written after."""
    from pallas_kernels.sm90 import tuned

    folder = output.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"output folder {str(folder)!r} doesn't exist; make it first")
    if output.is_dir():
        raise IsADirectoryError(f"output={str(output)!r} is a folder; name a file")
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"output folder {str(folder)!r} can't be written; give another --output FILE and set {tuned.TABLE_VARIABLE}=FILE"
        )
    return tuned.read_tuned_table(output if output.exists() else tuned.TUNED_TABLE)


def _amount(tasks: Any) -> str:
    from fps_jax.tuning import autotune_run

    configs = sum(len(task.candidates) for task in tasks)
    minutes = autotune_run.expected_seconds(tasks) / 60
    return f"{configs} configs for {len(tasks)} keys, very roughly {minutes:.0f} min"


def _plan_text(tasks: Any) -> str:
    """What would be measured."""
    from fps_jax.tuning import autotune, autotune_run

    first = tasks[0]
    f, y, x = first.grid
    lines = [
        f"grid {f} x {y} x {x}, {first.heads} heads of {first.head_dim}, tiles of {first.tile}: {_amount(tasks)}",
    ]
    for task in tasks:
        lines += ["", f"{autotune_run.key_name(task.key)}: {task.plan.brief()}"]
        for group in autotune_run.groups(task.candidates):
            lines += [
                f"  {autotune.brief(config):40} {task.call.shared_memory_bytes(config):9,} bytes of shared memory"
                for config in group.configs
            ]
    return "\n".join(lines)


def _table_text(tasks: Any, all_results: list[list[dict[str, Any]]]) -> str:
    """The fastest config of each key, and what was out."""
    from fps_jax.tuning import autotune, autotune_run
    from pallas_kernels.sm90 import tuned
    from pallas_kernels.sm90.config import ForwardConfig

    lines = [f"{'key':18} {'fastest':32} {'ms':>9} {'TFLOP/s':>8} {'x safe':>8} {'right':>6} {'out':>4}"]
    for task, results in zip(tasks, all_results, strict=True):
        name, right = autotune_run.key_name(task.key), sum(bool(r["ok"]) for r in results)
        counts = f"{right:6} {len(results) - right:4}"
        entry = tuned.fastest(results).get(task.key)
        if entry is None:
            lines.append(f"{name:18} {'-':32} {'-':>9} {'-':>8} {'-':>8} {counts}")
            continue
        safe = [r["seconds"] for r in results if r["ok"] and ForwardConfig(**r["config"]) == autotune.SAFE]
        gain = f"{safe[0] / entry.seconds:8.2f}" if safe else f"{'-':>8}"
        lines.append(
            f"{name:18} {autotune.brief(entry.config):32} {entry.seconds * 1e3:9.3f} {entry.tflops:8.0f} {gain} {counts}"
        )
    return "\n".join(lines)


def _tell(line: str) -> None:
    print(line, file=Quiet(sys.stderr), flush=True)
