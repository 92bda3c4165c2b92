"""Speed of the DiT on a CPU, beside diffusers' WanTransformer3DModel in the same run.

    python benchmarks/dit_cpu.py --torch-python /path/to/python3.11   # with torch, diffusers

The 1.3B model's width (1536, 8960, 12 heads), 4 layers, one sample of 5 x 30 x 52 tokens, 512 text tokens, float32, 2 threads.
Needs 8 GB.
"""

import os
import pathlib
import sys

import numpy as np
from side_by_side import THREADS, compare, measure

DIM, MLP, HEADS, LAYERS, GRID = 1536, 8960, 12, 4, (5, 30, 52)
ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = {
    "num_attention_heads": HEADS, "attention_head_dim": DIM // HEADS, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": MLP, "num_layers": LAYERS, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip


def _weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that depend on the key alone, at scales that keep activations near 1."""
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(key))
    noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    if key.endswith("weight") and len(shape) == 1:
        return 1 + 0.1 * noise
    return noise * np.float32(0.02 if len(shape) == 1 else 0.1 if "table" in key else np.prod(shape[1:]) ** -0.5)


def _inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    f, y, x = GRID
    return rng.standard_normal((1, 16, f, 2 * y, 2 * x), np.float32), rng.standard_normal((1, 512, 4096), np.float32)


def _ours(runs: int):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    import functools

    import jax
    import jax.numpy as jnp

    from fps_convert import mapping
    from fps_jax.config import DiTConfig, WanConfig
    from fps_jax.models.dit import dit
    from fps_jax.models.params import unflatten

    config = DiTConfig(task="t2v", dim=DIM, mlp_dim=MLP, num_heads=HEADS, num_layers=LAYERS)
    rows = mapping.rows("dit", WanConfig(dit=config))
    leaves = {path: np.empty(shape, np.float32) for path, shape in mapping.leaves(rows).items()}
    for row in rows:
        leaf = leaves[row.path] if row.layer is None else leaves[row.path][row.layer]
        leaf[...] = mapping.to_ours(_weight(row.keys["diffusers"], row.shapes["diffusers"]), row)
    params = unflatten({path: jnp.asarray(leaves.pop(path)) for path in list(leaves)})
    latents, text = map(jnp.asarray, _inputs())
    model = jax.jit(functools.partial(dit, config))
    return measure(lambda: np.asarray(model(params, latents, jnp.array([500.0]), text).velocity), runs)


def _torch(runs: int):
    import torch
    from diffusers import WanTransformer3DModel

    torch.set_num_threads(THREADS)
    with torch.device("meta"):
        empty = WanTransformer3DModel(**CONFIG)
    model = WanTransformer3DModel(**CONFIG).eval()  # whole: its RoPE tables are no parameters
    with torch.inference_mode():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_weight(key, tuple(empty.get_parameter(key).shape))))
        latents, text = map(torch.from_numpy, _inputs())
        t = torch.tensor([500.0])
        return measure(
            lambda: model(hidden_states=latents, timestep=t, encoder_hidden_states=text, return_dict=False)[0].numpy(),
            runs,
        )


if __name__ == "__main__":
    compare(
        __file__,
        claim="the DiT on a CPU is at least as fast as diffusers' in torch",
        case=f"DiT {DIM}/{MLP}/{HEADS} heads, {LAYERS} layers, {GRID} tokens",
        ours=_ours,
        torch=_torch,
        packages=("torch", "diffusers"),
    )
