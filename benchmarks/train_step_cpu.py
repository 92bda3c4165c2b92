"""A training step's loss and gradient on a CPU, beside the same network in torch (diffusers' WanTransformer3DModel) in one run.

    python benchmarks/train_step_cpu.py --torch-python /path/to/python3.11   # with torch, diffusers; 10 minutes on 2 cores, 4 GB

4 layers of width 128 (4 heads of 32, mlp 256), 512 text tokens, a batch of one, the same weights and inputs. float32 weights; bf16
is the matmuls' and attention's (autocast in torch). 'fps' are the default schedule's regimes, and their mean weighted by how much
of the denoising each holds. 'attention' is dense attention alone, forward, and with its gradient. All sides stay alive and take
turns at every case; 'huge pages' are the same with glibc's malloc asking for them (GLIBC_TUNABLES=glibc.malloc.hugetlb=1): new
memory is then 2 MB a page fault in place of 4 KB.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
THREADS = 2
DIM, MLP, HEADS, LAYERS, TEXT = 128, 256, 4, 4, (512, 64)
GRIDS = {"320": (5, 8, 8), "1280": (5, 16, 16)}  # tokens
DTYPES, REGIMES = ("float32", "bfloat16"), ("early", "middle", "late")
ALONE = ("attention", "attention and gradient")
HUGE = ", huge pages"
CONFIG = {
    "num_attention_heads": HEADS, "attention_head_dim": DIM // HEADS, "in_channels": 16, "out_channels": 16,
    "text_dim": TEXT[1], "freq_dim": 256, "ffn_dim": MLP, "num_layers": LAYERS, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
Step = Callable[[], tuple[float, float]]  # -> loss, norm of the gradient


def _weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that depend on the key alone, at scales that keep activations near 1."""
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(key))
    noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    if key.endswith("weight") and len(shape) == 1:
        return 1 + 0.1 * noise
    return noise * np.float32(0.02 if len(shape) == 1 else 0.1 if "table" in key else np.prod(shape[1:]) ** -0.5)


