"""Bytes per device of the real programs at real size, compiled for an H200 on a machine that has none.

    make memory        # or: LD_LIBRARY_PATH=.../nvidia/cudnn/lib python -m benchmarks.memory [PROGRAM ...]

XLA's CUDA plugin compiles for a described device (`jax.experimental.topologies`) and says how much memory the program takes:
arguments (weights and inputs), outputs, temporaries. GEMM and convolution algorithms are not autotuned offline, so their workspace
is indicative. Needs the `offline-gpu` extra. Writes benchmarks/results/memory_h200.json.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_cases.timing import BF16_LIMIT
from fps_jax.errors import run_cli
from fps_train.described import KINDS, described_devices, prepare_process

H200_BYTES, H200_BANDWIDTH = 141e9, 4.8e12


def compile_for_h200(fn: Callable, *args: Any, donate: int | tuple[int, ...] = ()) -> Any:
    """jax's Compiled of fn for ShapeDtypeStructs, on one described H200."""
    import jax

    (device,) = described_devices(KINDS["h200"])
    on_device = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on_device), args)
    with jax.default_device(device):
        return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


def programs() -> dict[str, Callable[[], Any]]:
    """Name -> a function that compiles it."""
    import jax
    import jax.numpy as jnp

    from fps_jax.attention.attend import attend
    from fps_jax.attention.cache import CacheLayout
    from fps_jax.attention.schedule import FPSSchedule
    from fps_jax.causal import CAUSAL_PRESETS
    from fps_jax.config import WAN_I2V_14B, WAN_T2V_1_3B, WAN_T2V_14B, WanConfig
    from fps_jax.models.dit import DENSE, build_dit, param_dtype
    from fps_jax.models.dit_layers import TextKV
    from fps_jax.models.params import abstract_params, flatten, unflatten
    from fps_jax.models.text_encoder import build_text_encoder, encode_text
    from fps_jax.models.vae import build_vae, decode_chunk, encode_chunk
    from fps_jax.sampling.denoise import _denoise
    from fps_jax.sampling.flow import block_levels
    from fps_jax.sampling.guidance import Inputs
    from fps_jax.sampling.rollout import denoise_block
    from fps_jax.sampling.solvers import SolverTable, coefficients, solver_table
    from fps_jax.sizes import latent_grid, token_grid

    f32, bf16 = jnp.float32, jnp.bfloat16
    spec = jax.ShapeDtypeStruct

    def denoise(config: WanConfig, height: int, width: int, num_frames: int = 81, steps: int = 50, fps: bool = False):
        frames, h, w = latent_grid(height, width, num_frames)
        weights = flatten(abstract_params(build_dit(config.dit)))
        params = unflatten({path: spec(leaf.shape, param_dtype(path, bf16)) for path, leaf in weights})
        latents, text = spec((1, 16, frames, h, w), f32), spec((1, 512, 4096), bf16)
        row = functools.partial(spec, dtype=f32)
        table = SolverTable(row((steps,)), row((steps,)), row((steps, 5)), row((steps, 3)))
        condition = None if config.task == "t2v" else spec((1, 20, frames, h, w), f32)
        image = None if config.task == "t2v" else spec((1, 257, 1280), f32)

        segments = ((steps, DENSE),)
        if fps:
            grid = token_grid((frames, h, w))
            sigma = solver_table("unipc", "wan", steps, 5.0).sigma
            segments = FPSSchedule.default(grid).segments(sigma, 5.0, grid, config.dit.num_layers)

        def run(params, inputs, table, guidance, number):
            return _denoise(
                params, inputs, table, guidance, number,
                config=config.dit, dtype=jnp.dtype(bf16), batch_guidance=False, segments=segments, report="nothing",
            )  # fmt: skip

        inputs: Any = Inputs(latents, text, text, condition, image)
        return compile_for_h200(run, params, inputs, table, spec((), f32), spec((), jnp.int32))

    def attention(heads: int, height: int, width: int):
        grid = token_grid(latent_grid(height, width, 81))
        plan = FPSSchedule.default(grid).plans(grid)[0]
        x = spec((1, plan.layout.num_stored, heads, 128), bf16)

        def forward_backward(q, k, v, d_out):
            out, vjp = jax.vjp(functools.partial(attend, plan=plan, implementation="portable"), q, k, v)
            return out, vjp(d_out)

        return compile_for_h200(forward_backward, x, x, x, x)

    def text(batch: int):
        config = WAN_T2V_14B.text_encoder
        params = jax.tree.map(lambda s: spec(s.shape, bf16), abstract_params(build_text_encoder(config)))
        ids = spec((batch, 512), jnp.int32)
        return compile_for_h200(lambda p, i, m: encode_text(config, p, i, m, dtype=bf16), params, ids, ids)

    def vae(chunk: Callable, height: int, width: int, first_shape: tuple[int, ...], later_shape: tuple[int, ...]):
        config = WAN_T2V_14B.vae
        params = abstract_params(build_vae(config))
        _, cache = jax.eval_shape(lambda p, x: chunk(config, p, x, None), params, spec(first_shape, f32))
        fn = lambda p, x, cache: chunk(config, p, x, cache)  # noqa: E731
        return compile_for_h200(fn, params, spec(later_shape, f32), cache, donate=2)

    def block(config: WanConfig, height: int, width: int, window: int, scales_per_tile: int | None = None):
        """A block of 3 latent frames in 4 steps, Self-Forcing's, once the cache is full; with scales, of FP8 codes."""
        causal = dataclasses.replace(CAUSAL_PRESETS["self-forcing"], window=window)
        dit, shape = config.dit, (1, 16, 3, height // 8, width // 8)
        layout = CacheLayout.build(causal, (height // 16, width // 16), scales_per_tile=scales_per_tile)
        weights = flatten(abstract_params(build_dit(dit)))
        params = unflatten({path: spec(leaf.shape, param_dtype(path, bf16)) for path, leaf in weights})
        text = TextKV(*2 * (spec((dit.num_layers, 1, 512, dit.num_heads, dit.head_dim), bf16),))
        cache = jax.eval_shape(lambda: layout.zeros(dit.num_layers, 1, dit.num_heads, dit.head_dim, bf16))
        levels = coefficients("lcm", block_levels(causal))
        context = layout.context(window)
        arrays: Any = spec(shape, f32), spec((len(causal.steps), *shape), f32)
        inputs = Inputs(arrays[0], text, step_noise=arrays[1])
        rope = spec((2, math.prod(shape[2:]) // 4, dit.head_dim // 2), f32)
        context = jax.tree.map(lambda a: spec(a.shape, a.dtype), context)
        table = jax.tree.map(lambda a: spec(a.shape, f32), levels)
        run = functools.partial(denoise_block, config=dit, layout=layout, dtype=jnp.dtype(bf16), implementation="auto")
        return compile_for_h200(run, params, inputs, cache, rope, context, table, spec((), f32), donate=2)

    return {
        "text encode, UMT5-xxl, 2 x 512 tokens": lambda: text(2),
        "denoise, T2V-1.3B, 480 x 832 x 81": lambda: denoise(WAN_T2V_1_3B, 480, 832),
        "denoise, T2V-14B, 720 x 1280 x 81": lambda: denoise(WAN_T2V_14B, 720, 1280),
        "denoise, I2V-14B, 720 x 1280 x 81": lambda: denoise(WAN_I2V_14B, 720, 1280),
        "denoise, T2V-14B, 720 x 1280 x 81, FPSAttention": lambda: denoise(WAN_T2V_14B, 720, 1280, fps=True),
        "FPSAttention (portable), forward and backward, 14B, 720 x 1280 x 81": lambda: attention(40, 720, 1280),
        "block diffusion, a block, T2V-1.3B, 480 x 832, window 12": lambda: block(WAN_T2V_1_3B, 480, 832, 12),
        "block diffusion, a block, T2V-1.3B, 480 x 832, window 21": lambda: block(WAN_T2V_1_3B, 480, 832, 21),
        "block diffusion, a block, T2V-1.3B, 480 x 832, window 12, FP8 cache": lambda: block(
            WAN_T2V_1_3B, 480, 832, 12, 1
        ),
        "block diffusion, a block, T2V-1.3B, 480 x 832, window 21, FP8 cache": lambda: block(
            WAN_T2V_1_3B, 480, 832, 21, 1
        ),
        "VAE decode, one chunk, 480 x 832": lambda: vae(
            decode_chunk, 480, 832, (1, 1, 60, 104, 16), (1, 1, 60, 104, 16)
        ),
        "VAE decode, one chunk, 720 x 1280": lambda: vae(
            decode_chunk, 720, 1280, (1, 1, 90, 160, 16), (1, 1, 90, 160, 16)
        ),
        "VAE encode, one chunk, 720 x 1280": lambda: vae(
            encode_chunk, 720, 1280, (1, 1, 720, 1280, 3), (1, 4, 720, 1280, 3)
        ),
    }


def block_roofline(
    config: Any, height: int, width: int, window: int, cache_bytes: int = 2, frames: int = 3, passes: int = 5
) -> dict[str, float]:
    """What a block of a full cache computes, and the seconds that takes at the GPU's dense bf16 peak: four steps and a clean pass.

    Two operations for each weight of a matrix and token, and 4 S K D for attention to K keys; text K and V are made once a prompt.
    Weights and cache are read once a pass. cache_bytes: of a number in the cache.
    """
    tokens, keys = (n * (height // 16) * (width // 16) for n in (frames, window))
    dim, layers = config.dim, config.num_layers
    weights = layers * (6 * dim * dim + 2 * dim * config.mlp_dim)  # q k v o, cross q and o, MLP
    attended = 4 * tokens * (keys + config.text_len) * dim * layers
    flop = passes * (2 * weights * tokens + attended)
    moved = passes * (2 * weights + 2 * cache_bytes * keys * dim * layers)
    return {
        "tflop": round(flop / 1e12, 1),
        "read_gb": round(moved / 1e9, 1),
        "roofline_s": round(max(flop / BF16_LIMIT, moved / H200_BANDWIDTH), 4),
        "frames_per_second_at_roofline": round(4 * frames / max(flop / BF16_LIMIT, moved / H200_BANDWIDTH), 1),
    }


def main() -> None:
    prepare_process()
    from benchmarks.record import write
    from fps_jax.config import WAN_T2V_1_3B

    results, wanted = {}, sys.argv[1:]
    for name, build in programs().items():
        if wanted and not any(word in name for word in wanted):
            continue
        start = time.time()
        compiled = build()
        memory = compiled.memory_analysis()
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        results[name] = {
            "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 3),
            "outputs_gb": round(memory.output_size_in_bytes / 1e9, 3),
            "temporaries_gb": round(memory.temp_size_in_bytes / 1e9, 3),
            "aliased_gb": round(memory.alias_size_in_bytes / 1e9, 3),
            "total_gb": round(total / 1e9, 3),
            "fits_h200": total < H200_BYTES,
            "cudnn_attention": "cudnn$fmha" in compiled.as_text(),
            "hopper_kernel": "mosaic_gpu" in compiled.as_text(),
            "compile_s": round(time.time() - start, 1),
        }
        if name.startswith("block diffusion"):
            window = int(name.split("window ")[1].split(",")[0])
            results[name] |= block_roofline(WAN_T2V_1_3B.dit, 480, 832, window, 1 if "FP8" in name else 2)
        print(
            f"{name:68} {results[name]['total_gb']:8.2f} GB  ({results[name]['temporaries_gb']:.2f} temporary)",
            flush=True,
        )
    if not wanted:
        write(
            "memory_h200", {"device": "NVIDIA H200, described (141 GB); compiled offline, not run", "programs": results}
        )


if __name__ == "__main__":
    sys.exit(run_cli(lambda _: main()))
