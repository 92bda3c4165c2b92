"""fps-info: what it says of a checkpoint, without loading it."""

import numpy as np
import pytest

from fps_jax.causal import CAUSAL_PRESETS, CausalConfig
from fps_jax.checkpoints.format import save_component, write_config
from fps_jax.commands import info
from fps_jax.config import WanConfig
from tests.checkpoints import T2V, TINY


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        info.main([str(a) for a in argv])
    return stop.value.code


def test_info_describes_without_loading(capsys):
    assert run(T2V, "--height", "32", "--width", "48", "--num-frames", "9") == 0
    out = capsys.readouterr().out
    for words in (
        "Wan2.1 T2V, diffusers layout, flow shift 3",
        "212,160 parameters  float32",
        "(18 tokens)",
        "VAE decode",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("causal", "words"),
    [
        (
            CAUSAL_PRESETS["causvid-3"],
            "fps-stream, preset causvid-3: blocks of 3 latent frames, denoised at 1000 757 522 (shift 8), attending all frames\n",
        ),
        (
            CausalConfig(frames_per_block=2, window=7, sink=3, first_frame_alone=True, context_noise=50),
            "fps-stream: blocks of 2 latent frames, the first frame alone, denoised at 1000 750 500 250 (shift 5, warped), "
            "attending 7 frames, the first 3 among them, context noise 50\n",
        ),
    ],
)
def test_info_says_how_a_causal_model_makes_its_blocks(tmp_path, capsys, causal, words):
    write_config(tmp_path, WanConfig(dit=TINY, causal=causal))
    for name in ("dit", "vae", "text_encoder"):
        save_component(tmp_path / name, {"x": np.zeros(1, np.float32)})
    assert run(tmp_path, "--height", "32", "--width", "48", "--num-frames", "9") == 0
    assert f"block diffusion, for {words}" in capsys.readouterr().out


def test_info_says_what_a_checkpoint_lacks(tmp_path, capsys):
    from fps_convert.synthetic import tiny_config, write_checkpoint

    write_checkpoint(tmp_path / "i2v", tiny_config("i2v"), layout="official")
    assert run(tmp_path / "i2v") == 0
    out = capsys.readouterr().out
    assert "Wan2.1 I2V, official layout, flow shift 5 (3 up to 480 x 832)" in out
    assert run(tmp_path) == 2
    assert "error: " in capsys.readouterr().err
