"""fps-train-vae: what it reads, learns, writes and refuses."""

import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.checkpoints.format import read_config, save_checkpoint
from fps_jax.checkpoints.open import open_model
from fps_jax.config import DiTConfig, VAEConfig, WanConfig
from fps_jax.media.video import save_video
from fps_jax.models import vae as model
from fps_jax.models.init import init_vae_for_training
from fps_jax.models.params import flatten, unflatten
from fps_train import vae
from fps_train.commands.train_vae import main
from fps_train.fingerprint import encoder_fingerprint
from fps_train.precompute.buckets import Size
from fps_train.precompute.memory import load_stretches, stretches

QUICK = [
    "--size", "16", "16", "--batch-size", "2", "--warmup-steps", "2", "--log-every", "1", "--save-every", "2"
]  # fmt: skip
# Both temporal stages at a fraction of the layers: a step compiles in seconds.
SMALL = VAEConfig(
    base_dim=4, z_dim=3, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True), latents_mean=(0.5,) * 3,
    latents_std=(2.0,) * 3,
)  # fmt: skip


def moving(frames, height, width, seed=0):
    """A bright square that moves over a dark ground: uint8 [F, H, W, 3]."""
    rng = np.random.default_rng(seed)
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = rng.integers(0, 80, 3)
    colour, (y, x) = rng.integers(150, 255, 3), rng.integers(0, height // 2, 2)
    for f in range(frames):
        left = (x + f) % (width - width // 3)
        video[f, y : y + height // 3, left : left + width // 3] = colour
    return video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    for name, frames, seed in (("a.mp4", 11, 0), ("b.mp4", 5, 1), ("short.mp4", 3, 2)):
        save_video(moving(frames, 24, 32, seed), path / name, crf=0)
    return path


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint of a VAE alone, never trained."""
    path = tmp_path_factory.mktemp("start") / "checkpoint"
    dit = DiTConfig(task="t2v", dim=16, mlp_dim=16, num_heads=1, num_layers=1, in_channels=3, out_channels=3)
    save_checkpoint(path, WanConfig(dit=dit, vae=SMALL), {"vae": init_vae_for_training(SMALL, jax.random.key(3))})
    return path


@pytest.fixture(scope="module")
def video(folder, start):
    return ["--videos", folder, "--init-from", start, "--frames", 5, "--steps", 4, *QUICK]


@pytest.fixture(scope="module")
def whole_run(video, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "whole"
    assert run(*video, "--output", output) == 0
    return output


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_a_checkpoint_with_statistics_of_its_clips(whole_run, folder):
    assert [line["step"] for line in metrics(whole_run)] == [1, 2, 3, 4]
    config = read_config(whole_run / "checkpoint")
    assert vae.raw(config.vae) == vae.raw(SMALL)
    params = open_model(whole_run / "checkpoint").load("vae", "float32")
    clips = load_stretches(folder, None, Size(16, 16, 5), max_bytes=1 << 20)
    encode = jax.jit(model.encode_moments, static_argnums=0)
    latents = np.asarray(encode(config.vae, params, clips.read(clips.apart).astype(np.float32) / 127.5 - 1)[0])
    np.testing.assert_allclose(latents.mean((0, 2, 3, 4)), 0, atol=1e-4)
    std = np.array(config.vae.latents_std)
    live = std > 1.001 * vae._DEAD * std.max()
    assert live.any()
    np.testing.assert_allclose(latents.std((0, 2, 3, 4))[live], 1, atol=1e-3)


def test_a_killed_run_goes_on_to_the_same_bits(whole_run, tmp_path, video):
    """As if killed after step 3 was logged and before it was saved: state 2 is there, the metrics reach further."""
    output = tmp_path / "again"
    shutil.copytree(whole_run, output)
    shutil.rmtree(output / "state" / "4")
    shutil.rmtree(output / "checkpoint")
    lines = [json.dumps(line) for line in metrics(whole_run)[:3]]
    (output / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:20]]))
    assert run(*video, "--output", output, "--resume") == 0
    for line in (first := metrics(whole_run)) + (second := metrics(output)):
        del line["seconds_a_step"]
    assert second == first
    one, two = (open_model(path / "checkpoint").load("vae", "float32") for path in (whole_run, output))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_decoder_trained_alone_leaves_latents_as_they_are(whole_run, video, tmp_path):
    source, output = whole_run / "checkpoint", tmp_path / "decoder"
    # A share of noise, so that the encoder would get a gradient from it too.
    assert run(*video, "--init-from", source, "--train", "decoder", "--weight-decay", "0.1", "--output", output) == 0
    assert read_config(output / "checkpoint").vae == read_config(source).vae
    vaes = [open_model(p).load("vae", "float32") for p in (source, output / "checkpoint")]
    assert len({encoder_fingerprint("vae", of) for of in vaes}) == 1  # data that were made with one are the other's
    before, after = (dict(flatten(of)) for of in vaes)
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert changed == {path for path in before if path.startswith(("decoder/", "post_quant_conv/"))}


@pytest.mark.slow
def test_images_train_a_vae_from_scratch_that_video_can_go_on_from(folder, tmp_path):
    new = ["--base-dim", "4", "--z-dim", "3", "--num-res-blocks", "1"]
    assert run("--videos", folder, "--output", tmp_path / "images", "--steps", 3, *new, *QUICK) == 0
    config = read_config(tmp_path / "images" / "checkpoint")
    assert (config.vae.base_dim, config.vae.z_dim, config.vae.num_res_blocks) == (4, 3, 1)
    assert config.dit.in_channels == config.dit.out_channels == 3
    trained = dict(flatten(open_model(tmp_path / "images" / "checkpoint").load("vae", "float32")))
    started = dict(flatten(init_vae_for_training(vae.raw(config.vae), jax.random.key(0))))
    changed = {path for path in started if (started[path] != trained[path]).any()}
    # No decay either: what halves and doubles the frame rate still passes frames on.
    assert set(started) - changed == {path for path in started if "/time_conv/" in path}
    for path, value in trained.items():
        if value.ndim == 5 and value.shape[0] == 3 and path in changed:
            assert not value[:-1].any(), path
    # A still clip comes back as the image does, chunk by chunk, as latents of real clips are made.
    params, image = unflatten(trained), moving(1, 16, 16)[None].astype(np.float32) / 127.5 - 1
    one = model.decode(config.vae, params, model.encode(config.vae, params, image))
    five = model.decode(config.vae, params, model.encode(config.vae, params, image.repeat(5, axis=1)))
    assert one.std() > 0.01
    np.testing.assert_allclose(five, one.repeat(5, axis=1), atol=1e-5)  # float32's rounding through some forty layers


def test_the_loss_has_its_parts():
    config = vae.raw(SMALL)
    params = init_vae_for_training(config, jax.random.key(1))
    video = jnp.asarray(moving(1, 16, 16)[None])
    loss_of = jax.jit(vae.reconstruction_loss, static_argnums=(0, 1))
    options = vae.VAETraining(kl_weight=0.5, latent_noise=0.0)
    loss, parts = loss_of(config, options, params, video, jax.random.key(2))
    np.testing.assert_allclose(loss, parts["l1"] + parts["mse"] + 0.5 * parts["kl"], rtol=1e-6)
    moments = model.encode_moments(config, params, video.astype(jnp.float32) / 127.5 - 1)
    mean, log_variance = (np.asarray(a, np.float64) for a in moments)
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).mean()
    np.testing.assert_allclose(parts["kl"], kl, rtol=1e-5)
    noisy, _ = loss_of(config, replace(options, latent_noise=9.0), params, video, jax.random.key(2))
    assert noisy != loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "4"], r"frames=4 is not 4k\+1 .*; use 5"),
        (["--size", "16", "20"], "size: width 20 is not a positive multiple of 16 .*; use 16"),
        (["--frames", "13"], r"no clip is left of 3: .*: shorter than 13 frames at 16 fps"),
        (["--videos", "nowhere"], "videos='nowhere' is not a folder"),
        (["--captions", "nowhere.csv"], "captions='nowhere.csv' doesn't exist"),
        (["--max-gib", "1e-5"], "take more than the 1e-05 GiB that are allowed in memory; use fewer clips"),
        (["--max-gib", "0"], "max_gib=0.0 is not above 0"),
        (["--lr", "0"], "lr=0.0 is not above 0, up to 1e"),
        (["--warmup-steps", "9"], "warmup_steps=9 leaves nothing of steps=4"),
        (["--z-dim", "0"], "z_dim=0 is not in 1 to 256"),
        (["--base-dim", "1000000"], "base_dim=1000000 is not in 1 to 512"),
        (["--num-res-blocks", "1000000"], "num_res_blocks=1000000 is not in 1 to 16"),
        (["--batch-size", "1000000000"], "batch_size=1000000000 is not in 1 to 4096"),
        (["--steps", "100000000000000000000"], "steps=1000.* is not in 1 to 100000000"),
        (["--seed", "4294967296"], "seed=4294967296 is not in 0 to 4294967295"),
        (["--lr", "inf"], "lr=inf is not above 0, up to 1e"),
        (["--clip-norm", "nan"], "clip_norm=nan is not above 0, up to 1e"),
        (["--kl-weight", "inf"], r"kl_weight=inf is not in 0 to 1e"),
        (["--train", "decoder"], "train='decoder' needs a VAE whose encoder stays; give it with --init-from"),
        (["--resume"], "holds no run to --resume"),
        (["--init-from", "nowhere"], "checkpoint 'nowhere' doesn't exist"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(folder, tmp_path, capsys, arguments, message):
    output = tmp_path / "out"
    assert run("--videos", folder, "--output", output, "--steps", 4, *QUICK, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not output.exists()


def test_other_options_and_full_folders_are_refused(whole_run, video, start, tmp_path, capsys):
    again = [*video, "--output", whole_run]
    assert run(*again) == 2
    assert "is not empty; give another folder, or --resume" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for output, message in (("file", "is a file; give a folder"), ("file/run", "can't be made in")):
        assert run(*video, "--output", tmp_path / output) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert message in error
    assert run(*again, "--resume", "--lr", "1e-3") == 2
    assert "lr=0.001, but the run in" in capsys.readouterr().err
    assert run(*video, "--output", tmp_path / "new", "--z-dim", "4") == 2
    assert f"z_dim=4, but {start} has 3" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mp4").write_bytes(b"no video")
    assert run("--videos", tmp_path / "bad", "--output", tmp_path / "new", *QUICK) == 2
    assert "no clip is left of 1: x.mp4: can't be read (" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"\xff{", b"[1]", b"[" * 200_000])
def test_a_runs_own_options_that_are_damaged_are_named(content, folder, tmp_path, capsys):
    (tmp_path / "options.json").write_bytes(content)
    assert run("--videos", folder, "--output", tmp_path, "--steps", 4, *QUICK, "--resume") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "options.json" in error
    assert "a run writes its own" in error


def test_a_loss_that_is_nan_stops_the_run_and_is_not_saved(tmp_path):
    params = init_vae_for_training(SMALL, jax.random.key(1))
    params["decoder"]["conv_out"]["bias"] = jnp.full(3, jnp.nan)
    # the options of `video`, so that its program is used again
    options = vae.VAETraining(steps=4, batch_size=2, lr=4e-4, warmup_steps=2, log_every=1, save_every=2)
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        vae.train(SMALL, options, params, stretches([moving(10, 16, 16)], 5), tmp_path)
    assert not [path for path in (tmp_path / "state").iterdir() if path.name.isdigit()]


@pytest.mark.slow
def test_a_few_clips_are_learned(tmp_path):
    """Images, then video from there, to 22 dB with the noise: well above the best still picture of each clip."""
    moves = [moving(5, 16, 16, seed) for seed in range(3)]
    still = np.stack([clip - clip.mean(0) for clip in moves])
    assert 10 * np.log10(255**2 / np.square(still).mean()) < 19
    config = replace(SMALL, base_dim=8, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    options = vae.VAETraining(
        steps=150, batch_size=8, lr=2e-3, warmup_steps=10, latent_noise=0.1, kl_weight=1e-6, log_every=50, save_every=150
    )  # fmt: skip
    params = init_vae_for_training(config, jax.random.key(0))
    params = vae.train(config, options, params, stretches(list(moves), 1), tmp_path / "images")
    options = replace(options, steps=120, batch_size=3, lr=1e-3)
    vae.train(config, options, params, stretches(list(moves), 5), tmp_path / "video")
    assert metrics(tmp_path / "video")[-1]["psnr"] > 22
