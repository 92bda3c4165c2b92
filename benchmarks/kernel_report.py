"""The Hopper kernels' machine code, compiled for an H200 on a machine that has none, and whether it got worse.

    make offline-gpu                              # --check: compares with the committed report, fails where a number is > 2% worse
    python -m benchmarks.kernel_report [CASE ...] # writes benchmarks/results/kernel_report.json

XLA's CUDA plugin compiles for a described device; Mosaic leaves each kernel's PTX and ptxas's log in a folder; nvdisasm shows the
machine code. Limits that no kernel may break: no spilled register, no serialized matmul, no more shared memory or registers than a
multiprocessor has (the latter would hang it), and the order of waits and exponentials in the main loop. Speed itself needs a GPU.
Needs the `offline-gpu` extra.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import sass
from benchmarks.record import RESULTS, write
from fps_jax.errors import run_cli
from fps_train.described import KINDS, described_devices, prepare_process
from pallas_kernels.mosaic import impatient_waits
from pallas_kernels.sm90.config import CONSUMERS, SHARED_MEMORY, ForwardConfig

NAME = "kernel_report"
TOLERANCE = 1.02
# Numbers that may not grow.
WATCHED = (
    "main_loop_instructions",
    "usual_step_instructions",
    "special_functions",
    "live_registers",
    "sass_instructions",
    "shared_memory",
    "traps",
)
# Tiles and their stored tokens; of a stream, 7 slots of a cache of 39 tiles.
_TILES = {
    "720p": (300, 256),
    "480p": (135, 256),
    "720p_128": (600, 128),
    "480p_384": (90, 384),
    "480p_stream": (273, 128),
}
_KEY_TILES = 60  # of a row: 0.2 of 720p


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An attention call at real size.

    `scales`: of a tile, None for bf16. `value_tiles`: that share V's scales, None for all. `impatient`: inside
    `mosaic.impatient_waits`.
    """

    heads: int = 40
    tiles: str = "720p"
    scales: int | None = 1
    value_tiles: int | None = None
    head_dim: int = 128
    config: ForwardConfig
    impatient: bool = False


def cases() -> dict[str, Case]:
    """The shipped configs and shapes: Wan 14B (40 heads) and 1.3B (12) at 720p and 480p."""
    alone, pair = ForwardConfig(), ForwardConfig(cluster=2)
    short, short_pair = ForwardConfig(stages=2), ForwardConfig(stages=2, cluster=2)
    bf16_persistent = ForwardConfig(stages=2, persistent=True, consumer_registers=232, producer_registers=40)
    return {
        "14B 720p, 1 scale": Case(config=alone),
        "14B 720p, 1 scale, cluster": Case(config=pair),
        "14B 720p, 4 scales": Case(scales=4, config=alone),
        "14B 720p, 4 scales, cluster": Case(scales=4, config=pair),
        "14B 720p, 1 scale, 2 stages": Case(config=short),
        "14B 720p, 1 scale, cluster, 2 stages": Case(config=short_pair),
        "1.3B 480p, 2 scales, cluster": Case(heads=12, tiles="480p", scales=2, config=pair),
        "tiles of 128": Case(tiles="720p_128", config=alone),
        "tiles of 384, 3 scales": Case(tiles="480p_384", scales=3, config=alone),
        "head dim 64": Case(head_dim=64, config=alone),
        "14B 720p, 1 scale, persistent": Case(config=ForwardConfig(persistent=True)),
        "14B 720p, 1 scale, cluster, persistent": Case(config=ForwardConfig(cluster=2, persistent=True)),
        "14B 720p, 1 scale, turns": Case(config=ForwardConfig(take_turns=True)),
        "14B 720p, 1 scale, cluster, turns": Case(config=ForwardConfig(cluster=2, take_turns=True)),
        "14B 720p, 1 scale, promoted every 4 steps": Case(config=ForwardConfig(promote_every=4)),
        "14B 720p, 1 scale, 16 polynomial columns": Case(config=ForwardConfig(polynomial_columns=16)),
        "14B 720p, 4 scales, cluster, 32 polynomial columns": Case(
            scales=4, config=ForwardConfig(cluster=2, polynomial_columns=32)
        ),
        "1.3B 480p, a block of a stream": Case(heads=12, tiles="480p_stream", value_tiles=39, config=alone),
        "14B 720p, 4 scales, cluster, V's scales of 60 tiles": Case(scales=4, value_tiles=60, config=pair),
        "14B 720p, bf16": Case(scales=None, config=short),
        "14B 720p, bf16, cluster": Case(scales=None, config=short_pair),
        "14B 720p, bf16, turns": Case(scales=None, config=ForwardConfig(stages=2, take_turns=True)),
        "14B 720p, bf16, persistent": Case(scales=None, config=bf16_persistent),
        "14B 720p, 1 scale, impatient waits": Case(config=alone, impatient=True),
        "14B 720p, 1 scale, cluster, impatient waits": Case(config=pair, impatient=True),
    }


