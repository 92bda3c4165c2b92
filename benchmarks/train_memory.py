"""What training takes of one GPU, by rematerialization and batch, at real size: compiled for an H200 on a machine that has none.

    python -m benchmarks.train_memory [ROW ...]     # two minutes a row; without names, rows that aren't there yet

Each row is what `fps-train MODEL --plan h200:1` compiles, with FPSAttention in one regime, the default schedule's widest, which
takes most. Writes benchmarks/results/train_memory_h200.json, whole after each row. Needs the `offline-gpu` extra.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from fps_jax.errors import run_cli
from fps_jax.sizes import latent_grid, token_grid
from fps_train.config import PRESETS, Remat
from fps_train.described import parse_devices, prepare_process

_ONE_ROW = "--one"
_480, _720 = (480, 832, 81), (720, 1280, 81)


@dataclass(frozen=True)
class Row:
    """A run on one GPU. video: height, width and frames; batch: samples a microbatch."""

    model: str
    video: tuple[int, int, int]
    preset: str
    remat: Remat
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.model} {self.video[0]}p {self.preset} remat {self.remat} batch {self.batch}"

    @property
    def arguments(self) -> str:
        size = "x".join(map(str, self.video))
        preset = f"--preset {self.preset} --remat {self.remat} --batch-size {self.batch}"
        return f"{preset} --plan h200:1 --plan-sizes {size}"


ROWS = (
    Row("1.3B", _480, "paper", "full"),
    Row("1.3B", _480, "paper", "full", 2),
    Row("1.3B", _480, "paper", "attention"),
    Row("1.3B", _480, "paper", "dots"),
    Row("1.3B", _480, "paper", "none"),
    Row("1.3B", _480, "lora", "full"),
    Row("14B", _480, "lora", "full"),
    Row("14B", _720, "lora", "full"),
)


def _measure(row: Row) -> dict[str, Any]:
    """Compiles one row in this process."""
    prepare_process()
    from fps_jax.attention.schedule import FPSSchedule
    from fps_jax.checkpoints.format import write_config
    from fps_jax.config import WAN_T2V_1_3B, WAN_T2V_14B
    from fps_train.cluster_plan import plan_run

    height, width, frames = row.video
    default = FPSSchedule.default(token_grid(latent_grid(height, width, frames)))
    widest = dataclasses.replace(default.regimes[-1], until=1.0)
    with tempfile.TemporaryDirectory() as folder:
        write_config(pathlib.Path(folder), {"1.3B": WAN_T2V_1_3B, "14B": WAN_T2V_14B}[row.model])
        schedule = pathlib.Path(folder) / "widest.json"
        dataclasses.replace(default, regimes=(widest,)).save(schedule)
        options = dataclasses.replace(
            PRESETS[row.preset], model=folder, batch_size=row.batch, remat=row.remat, schedule=str(schedule)
        )
        plan = plan_run(options, *parse_devices("h200:1"), print, ("x".join(map(str, row.video)),))
    gradient = next(program for name, program in plan.programs.items() if name != "update")
    return {
        "command": f"fps-train MODEL {row.arguments}",
        "window": widest.window,
        "state_bytes": plan.state,
        "frozen_bytes": plan.frozen,
        "gradient_bytes": plan.gradient,
        "temporaries_bytes": gradient.temporaries,
        "total_bytes": plan.total,
        "fits": plan.fits,
        "arithmetic_s": round(gradient.arithmetic_seconds, 3),
    }


def table(rows: dict[str, Any]) -> str:
    """As docs/training.md has it."""
    lines = ["| model, video | preset | `--remat` | batch | stays there | in all |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        if found := rows.get(row.name):
            stays = (found["state_bytes"] + found["frozen_bytes"]) / 1e9
            total = f"{found['total_bytes'] / 1e9:.1f} GB" + ("" if found["fits"] else ", doesn't fit")
            lines.append(
                f"| {row.model}, {row.video[0]}p | {row.preset} | {row.remat} | {row.batch} | {stays:.1f} GB | {total} |"
            )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    by_name = {row.name: row for row in ROWS}
    if arguments[:1] == [_ONE_ROW]:
        pathlib.Path(arguments[2]).write_text(json.dumps(_measure(by_name[arguments[1]])))
        return
    from benchmarks.record import RESULTS, environment, write

    unknown = set(arguments) - set(by_name)
    if unknown:
        raise ValueError(f"{min(unknown)!r} is no row; there are {', '.join(map(repr, by_name))}")
    file = RESULTS / "train_memory_h200.json"
    done = json.loads(file.read_text())["rows"] if file.is_file() else {}
    for name in arguments or [name for name in by_name if name not in done]:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            result = pathlib.Path(folder) / "row.json"
            # A process of its own: a described device's programs are never given back.
            command = [sys.executable, "-m", "benchmarks.train_memory", _ONE_ROW, name, str(result)]
            subprocess.run(command, check=True)
            found = json.loads(result.read_text())
        done[name] = {**found, "date": environment()["date"]}
        rows = {n: done[n] for n in by_name if n in done}
        write("train_memory_h200", {"device": "NVIDIA H200, described; compiled offline, not run", "rows": rows})
        print(f"  {found['total_bytes'] / 1e9:.1f} GB", flush=True)
    print(table(done))


if __name__ == "__main__":
    run_cli(main)
