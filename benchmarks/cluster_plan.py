"""What training takes of a cluster, at real size, compiled for H200s on a machine that has none.

    python -m benchmarks.cluster_plan [ROW ...]

Each row is what `fps-train MODEL --plan h200:N` compiles: the real step of full fine-tuning with FPSAttention, a sample a device
along data and fsdp, every regime of the default schedule. A row runs in a process of its own, and
benchmarks/results/cluster_plan.json is written whole after each: without names, rows that it lacks are added. Needs the
`offline-gpu` extra. CPU seconds are of tracing, lowering and compiling together, and on a busy machine they are more.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from fps_jax.mesh import AXES, BATCH, parse_mesh
from fps_train.config import PRESETS
from fps_train.described import parse_devices, prepare_process

_GATHERED = "Involuntary full rematerialization"  # XLA's words where it gathers what should stay cut
_ONE_ROW = "--one"


@dataclass(frozen=True)
class Row:
    """A run. model: its size. video: as --plan-sizes has it. mesh: as --mesh has it; its product is the number of GPUs."""

    model: str
    video: str
    mesh: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.video.partition('x')[0]}p {self.mesh or 'one'}"

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        return dict.fromkeys(AXES, 1) | parse_mesh(self.mesh)

    @property
    def batch_size(self) -> int:
        return math.prod(self.sizes[axis] for axis in BATCH)

    @property
    def arguments(self) -> str:
        mesh = f" --mesh {self.mesh}" if self.mesh else ""
        return f"--plan h200:{self.devices} --plan-sizes {self.video} --batch-size {self.batch_size}{mesh}"


_480, _720 = "480x832x81", "720x1280x81"
ROWS = (
    Row("1.3B", _480, ""),
    Row("1.3B", _480, "fsdp=8"),
    Row("1.3B", _480, "fsdp=4,context=2"),
    Row("14B", _480, "fsdp=8"),
    Row("14B", _480, "data=2,fsdp=8,context=4"),
    Row("14B", _720, "context=8"),
    Row("14B", _720, "fsdp=8,context=8"),
    Row("14B", _720, "fsdp=16,context=4"),
)


def _measure(row: Row) -> dict[str, Any]:
    """Compiles one row in this process."""
    prepare_process()
    from fps_jax.checkpoints.format import write_config
    from fps_jax.config import WAN_T2V_1_3B, WAN_T2V_14B
    from fps_train.cluster_plan import plan_run

    marks = []

    def say(message: str) -> None:
        print(message, flush=True)
        marks.append(_cpu_seconds())

    with tempfile.TemporaryDirectory() as folder:
        write_config(pathlib.Path(folder), {"1.3B": WAN_T2V_1_3B, "14B": WAN_T2V_14B}[row.model])
        options = dataclasses.replace(PRESETS["paper"], model=folder, batch_size=row.batch_size, mesh=row.mesh)
        kind, count = parse_devices(f"h200:{row.devices}")
        plan = plan_run(options, kind, count, say, (row.video,))
    programs = {}
    for (name, program), before, after in zip(plan.programs.items(), marks, marks[1:], strict=True):
        programs[name] = {
            "arguments_bytes": program.arguments,
            "beside_state_bytes": program.beside,
            "temporaries_bytes": program.temporaries,
            "results_bytes": program.results,
            "sent": [{"kind": t.kind, "axes": t.axes, "count": t.count, "bytes": round(t.sent)} for t in program.sent],
            "arithmetic_s": round(program.arithmetic_seconds, 3),
            "traffic_s": round(program.traffic_seconds, 3),
            "cpu_s": round(after - before, 1),
        }
    return {
        "command": f"fps-train MODEL {row.arguments}",
        "devices": plan.devices,
        "total_bytes": plan.total,
        "fits": plan.fits,
        "state_bytes": plan.state,
        "gradient_bytes": plan.gradient,
        "whole_state_bytes": plan.whole_state,
        # The state, a gradient cut as the parameters are, and a float32 loss: nothing that a device holds is left out
        "arguments_are_the_shards": plan.programs["update"].arguments == plan.state + plan.gradient + 4,
        "programs": programs,
    }


def _cpu_seconds() -> float:
    """Of this process and of the tools that it ran."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _in_a_process(row: Row) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "row.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cluster_plan", _ONE_ROW, row.name, str(result)],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "1"},  # with XLA's warnings
            stderr=subprocess.PIPE,
            text=True,
        )
        began, gathered = time.monotonic(), 0
        assert process.stderr is not None
        for line in process.stderr:
            gathered += _GATHERED in line
            if line.startswith(("Traceback", "  File", "ValueError", "jax")) or _GATHERED in line:
                print(line, end="", file=sys.stderr)
        if process.wait():
            raise RuntimeError(f"{row.name}: status {process.returncode}")
        found = json.loads(result.read_text())
    return {**found, "involuntary_rematerializations": gathered, "wall_s": round(time.monotonic() - began)}


def main(arguments: list[str]) -> None:
    by_name = {row.name: row for row in ROWS}
    if arguments[:1] == [_ONE_ROW]:
        pathlib.Path(arguments[2]).write_text(json.dumps(_measure(by_name[arguments[1]])))
        return
    from benchmarks.record import RESULTS, environment, write

    file = RESULTS / "cluster_plan.json"
    done = json.loads(file.read_text())["rows"] if file.is_file() else {}
    for name, row in by_name.items():
        if name not in arguments if arguments else name in done:
            continue
        print(name, flush=True)
        found = _in_a_process(row)
        made = environment()
        done[name] = {**found, "date": made["date"], "versions": made["versions"]}
        write(
            "cluster_plan",
            {
                "device": "NVIDIA H200, described; compiled offline, not run",
                "rows": {n: done[n] for n in by_name if n in done},
            },
        )
        print(
            f"  {found['total_bytes'] / 1e9:.1f} GB a device, {[p['cpu_s'] for p in found['programs'].values()]} CPU s"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
