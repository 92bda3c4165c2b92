"""One clip, learned by heart under FPSAttention, and sampled again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.attention.schedule import FPSSchedule, Regime, progress
from fps_jax.checkpoints.format import save_checkpoint
from fps_jax.checkpoints.runs import read_run
from fps_jax.models.dit import build_dit
from fps_jax.models.params import init_params
from fps_jax.sampling.guidance import Inputs, guided_velocity
from fps_train.config import OptimizerOptions
from fps_train.loop import train
from fps_train.metrics import read_metrics
from fps_train.setup import prepare
from tests.fps_train import sample_data
from tests.fps_train.conftest import WAN
from tests.fps_train.models import CONFIG
from tests.fps_train.sample_data import write_data

I2V = dataclasses.replace(CONFIG, task="i2v", in_channels=12, image_dim=3)
SCHEDULE = FPSSchedule(
    grid=(2, 4, 4),
    tile=(1, 2, 4),
    regimes=(
        Regime(until=0.4, scales_per_tile=1, window=(2, 1, 1)),
        Regime(until=1.0, scales_per_tile=1, window=(2, 2, 1)),
    ),
)


STEPS = 20  # of sampling


def moving_clip() -> np.ndarray:
    """Latents `[4, 2, 8, 8]` of mean 0 and variance 1: the second frame is the first, a token further right, round the edge."""
    first = np.random.default_rng(0).standard_normal((4, 8, 8))
    clip = np.stack([first, np.roll(first, 2, axis=2)], 1)
    return ((clip - clip.mean()) / clip.std()).astype(jnp.bfloat16)


@pytest.fixture
def one_clip(options, tmp_path, monkeypatch):
    """Options of a run on a clip and its first frame: Wan's positions are relative, so in pure noise a t2v model can't know which
    part of a clip is where, and the loss could not fall to nothing."""
    noise, clip = sample_data.noise, moving_clip()
    given = np.stack([clip[:, 0], np.zeros_like(clip[:, 1])], 1)
    latents = {"clip-64x64x5-0": clip, "clip-64x64x5-0c": given}
    monkeypatch.setattr(
        sample_data, "noise", lambda key, *shape: latents[key] if key in latents else noise(key, *shape)
    )
    data = write_data(tmp_path / "one", {"64x64x5": 1}, task="i2v", text_len=CONFIG.text_len, text_dim=CONFIG.text_dim)
    params = jax.jit(functools.partial(init_params, build_dit(I2V)))(jax.random.key(0))
    save_checkpoint(tmp_path / "i2v", dataclasses.replace(WAN, dit=I2V), {"dit": jax.device_get(params)})
    SCHEDULE.save(tmp_path / "own.json")
    return dataclasses.replace(
        options, model=str(tmp_path / "i2v"), data=str(data), schedule=str(tmp_path / "own.json"), steps=300, batch_size=8,
        accumulate=1, from_scratch=True, text_dropout=0.0,
        optimizer=OptimizerOptions(kind="muon", learning_rate=2e-2, warmup=20, eps=1e-8, schedule="cosine", ema=0.0),
        validation=dataclasses.replace(options.validation, every=0, samples=0),
        checkpoint=dataclasses.replace(options.checkpoint, every=1000),
    )  # fmt: skip


@pytest.mark.slow
def test_one_clip_is_learned_by_heart(one_clip):
    run = train(one_clip, show=False)
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    # At first noise - x0 itself, 2. Of an unknown clip the best guess leaves 1 / (sigma^2 + (1 - sigma)^2), pi / 2 in the mean; of
    # one that is known nothing.
    assert losses[0] > 1.5
    assert np.mean(losses[-20:]) < 0.1
    # And what a sampler makes of it, by the schedule, is that clip: of an independent one the error is 2, of its mean 1.
    error = np.square(sampled(run, one_clip) - moving_clip().astype(np.float32)).mean((0, 2, 3))
    assert error.max() < 0.03, "by frame"


def sampled(run, options):
    """Euler's steps from noise that training hasn't seen, each under the attention of its noise level."""
    setup = prepare(options)
    given = jax.tree.map(lambda a: jnp.asarray(a[:1]), setup.batches.at(0))
    x = jax.random.normal(jax.random.key(5), given.latents.shape)
    inputs = Inputs(x, given.text, None, given.condition, given.image)
    weights = read_run(run).trained("raw")
    regimes = setup.buckets[0].regimes

    @functools.partial(jax.jit, static_argnames="attention")
    def velocity(x, sigma, attention):
        return guided_velocity(I2V, weights, inputs, x, 1000 * sigma, attention, dtype=jnp.float32).velocity

    sigmas = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
    at = SCHEDULE.regime_at(progress(sigmas[:-1].astype(np.float64), setup.sampling_shift))
    for sigma, later, regime in zip(sigmas, sigmas[1:], at, strict=False):
        x = x + (later - sigma) * velocity(x, sigma[None], regimes[regime].attention)
    assert set(at.tolist()) == {0, 1}
    return np.asarray(x)[0]
