"""fps-info: what it says of a checkpoint, without loading it."""

import pytest

from fps_jax.commands import info
from tests.checkpoints import T2V


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


def test_info_says_what_a_checkpoint_lacks(tmp_path, capsys):
    from fps_convert.synthetic import tiny_config, write_checkpoint

    write_checkpoint(tmp_path / "i2v", tiny_config("i2v"), layout="official")
    assert run(tmp_path / "i2v") == 0
    out = capsys.readouterr().out
    assert "Wan2.1 I2V, official layout, flow shift 5 (3 up to 480 x 832)" in out
    assert run(tmp_path) == 2
    assert "error: " in capsys.readouterr().err
