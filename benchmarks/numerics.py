"""The errors that the parity tests measure, as a table: relative L2 against the original PyTorch code.

    python benchmarks/numerics.py

Runs the parity tests with PARITY_LOG set and writes the largest error of each to results/numerics.json.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from record import write

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What is measured -> the tests that measure it .
PARITY = {
    "DiT, output and activations": "models/test_dit.py::test_t2v_output_and_every_activation_match_upstream",
    "DiT, single sample, fractional timestep": "models/test_dit.py::test_t2v_single_sample_and_fractional_timestep",
    "DiT, two grids in a batch": "models/test_dit.py::test_batch_of_two_grids_with_masked_padding_matches_upstream",
    "DiT, FLF2V": "models/test_dit.py::test_flf2v_output_matches_diffusers",
    "VAE encode": "models/test_vae.py::test_encode_agrees_with_upstream",
    "VAE decode": "models/test_vae.py::test_decode_agrees_with_upstream",
    "UMT5": "models/test_text_encoder.py::test_float32_parity",
    "UMT5, 512 tokens": "models/test_text_encoder.py::test_float32_parity_at_512_tokens",
    "CLIP image tower": "models/test_image_encoder.py::test_penultimate_hidden_state",
    "solvers, whole trajectories": "sampling/test_solvers.py::test_trajectories_match_the_originals",
    "pipeline T2V, latents": "sampling/test_pipeline.py::test_t2v_latents_match_upstream",
    "pipeline T2V, frames": "sampling/test_pipeline.py::test_t2v_frames_match_diffusers",
    "few steps and named levels, latents": ("sampling/test_few_step.py::test_latents_match_the_original_on_its_noise"),
    "pipeline I2V and FLF2V, condition and latents": "sampling/test_pipeline.py::test_image_to_video_matches_diffusers",
    "DiT in bf16: upstream's own autocast, ours": "models/test_dit.py::test_bf16_error_is_at_most_twice_upstreams",
    "UMT5 in bf16: valid tokens upstream's own, ours; all tokens ours, upstream's own": (
        "models/test_text_encoder.py::test_bf16_error_is_at_most_twice_upstreams"
    ),
}
# The attention has no PyTorch original: it is measured against its definition in NumPy, and its own specification.
ATTENTION = {
    "sparse attention against the definition (NumPy, float64), random grids": (
        "attention/test_attend.py::test_sparse_attention_and_its_gradients_are_the_definitions"
    ),
    "dense in tile order against raster order, output and gradients": (
        "attention/test_attend.py::test_dense_attention_in_tile_order_is_dense_attention_in_raster_order"
    ),
    "FP8, portable against the specification, random grids": (
        "attention/test_attend.py::test_portable_fp8_agrees_with_the_specification"
    ),
    "FP8, portable against the specification, one chunk of keys, output and gradients": (
        "attention/test_attend.py::test_portable_fp8_with_one_chunk_of_keys_differs_by_float32_alone"
    ),
    "FP8, portable against the specification, two chunks of keys, output and gradients": (
        "attention/test_attend.py::test_portable_fp8_with_many_chunks_of_keys_rounds_alike"
    ),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "errors"
        tests = [f"tests/fps_jax/{test}" for test in [*PARITY.values(), *ATTENTION.values()]]
        command = [sys.executable, "-m", "pytest", "-q", *tests]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PARITY_LOG": str(log)}, check=True)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    errors = {}
    for name, test in (PARITY | ATTENTION).items():
        mine = [error for where, error in lines if where.split("[")[0].removeprefix("tests/fps_jax/") == test]
        errors[name] = [float(f"{e:.2g}") for e in mine] if "bf16" in name else float(f"{max(mine):.2g}")
        print(f"{name:50} {errors[name]}")
    split = {
        name: {key: errors[key] for key in group} for name, group in (("errors", PARITY), ("attention", ATTENTION))
    }
    write("numerics", {"claim": "relative L2 error against the original PyTorch code, float32, CPU", **split})


if __name__ == "__main__":
    main()
