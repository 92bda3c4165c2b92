"""What training takes of a cluster, at real size, compiled for H200s on a machine that has none.

    python -m benchmarks.cluster_plan [ROW ...]
    python -m benchmarks.cluster_plan --check       # the small row alone, against the committed one: part of make offline-gpu
    python -m benchmarks.cluster_plan --traffic     # only the time of what is sent, of the committed rows, compiling nothing

Each row is what `fps-train MODEL --plan h200:N` compiles: the real step of full fine-tuning with FPSAttention, a sample a device
along data and fsdp, every regime of the default schedule. A row runs in a process of its own, and
benchmarks/results/cluster_plan.json is written whole after each: without names, rows that it lacks are added. Needs the
`offline-gpu` extra. CPU seconds are of tracing, lowering and compiling together, and on a busy machine they are more.
"""

import dataclasses
import itertools
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

from fps_jax.errors import run_cli
from fps_jax.files import write_json
from fps_jax.mesh import AXES, BATCH, parse_mesh
from fps_train.collectives import Traffic, seconds
from fps_train.config import PRESETS
from fps_train.described import parse_devices, prepare_process

_GATHERED = "Involuntary full rematerialization"  # XLA's words where it gathers what should stay cut
_ONE_ROW = "--one"
_KERNELS = ("cudnn$fmha", "mosaic")  # parts of the names of what should compute attention


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
      model: its size. small: two layers and one regime, to know soon whether a step compiles for GPUs.
      video: as --plan-sizes has it.
      mesh: as --mesh has it; its product is the number of GPUs.
      limit_gb: bytes a device that it may take, in GB: a tenth more than a prototype of this step took.
    """

    model: str
    video: str
    mesh: str
    limit_gb: float | None = None

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
    Row("small", "256x256x5", "fsdp=2,context=2,tensor=2"),
    Row("1.3B", _480, "", 1.1 * 40.8),
    Row("1.3B", _480, "fsdp=8", 1.1 * 16.0),
    Row("1.3B", _480, "fsdp=4,context=2", 1.1 * 13.7),
    Row("14B", _480, "fsdp=8", 1.1 * 82.0),
    Row("14B", _480, "data=2,fsdp=8,context=4", 1.1 * 49.6),
    Row("14B", _720, "context=8", 1.1 * 52.9),
    Row("14B", _720, "fsdp=8,context=8", 1.1 * 53.3),
    Row("14B", _720, "fsdp=16,context=4", 1.1 * 46.8),
)
_SMALL = ROWS[0]
_CPU_SECONDS = 60  # that a program may take to compile


def _measure(row: Row) -> dict[str, Any]:
    """Compiles one row in this process."""
    prepare_process()
    from fps_jax.attention.schedule import FPSSchedule, Regime
    from fps_jax.checkpoints.format import write_config
    from fps_jax.config import WAN_T2V_1_3B, WAN_T2V_14B, DiTConfig
    from fps_train.cluster_plan import plan_run

    small = DiTConfig(task="t2v", dim=256, mlp_dim=512, num_heads=2, num_layers=2)
    models = {"1.3B": WAN_T2V_1_3B, "14B": WAN_T2V_14B, "small": dataclasses.replace(WAN_T2V_1_3B, dit=small)}
    marks = []

    def say(message: str) -> None:
        print(message, flush=True)
        marks.append(_cpu_seconds())

    with tempfile.TemporaryDirectory() as folder:
        write_config(pathlib.Path(folder), models[row.model])
        options = dataclasses.replace(PRESETS["paper"], model=folder, batch_size=row.batch_size, mesh=row.mesh)
        if row is _SMALL:
            schedule = FPSSchedule(tile=(1, 8, 16), regimes=(Regime(until=1.0, scales_per_tile=1, window=(2, 1, 1)),))
            schedule.save(pathlib.Path(folder) / "one.json")
            options = dataclasses.replace(options, schedule=str(pathlib.Path(folder) / "one.json"))
        kind, count = parse_devices(f"h200:{row.devices}")
        plan = plan_run(options, kind, count, say, (row.video,))
    programs = {}
    for (name, program), (before, after) in zip(plan.programs.items(), itertools.pairwise(marks), strict=True):
        programs[name] = {
            "arguments_bytes": program.size.arguments,
            "beside_state_bytes": program.size.beside,
            "temporaries_bytes": program.size.temporaries,
            "results_bytes": program.size.results,
            "sent": [{"kind": t.kind, "axes": t.axes, "count": t.count, "bytes": round(t.sent)} for t in program.sent],
            "kernels": program.kernels,
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
        "arguments_are_the_shards": plan.programs["update"].size.arguments == plan.state + plan.gradient + 4,
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


def with_traffic_times(found: dict[str, Any], row: Row) -> dict[str, Any]:
    """A row with the least time of what its programs send computed anew."""
    kind, _ = parse_devices("h200")

    def timed(program: dict[str, Any]) -> dict[str, Any]:
        sent = [Traffic(t["kind"], tuple(t["axes"]), t["count"], t["bytes"]) for t in program["sent"]]
        return {**program, "traffic_s": round(seconds(sent, row.sizes, kind), 3)}

    return {**found, "programs": {name: timed(program) for name, program in found["programs"].items()}}


def missed(row: Row, found: dict[str, Any]) -> list[str]:
    """Aims that a row misses: memory as the prototype's, a minute for a program."""
    wrong = [
        f"{name}: {program['cpu_s']:.0f} CPU seconds, above {_CPU_SECONDS}"
        for name, program in found["programs"].items()
        if program["cpu_s"] > _CPU_SECONDS
    ]
    if row.limit_gb and found["total_bytes"] > row.limit_gb * 1e9:
        wrong.append(f"{found['total_bytes'] / 1e9:.1f} GB a device, above {row.limit_gb:.1f}")
    return wrong


