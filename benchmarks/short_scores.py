"""What the tensor cores' short sums in Q K do to the output, SIMULATED on a CPU, beside what a GPU measured on the same shapes.

    python -m benchmarks.short_scores     # a minute or two on 2 cores

The model of an instruction is that of `benchmarks.short_sums`. Scores are then off by some 1e-3, which hardly matters to the
output as such; but P is rounded to e4m3 afterwards, and where a score lies next to a boundary, P falls on the other side of it, a
whole step away. So the kernel differs from the specification by far more than either differs from the other in accuracy.
Writes benchmarks/results/short_scores.json.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.gpu_cases.shapes import SHAPES
from benchmarks.record import RESULTS, write
from benchmarks.short_sums import FRACTION_BITS, INSTRUCTION, instruction
from pallas_kernels import reference
from pallas_kernels.testing import make_call

CASES = (("tables", "every tile"), ("tables", "more keys than queries"), ("padding", "low scores"))


@jax.jit
def short_products(q: Float[Array, "Q H"], k: Float[Array, "K H"]) -> Float[Array, "Q K"]:
    """q k^T of e4m3 numbers, as wgmmas of 32 products add them up."""
    acc = jnp.zeros((1, q.shape[0], k.shape[0]), jnp.float32)
    for start in range(0, q.shape[1], INSTRUCTION):
        part = slice(start, start + INSTRUCTION)
        acc = instruction(acc, q[:, part].T, k[:, part].T, jnp.array([FRACTION_BITS], jnp.int32))
    return acc[0]


def errors(group: str, name: str) -> dict[str, float]:
    """Of the first head, with short and with exact Q K: relative L2 from the specification, and from unrounded attention."""
    (q, k, v), pattern = make_call(SHAPES[group][name])
    want, want_lse = (np.asarray(x, np.float32) for x in jax.jit(reference.attention)(q, k, v, pattern))
    per_scale = pattern.tokens_per_scale
    assert per_scale is not None
    valid = np.asarray(pattern.q_valid)
    mask = reference.token_mask(pattern)[0]
    q8, q_scale = reference.quantize_tokens(q, pattern.q_valid, per_scale)
    k8, k_scale = reference.quantize_tokens(k, pattern.k_valid, per_scale)
    v8, v_scale = reference.quantize_values(v, pattern.k_valid)
    q8, k8, v8 = (x[0, :, 0].astype(jnp.float32) for x in (q8, k8, v8))
    scales = jnp.repeat(q_scale[0, :, 0], per_scale)[:, None] * jnp.repeat(k_scale[0, :, 0], per_scale)[None]
    q32, k32, v32 = (jnp.where(jnp.isnan(x[0, :, 0]), 0, x[0, :, 0]).astype(jnp.float32) for x in (q, k, v))
    exact = jax.nn.softmax(jnp.where(mask, q32 @ k32.T * q.shape[-1] ** -0.5, -jnp.inf)) @ v32

    def relative(got: Any, wanted: Any) -> float:
        got, wanted = np.asarray(got, np.float64)[valid], np.asarray(wanted, np.float64)[valid]
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))

    found = {}
    for kind, products in (("exact", q8 @ k8.T), ("short", short_products(q8, k8))):
        scores = jnp.where(mask, products * scales * q.shape[-1] ** -0.5, -jnp.inf)
        top = reference.row_top(scores.max(-1, keepdims=True))
        p = reference.nearest_fp8(jnp.exp(scores - top) * reference.FP8_MAX) / reference.FP8_MAX
        total = p.sum(-1, keepdims=True)
        out = (p @ v8) * v_scale[0, 0, 0] / total
        found[f"{kind}_rel_l2"] = relative(out, want[0, :, 0])
        found[f"{kind}_rel_l2_lse"] = relative((top + jnp.log(total))[:, 0], want_lse[0, 0])
        found[f"{kind}_rel_l2_to_unrounded"] = relative(out, exact)
    return found


def measured(group: str, name: str) -> dict[str, Any]:
    """What gpu.json has of the shape, all heads."""
    records = json.loads((RESULTS / "gpu.json").read_text())["results"]
    parts = [p for r in records if r["case"] == f"correct {group} {name}" for p in r["parts"] if "rel_l2" in p]
    return {key: parts[-1][key] for key in ("rel_l2", "rel_l2_lse")} if parts else {"rel_l2": "not measured"}


def main() -> None:
    found = {}
    for group, name in CASES:
        found[f"{group} {name}"] = {"simulated": errors(group, name), "measured": measured(group, name)}
        print(f"{group} {name}", found[f"{group} {name}"], flush=True)
    write(
        "short_scores", {"measured": "measured: on an H200 (gpu.json); the rest is simulated on a CPU", "shapes": found}
    )


if __name__ == "__main__":
    main()