def program(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The attention kernel of a case, and the shapes it is called with."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.reference import FP8
    from pallas_kernels.sm90 import forward, quantize
    from pallas_kernels.sm90.config import BLOCK_KV, BLOCK_Q, VALID_ROWS, scales_per_block

    num_tiles, stored = _TILES[case.tiles]
    seq, heads, dim = num_tiles * stored, case.heads, case.head_dim
    f32, dtype = jnp.float32, jnp.bfloat16 if case.scales is None else FP8
    spec = jax.ShapeDtypeStruct
    scale_specs: list[Any] = [None, None, None]
    if case.scales is not None:
        blocks = seq // BLOCK_KV * scales_per_block(stored // case.scales)
        v_scale = spec((heads, dim), f32)
        if case.value_tiles is not None:
            v_scale = spec((heads, num_tiles // case.value_tiles, 2, dim + VALID_ROWS), f32)
        scale_specs = [spec((heads, seq // BLOCK_Q), f32), spec((heads, blocks), f32), v_scale]
    shapes: list[Any] = [
        spec((heads, seq, dim), dtype),
        spec((heads, seq, dim), dtype),
        spec((heads, dim, seq), dtype),
        spec((VALID_ROWS, seq), dtype),
        spec((seq,), f32),
        *scale_specs,
    ]

    def call(operands, pattern):
        return forward.attention(operands, pattern, batch=1, dtype=jnp.dtype(jnp.bfloat16), config=case.config)

    return call, (quantize.Operands(*shapes), _pattern(num_tiles, stored, case.scales, case.value_tiles))


def _pattern(num_tiles: int, stored: int, scales: int | None, value_tiles: int | None = None) -> Any:
    """A pattern of such tiles, shapes in place of arrays."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.pattern import TilePattern

    spec: Any = jax.ShapeDtypeStruct
    valid = spec((num_tiles * stored,), jnp.bool_)
    return TilePattern(
        key_tiles=spec((num_tiles, _KEY_TILES), jnp.int32),
        counts=spec((num_tiles,), jnp.int32),
        q_valid=valid,
        k_valid=valid,
        tile_size=stored,
        tokens_per_scale=None if scales is None else stored // scales,
        tokens_per_value_scale=None if value_tiles is None else stored * value_tiles,
    )


def quantization(
    stored: int, scales: int, heads: int = 40, dim: int = 128
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The fused passes over q, k and v of a 720p call: three kernels among what XLA does."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.sm90 import quantize

    tokens = 300 * 256

    x = jax.ShapeDtypeStruct((1, tokens, heads, dim), jnp.bfloat16)
    return quantize.quantize, (x, x, x, _pattern(tokens // stored, stored, scales))


def programs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[str]]]:
    """What is compiled: (function, shapes, names of the Mosaic kernels in it)."""
    found = {name: (*program(case), [name]) for name, case in cases().items()}
    for stored, scales in ((256, 1), (256, 4), (384, 1)):
        label = f"quantize, tiles of {stored}, {scales} scale{'s' * (scales > 1)}"
        found[label] = (*quantization(stored, scales), [f"{label}: {x}" for x in "qkv"])
    return found


def compile_kernels(fn: Callable[..., Any], specs: tuple[Any, ...], folder: pathlib.Path) -> None:
    """Compiles for a described H200; Mosaic writes PTX, log and launch of each kernel to `folder`."""
    import jax

    (device,) = described_devices(KINDS["h200"])
    here = jax.sharding.SingleDeviceSharding(device)
    specs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), specs)
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    try:
        with jax.default_device(device):
            lowered = jax.jit(fn).lower(*specs)
        for kernel in folder.glob("*.resources.txt"):  # its log of compiler passes would be a thousand times the PTX
            folder.joinpath(kernel.name.removesuffix(".resources.txt") + ".mlir-passes.log").symlink_to(os.devnull)
        lowered.compile()
    finally:
        del os.environ["MOSAIC_GPU_DUMP_TO"]


def cuda_tool(name: str, folder: pathlib.Path | None = None) -> str:
    """Path of a CUDA tool: in `folder`, else of the wheels. Raises FileNotFoundError."""
    if folder is None:
        try:
            places = [pathlib.Path(p) / "bin" for p in importlib.import_module("nvidia.cu13").__path__]
        except ImportError:
            places = []
    else:
        places = [folder]
    for place in places:
        if os.access(place / name, os.X_OK):
            return str(place / name)
    raise FileNotFoundError(f"{name} is not in {places}; run `make offline-gpu`, which installs the offline-gpu extra")


def _output(*command: str) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout}")
    return done.stdout


def _assembled(ptx: pathlib.Path, ptxas: str, expected: dict[str, Any]) -> dict[str, Any]:
    """Facts of one ptxas about a kernel, and of the machine code it makes."""
    cubin = str(ptx.with_suffix(".cubin"))
    log = _output(ptxas, "-v", "-arch=sm_90a", str(ptx), "-o", cubin)
    nvdisasm = cuda_tool("nvdisasm")
    listing = _output(nvdisasm, "-c", "-ndf", cubin)
    live = _output(nvdisasm, "-c", "-lrm", "count", cubin)
    facts = {
        **sass.ptxas_facts(log),
        "sass_instructions": len(sass.parse(listing)[0]),
        **sass.register_facts(listing, live),
    }
    if facts["setmaxnreg"]:
        return facts | sass.loop_facts(listing, **expected)
    del facts["setmaxnreg"]  # one warpgroup without a main loop: a quantization pass
    return facts


def kernel_facts(
    fn: Callable[..., Any], specs: tuple[Any, ...], newest: pathlib.Path | None, expected: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One dict for each Mosaic kernel of a program. `expected`: what `sass.order_problems` is told of it."""
    with tempfile.TemporaryDirectory(prefix="kernel_report_") as name:
        folder = pathlib.Path(name)
        compile_kernels(fn, specs, folder)
        for ptx in sorted(folder.glob("*.ptx")):
            code = ptx.read_text()
            facts = _assembled(ptx, cuda_tool("ptxas"), expected)
            facts |= {"waits": code.count("mbarrier.try_wait"), "traps": code.count("trap;")}
            launch = ptx.with_suffix(".after_layout_inference.txt").read_text()
            dynamic = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", launch)
            facts["shared_memory"] = facts.pop("static_shared_memory") + (int(dynamic[1]) if dynamic else 0)
            if newest is not None:
                other = _assembled(ptx, cuda_tool("ptxas", newest), expected)
                facts["newest_ptxas"] = {key: other[key] for key in ("spill_bytes", "notes", *WATCHED) if key in other}
            yield facts


def limits_broken(facts: dict[str, Any]) -> list[str]:
    """Why a kernel must not ship; empty for one that may."""
    attention = "setmaxnreg" in facts
    problems = list(facts["order_problems"]) if attention else []
    if facts["spill_bytes"]:
        problems.append(f"{facts['spill_bytes']} bytes of registers are spilled")
    problems += [f"ptxas notes: {note}" for note in facts["notes"]]
    if facts["traps"] not in (0, facts["waits"]):
        problems.append(f"{facts['traps']} of {facts['waits']} waits for an mbarrier can trap: all or none should")
    if facts["shared_memory"] > SHARED_MEMORY:
        problems.append(f"{facts['shared_memory']} bytes of shared memory, a block has {SHARED_MEMORY}")
    if not attention:
        return problems
    asked = facts["setmaxnreg"]
    wanted = CONSUMERS * asked.get("consumer", 0) + asked.get("producer", 0)
    if wanted > facts["registers"] * (CONSUMERS + 1):
        problems.append(
            f"setmaxnreg asks for {wanted}, the launch has {facts['registers'] * (CONSUMERS + 1)}: a GPU hangs"
        )
    if facts["live_registers"] > asked.get("consumer", 0):
        problems.append(f"{facts['live_registers']} registers are live, a consumer has {asked.get('consumer', 0)}")
    return problems


def got_worse(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Watched numbers that grew by more than 2%."""
    return [
        f"{name} was {old[name]}, is {new[name]}"
        for name in WATCHED
        if name in old and new[name] > TOLERANCE * old[name]
    ]


def check(results: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Everything wrong with `results`, a line each: limits broken, cases that are new or gone, numbers that got worse."""
    wrong = [f"{name}: {problem}" for name, facts in results.items() for problem in limits_broken(facts)]
    for name in sorted({*results, *committed}):
        if name not in committed:
            wrong.append(f"{name}: is not in the committed report; run `python -m benchmarks.kernel_report`")
        elif name not in results:
            wrong.append(f"{name}: is in the committed report only; run `python -m benchmarks.kernel_report`")
        else:
            wrong += [f"{name}: {change}" for change in got_worse(committed[name], results[name])]
    return wrong


def table(results: dict[str, Any]) -> str:
    """The report as docs/kernels.md shows it."""
    lines = [
        "| kernel | main loop, instructions | of these in the usual step | of these special functions "
        "| live registers | spilled bytes | shared memory, bytes | instructions in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, x in results.items():
        numbers = (*WATCHED[:4], "spill_bytes", "shared_memory", "sass_instructions")
        lines.append(f"| {name} | " + " | ".join(f"{x[key]:,}" if key in x else "-" for key in numbers) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    checking = "--check" in arguments
    newest = None
    if "--newest-ptxas" in arguments:
        newest = pathlib.Path(arguments.pop(arguments.index("--newest-ptxas") + 1))
    wanted = [word for word in arguments if not word.startswith("--")]
    ptxas = cuda_tool("ptxas")
    prepare_process()
    # XLA takes the first ptxas on PATH.
    os.environ["PATH"] = f"{pathlib.Path(ptxas).parent}{os.pathsep}{os.environ['PATH']}"
    results = {}
    for program_name, (fn, specs, names) in programs().items():
        if wanted and program_name not in wanted:
            continue
        case = cases().get(program_name)
        expected = _expected(case.config) if case else {}
        with impatient_waits() if case and case.impatient else contextlib.nullcontext():
            for name, facts in zip(names, kernel_facts(fn, specs, newest, expected), strict=True):
                results[name] = facts
                what = "a step" if "main_loop_instructions" in facts else "in all"
                count = facts.get("main_loop_instructions", facts["sass_instructions"])
                print(f"{name:50} {count:5} instructions {what}", flush=True)
    if checking:
        committed = json.loads((RESULTS / f"{NAME}.json").read_text())["kernels"]
        wrong = check(results, {k: v for k, v in committed.items() if not wanted or k in results})
    else:
        wrong = check(results, results)
        if not wanted:
            versions = {"ptxas": _version(ptxas)}
            if newest is not None:
                versions["newest_ptxas"] = _version(cuda_tool("ptxas", newest))
            write(NAME, {"device": "NVIDIA H200, described; compiled offline, not run", **versions, "kernels": results})
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _expected(config: ForwardConfig) -> dict[str, Any]:
    return {
        "takes_turns": config.take_turns,
        "exponentials": sass.EXPONENTIALS * (128 - config.polynomial_columns) // 128,
    }


def _version(ptxas: str) -> str:
    found = re.search(r"V(\d[\d.]*)", _output(ptxas, "--version"))
    return found[1] if found else "unknown"


if __name__ == "__main__":
    sys.exit(run_cli(lambda arguments: sys.exit(main(arguments))))