def _inputs(tokens: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noisy latents, text states, target."""
    rng = np.random.default_rng(1)
    f, y, x = GRIDS[tokens]
    latents, target = (rng.standard_normal((1, 16, f, 2 * y, 2 * x), np.float32) for _ in range(2))
    return latents, rng.standard_normal((1, *TEXT), np.float32), target


def _ours() -> Callable[[str, str, str], Step]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    from fps_convert import mapping
    from fps_jax.attention.attend import DenseAttention, PlannedAttention, dense_attention
    from fps_jax.attention.schedule import FPSSchedule
    from fps_jax.config import DiTConfig, WanConfig
    from fps_jax.models.dit import cast_params, dit
    from fps_jax.models.params import unflatten

    config = DiTConfig(task="t2v", dim=DIM, mlp_dim=MLP, num_heads=HEADS, num_layers=LAYERS, text_dim=TEXT[1])
    rows = mapping.rows("dit", WanConfig(dit=config))
    leaves = {path: np.empty(shape, np.float32) for path, shape in mapping.leaves(rows).items()}
    for row in rows:
        leaf = leaves[row.path] if row.layer is None else leaves[row.path][row.layer]
        leaf[...] = mapping.to_ours(_weight(row.keys["diffusers"], row.shapes["diffusers"]), row)
    params = unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()})

    def alone(tokens: str, dtype: str, *, gradient: bool) -> Step:
        shape = (1, int(tokens), HEADS, DIM // HEADS)
        q, k, v, d_out = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4))

        @jax.jit
        def call(q, k, v, d_out):
            return jax.vjp(dense_attention, q, k, v)[1](d_out) if gradient else dense_attention(q, k, v)

        def run():
            norms = [jnp.linalg.norm(x.astype(jnp.float32)) for x in jax.tree.leaves(call(q, k, v, d_out))]
            return 0.0, float(jnp.stack(norms).max())

        run.timed = lambda: jax.block_until_ready(call(q, k, v, d_out))
        return run

    def step(tokens: str, dtype: str, attention: str) -> Step:
        if attention in ALONE:
            return alone(tokens, dtype, gradient=attention != ALONE[0])
        latents, text, target = map(jnp.asarray, _inputs(tokens))
        plan = DenseAttention()
        if attention != "dense":
            plan = PlannedAttention(FPSSchedule.default(GRIDS[tokens]).plans(GRIDS[tokens])[REGIMES.index(attention)])

        def loss(params):
            weights = cast_params(params, jnp.dtype(dtype))
            out = dit(config, weights, latents, jnp.array([500.0]), text, dtype=jnp.dtype(dtype), attention=plan)
            return jnp.square(out.velocity - target).mean()

        @jax.jit
        def both(params):
            value, gradient = jax.value_and_grad(loss)(params)
            return value, gradient

        def run():
            value, gradient = jax.block_until_ready(both(params))
            return float(value), float(
                sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradient))
            ) ** 0.5

        run.timed = lambda: jax.block_until_ready(both(params))
        return run

    return step


def _torch() -> Callable[[str, str, str], Step]:
    import torch
    from diffusers import WanTransformer3DModel

    torch.set_num_threads(THREADS)
    model = WanTransformer3DModel(**CONFIG).train()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_weight(key, tuple(parameter.shape))))

    def step(tokens: str, dtype: str, attention: str) -> Step:
        assert attention == "dense"
        latents, text, target = map(torch.from_numpy, _inputs(tokens))
        t = torch.tensor([500.0])

        def timed():
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                out = model(hidden_states=latents, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
            loss = (out.float() - target).square().mean()
            loss.backward()
            return loss

        def run():
            loss = timed()
            squares = (p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
            return float(loss), float(sum(squares)) ** 0.5

        run.timed = timed
        return run

    return step


def serve(side: str) -> None:
    """Answers each line, a list of tokens, dtype, attention and runs: at first loss and gradient norm, always seconds."""
    make, made = {"ours": _ours, "torch": _torch}[side](), {}
    for line in sys.stdin:
        *case, runs = json.loads(line)
        start = time.perf_counter()
        answer = {}
        if tuple(case) not in made:
            made[tuple(case)] = make(*case)
            answer["loss"], answer["gradient_norm"] = made[tuple(case)]()
            answer["first_s"] = round(time.perf_counter() - start, 2)
        seconds = []
        for _ in range(int(runs)):
            start = time.perf_counter()
            made[tuple(case)].timed()
            seconds.append(round(time.perf_counter() - start, 5))
        print(json.dumps({**answer, "seconds": seconds}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch-python", help="a Python with torch and diffusers; without it ours alone is timed, nothing written"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side at each case")
    parser.add_argument("--runs", type=int, default=4, help="timed steps a turn")
    parser.add_argument("--side", choices=("ours", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side)
        return
    sys.path.insert(0, str(ROOT))
    from benchmarks import record  # not in torch's process, and before minutes of work

    pythons = {"ours": sys.executable} | ({"torch": options.torch_python} if options.torch_python else {})
    processes = {
        side + pages: subprocess.Popen(
            [python, __file__, f"--side={side}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if pages else {})},
        )
        for side, python in pythons.items()
        for pages in ("", HUGE)
    }

    def ask(side: str, *words: object) -> dict:
        process = processes[side]
        process.stdin.write(json.dumps(words) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    cases = [
        (side, tokens, dtype, attention)
        for tokens in GRIDS
        for dtype in DTYPES
        for side, attention in (*((s, "dense") for s in processes), *(("ours", a) for a in (*REGIMES, *ALONE)))
    ]
    found = {case: {**ask(*case, 1), "seconds": []} for case in cases}
    for turn in range(options.rounds):
        for case in cases:
            found[case]["seconds"] += ask(*case, options.runs)["seconds"]
        print(f"turn {turn + 1} of {options.rounds}", flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    results = {}
    for (side, tokens, dtype, attention), answer in found.items():
        name = attention if side == "ours" else side.replace("ours", "dense")
        answer["median_s"] = statistics.median(answer["seconds"])
        results.setdefault(f"{tokens} tokens, {dtype}", {})[name] = answer
    for name, case in results.items():
        halves = [case[regime]["median_s"] for regime in REGIMES]
        case["fps_mean_s"] = round(0.25 * halves[0] + 0.5 * halves[1] + 0.25 * halves[2], 5)  # the default's intervals
        forward, both = (case[name]["median_s"] for name in ALONE)
        case["attention_gradient_by_forward"] = round((both - forward) / forward, 2)
        if "torch" in case:
            for pages in ("", HUGE):
                ratio = case["torch" + pages]["median_s"] / case["dense" + pages]["median_s"]
                case["dense_speed_against_torch" + pages] = round(ratio, 2)
            case["relative_loss_difference"] = abs(case["dense"]["loss"] / case["torch"]["loss"] - 1)
            case["relative_gradient_norm_difference"] = abs(
                case["dense"]["gradient_norm"] / case["torch"]["gradient_norm"] - 1
            )
        print(name, {k: v["median_s"] if isinstance(v, dict) else v for k, v in case.items()})
    if not options.torch_python:
        return
    code = "import importlib.metadata as m; print({p: m.version(p) for p in ('torch', 'diffusers')})"
    versions = subprocess.run([options.torch_python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)

    record.write(
        "train_step_cpu",
        {
            "what": "loss and gradient of a small DiT on a CPU, seconds, beside the same network in torch",
            "case": f"DiT {DIM}/{MLP}/{HEADS} heads, {LAYERS} layers, {TEXT[0]} text tokens, batch 1, {THREADS} threads",
            "torch_side": versions.stdout.strip(),
            "load_average": os.getloadavg(),
            **results,
        },
    )


if __name__ == "__main__":
    main()
