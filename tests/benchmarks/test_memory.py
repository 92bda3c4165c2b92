"""What the committed compiles for an H200 say of block diffusion's programs: the cache is there once."""

import json

import pytest

from benchmarks.record import RESULTS
from fps_jax.config import WAN_T2V_1_3B


@pytest.mark.parametrize("kind", ["", ", FP8 cache"])
def test_a_block_s_program_for_a_gpu_has_one_cache(kind):
    programs = json.loads((RESULTS / "memory_h200.json").read_text())["programs"]
    small, large = (
        programs[f"block diffusion, a block, T2V-1.3B, 480 x 832, window {window}{kind}"] for window in (12, 21)
    )
    assert small["hopper_kernel"]
    assert large["hopper_kernel"]
    dit, bytes_of_number = WAN_T2V_1_3B.dit, 1 if kind else 2
    frames = (
        2 * dit.num_layers * 30 * 52 * dit.dim * bytes_of_number / 1e9
    )  # K and V of a latent frame, without padding
    for row, window in ((small, 12), (large, 21)):
        assert window * frames <= row["aliased_gb"] <= 1.1 * window * frames  # taken and given back in place
    # Of nine frames more, K and V of one layer in another order at most; all layers' would be all that the cache grows.
    assert large["temporaries_gb"] - small["temporaries_gb"] < 0.1 * 9 * frames
