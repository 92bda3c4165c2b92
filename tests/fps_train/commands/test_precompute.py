"""fps-precompute from end to end on a tiny model, and one line for what is wrong."""

import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fps_convert.synthetic import tiny_config, write_checkpoint
from fps_jax import WanPipeline
from fps_jax.config import VAEConfig
from fps_jax.models.vae import encode
from fps_train.commands import precompute
from fps_train.data import open_data
from fps_train.fingerprint import encoder_fingerprint
from fps_train.precompute import check
from fps_train.precompute.frames import read_frames
from tests.checkpoints import T2V, small_checkpoint
from tests.fps_train.clip_files import folder_of_clips, numbered
from tests.fps_train.sample_data import write_data
from tests.reference import rel_l2

BF16 = 2**-8  # the largest relative rounding error


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        precompute.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    path = tmp_path_factory.mktemp("i2v") / "model"
    vae = VAEConfig(base_dim=4, num_res_blocks=1)  # compiles in half the time
    write_checkpoint(path, tiny_config("i2v", vae=vae), layout="diffusers", tokenizer_dir=T2V / "tokenizer")
    return path


@pytest.mark.slow
def test_a_model_is_trained_on_what_the_pipeline_would_give_it(i2v, tmp_path, monkeypatch, capsys):
    clips = folder_of_clips(tmp_path / "clips", {"a": 9, "b": 12})
    Image.fromarray(numbered(3, 64, 64)[2]).save(tmp_path / "start.png")
    (tmp_path / "prompts.txt").write_text("A dog.\tstart.png\n")
    size = ("--height", 32, "--width", 48, "--num-frames", 9)
    data_dir = tmp_path / "data"
    code, out, err = run(
        capsys, i2v, "--videos", clips, "--output", data_dir, *size, "--validation-prompts", tmp_path / "prompts.txt",
        "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    assert "wrote 2 samples" in out
    assert "encode clips: 100%" in err

    pipe = WanPipeline.from_pretrained(i2v, dtype="float32")
    config = pipe.config
    data = open_data(data_dir)
    data.check(config)
    assert data.fingerprints == {
        name: encoder_fingerprint(name, pipe.params[name]) for name in ("vae", "text_encoder", "image_encoder")
    }
    (samples,) = data.samples
    for sample in samples:
        tensors, text = data.read(sample)
        path = clips / sample.source
        pixels = read_frames(path, is_image=False, fps=16, num_frames=9, height=32, width=48)
        latents = encode(config.vae, pipe.params["vae"], pixels[None].astype(np.float32) / 127.5 - 1)
        first = pixels[:1].astype(np.float32) / 255
        for mine, theirs in [
            (tensors["latents"], latents[0]),
            (tensors["condition"], pipe._condition([first], latents.shape, False)[0]),
            (tensors["image"], pipe._encode_images([first], 1)[0]),
            (text, pipe._encode_prompts([sample.caption, *"1234567"])[0]),
        ]:
            assert mine.dtype == jnp.bfloat16
            assert mine.shape == theirs.shape
            assert rel_l2(mine.astype(np.float32), np.asarray(theirs)) < BF16
    prompt = data.validation_prompts[0]
    assert prompt.prompt == "A dog."
    plain = np.full((1, 32, 48, 3), numbered(3)[2, 0, 0, 0] / 255, np.float32)
    want = pipe._condition([plain], (1, *prompt.latent_shape), False)[0]
    assert rel_l2(prompt.condition.astype(np.float32), np.asarray(want)) < BF16

    # What the sheet shows of latents is the decoder's affair; that it is given these is seen here.
    shown = []
    monkeypatch.setattr(
        check, "decode", lambda config, params, z: shown.append(z) or np.zeros((1, 9, 32, 48, 3), np.float32)
    )
    sheet = tmp_path / "sheet.png"
    code, out, err = run(capsys, i2v, "--check", data_dir, "--contact-sheet", sheet)
    assert code == 0, err
    assert "32x48x9" in out
    assert "2 samples, latents [16, 3, 4, 6]" in out
    with Image.open(sheet) as image:
        assert image.size[0] == 9 * 160
    latents = [data.read(sample)[0]["latents"].astype(np.float32) for sample in samples]
    assert all((z[0] == mine).all() for z, mine in zip(shown, latents, strict=True))
    code, _, err = run(capsys, small_checkpoint(), "--check", data_dir, "--contact-sheet", sheet)
    assert code == 2
    assert "has a VAE with another encoder than data" in err


def test_check_reads_every_record(tmp_path, capsys):
    data = write_data(tmp_path / "data", {"32x48x9": 5, "48x32x9": 3}, shard_bytes=1 << 20)
    code, out, _ = run(capsys, "--check", data)
    assert code == 0
    assert "t2v, 8 samples" in out
    assert "belong to no sample" not in out
    for path in (data / "samples").iterdir():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "1 records in latents/ belong to no sample" in run(capsys, "--check", data)[1]
    (shard,) = (data / "latents").iterdir()
    content = bytearray(shard.read_bytes())
    content[2000] ^= 255  # of a record, not of the index at the end, which would be found on opening
    shard.write_bytes(content)
    code, _, err = run(capsys, "--check", data)
    assert code == 2
    assert "is damaged" in err
    assert "delete it and run fps-precompute again" in err


def test_check_finds_nan(tmp_path, capsys, monkeypatch):
    data = write_data(tmp_path / "data", {"32x48x9": 2})
    monkeypatch.setattr("fps_train.data._padded", lambda text, text_len: np.full((text_len, 8), np.nan, np.float32))
    code, _, err = run(capsys, "--check", data)
    assert code == 2
    assert "text of '32x48x9-0.mp4' hold NaN or inf; delete" in err


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return folder_of_clips(tmp_path_factory.mktemp("clips") / "clips", {"a": 9})


ALL = ["MODEL", "--videos", "clips", "--output", "data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model is missing; fps-precompute MODEL --videos DIR --output DATA needs MODEL"),
        (["MODEL"], "output is missing"),
        (["MODEL", "--output", "data"], "videos and captions are both missing"),
        (["MODEL", "--videos", "none", "--output", "data"], "videos='none' is not a folder"),
        (["MODEL", "--videos", "empty", "--output", "data"], "videos='empty' holds no clip"),
        (["none", "--videos", "clips", "--output", "data"], "checkpoint 'none' doesn't exist"),
        (["MODEL", "--videos", "clips", "--output", "a/data"], "doesn't exist; make it first"),
        ([*ALL, "--num-frames", "10"], "num_frames=10 is not 4k+1"),
        ([*ALL, "--height", "100"], "height=100 is not a positive multiple of 16"),
        ([*ALL, "--buckets", "32x48"], "'32x48' is not HEIGHTxWIDTHxFRAMES"),
        ([*ALL, "--worker", "2/2"], "worker='2/2' is not i/n with i below n"),
        ([*ALL, "--fps", "0"], "fps=0 is not in 1 to 240"),
        ([*ALL, "--min-frames", "10"], "no clip is left to encode; the table says why"),
        ([*ALL, "--contact-sheet", "a.png"], "name them with --check DATA"),
        ([*ALL, "--validation-prompts", "none.txt"], "doesn't exist; it is a text file"),
        ([*ALL, "--validation-prompts", "blank.txt"], "holds no prompt; write one a line"),
        ([*ALL, "--validation-prompts", "tab.txt"], "line 1: 1 images after the prompt"),
        ([*ALL, "--size", "3"], "--size"),
        (["--check", "none"], "data 'none' doesn't exist; make it with fps-precompute"),
        (["--check", "empty"], "holds no training data"),
        (["--check", "empty", "--contact-sheet", "a.png"], "contact_sheet needs the checkpoint whose VAE decodes"),
        (["MODEL", "--check", "empty", "--contact-sheet", "a.jpg"], "must end in .png"),
        (["MODEL", "--check", "empty", "--contact-sheet", "b/a.png"], "doesn't exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "tab.txt").write_text("A cat.\ta.png\n")
    shutil.copytree(clips, tmp_path / "clips")
    code, _, err = run(capsys, *(str(small_checkpoint()) if a == "MODEL" else a for a in arguments))
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert err.endswith(line + "\n")
    assert not list(tmp_path.rglob("*.array_record"))
    assert not (tmp_path / "data" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("A dog.", "line 1: 0 images after the prompt; a i2v model takes 1, each after a tab"),
        ("A dog.\tnone.png", "line 1 of validation_prompts=.*none.png' doesn't exist"),
    ],
)
def test_prompts_of_image_models_bring_their_images(i2v, clips, tmp_path, capsys, line, message):
    (tmp_path / "prompts.txt").write_text(line + "\n")
    code, _, err = run(
        capsys, i2v, "--videos", clips, "--output", tmp_path / "data", "--validation-prompts", tmp_path / "prompts.txt"
    )
    assert code == 2
    assert re.search(message, err)


def test_image_models_need_something_to_predict(i2v, clips, tmp_path, capsys):
    code, _, err = run(capsys, i2v, "--videos", clips, "--output", tmp_path / "data", "--min-frames", "1")
    assert code == 2
    assert "min_frames=1 leaves i2v nothing to predict after the given frames; use 5 or more" in err


def test_a_model_without_an_image_tower_cannot_make_image_data(tmp_path, clips, capsys):
    config = tiny_config("i2v", image_encoder=None)
    write_checkpoint(tmp_path / "model", config, layout="diffusers", tokenizer_dir=T2V / "tokenizer")
    code, _, err = run(capsys, tmp_path / "model", "--videos", clips, "--output", tmp_path / "data")
    assert code == 2
    assert "has no image tower, and i2v data hold its tokens" in err