def broken(found: dict[str, Any]) -> list[str]:
    """What a row breaks of what holds for each."""
    wrong = []
    if found["involuntary_rematerializations"]:
        wrong.append("XLA gathers what should stay cut")
    if not found["arguments_are_the_shards"]:
        wrong.append("the update isn't given the shards of state and gradient alone")
    if not found["fits"]:
        wrong.append(f"{found['total_bytes'] / 1e9:.1f} GB a device don't fit")
    for name, program in found["programs"].items():
        if name != "update" and not all(any(part in k for k in program["kernels"]) for part in _KERNELS):
            wrong.append(f"{name}: cuDNN's attention or the Hopper kernel isn't in it: {program['kernels']}")
    return wrong


def table(rows: dict[str, Any]) -> str:
    """Of the rows at real size, as docs/cluster.md has it."""
    lines = [
        "| model, video | mesh | GPUs | state | beside it | in all | sent | least seconds: arithmetic, traffic |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS[1:]:
        found = rows.get(row.name)
        if found is None:
            continue
        gradients = [p for name, p in found["programs"].items() if name != "update"]
        sent = max(sum(t["bytes"] for t in p["sent"]) for p in gradients)
        least = ", ".join(f"{max(p[key] for p in gradients):.2f}" for key in ("arithmetic_s", "traffic_s"))
        beside = found["total_bytes"] - found["state_bytes"]
        gb = " | ".join(f"{size / 1e9:.1f} GB" for size in (found["state_bytes"], beside, found["total_bytes"], sent))
        lines.append(f"| {row.model}, {row.video} | {row.mesh or '-'} | {row.devices} | {gb} | {least} |")
    return "\n".join(lines)


def _check(committed: dict[str, Any]) -> int:
    found = _in_a_process(_SMALL)
    wrong = broken(found)
    if found["total_bytes"] > 1.1 * committed["total_bytes"]:
        wrong.append(f"{found['total_bytes']:,} bytes a device; {committed['total_bytes']:,} were committed")
    for line in wrong:
        print(f"error: {_SMALL.name}: {line}", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    by_name = {row.name: row for row in ROWS}
    if arguments[:1] == [_ONE_ROW]:
        pathlib.Path(arguments[2]).write_text(json.dumps(_measure(by_name[arguments[1]])))
        return 0
    from benchmarks.record import RESULTS, environment, write

    file = RESULTS / "cluster_plan.json"
    done = json.loads(file.read_text())["rows"] if file.is_file() else {}
    if arguments == ["--check"]:
        return _check(done[_SMALL.name])
    if arguments == ["--traffic"]:
        committed = json.loads(file.read_text())
        rows = {name: with_traffic_times(found, by_name[name]) for name, found in done.items()}
        write_json({**committed, "rows": rows}, file)
        print(table(rows))
        return 0
    unknown = set(arguments) - set(by_name)
    if unknown:
        raise ValueError(f"{min(unknown)!r} is no row; there are {', '.join(map(repr, by_name))}")
    for name, row in by_name.items():
        if name not in arguments if arguments else name in done:
            continue
        print(name, flush=True)
        found = _in_a_process(row)
        made = environment()
        done[name] = {
            **found,
            "breaks": broken(found),
            "misses": missed(row, found),
            "date": made["date"],
            "versions": made["versions"],
        }
        write(
            "cluster_plan",
            {
                "device": "NVIDIA H200, described; compiled offline, not run",
                "rows": {n: done[n] for n in by_name if n in done},
            },
        )
        print(
            f"  {found['total_bytes'] / 1e9:.1f} GB a device",
            *broken(found),
            *missed(row, found),
            sep="\n  ",
            flush=True,
        )
    print(table(done))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(lambda arguments: sys.exit(main(arguments))))
