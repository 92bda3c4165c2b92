"""A small model and small data, on disk as users have them, for all tests of runs."""

import pathlib

import jax
import numpy as np
import pytest

from fps_jax.checkpoints.format import save_checkpoint
from fps_jax.config import VAEConfig, WanConfig
from fps_jax.models.params import abstract_params, flatten, unflatten
from fps_jax.models.vae import build_vae
from fps_train.config import CheckpointOptions, FlowOptions, OptimizerOptions, TrainConfig, ValidationOptions
from tests.fps_train.models import CONFIG, LATENTS, params
from tests.fps_train.sample_data import write_data

WAN = WanConfig(dit=CONFIG, vae=VAEConfig(base_dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4))


def vae_params():
    rng = np.random.default_rng(0)
    leaves = flatten(abstract_params(build_vae(WAN.vae)))
    return unflatten(
        {p: (rng.normal(size=a.shape) / max(np.prod(a.shape[:-1]), 1) ** 0.5).astype(np.float32) for p, a in leaves}
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> pathlib.Path:
    """A checkpoint of ours: a DiT and a VAE."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_checkpoint(path, WAN, {"dit": jax.device_get(params()), "vae": vae_params()})
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    """Eight samples of 5 frames of 64 x 64 pixels, tokens (2, 4, 4)."""
    folder = tmp_path_factory.mktemp("data") / "samples"
    assert LATENTS[1:] == (2, 8, 8)
    return write_data(folder, {"64x64x5": 8}, text_len=CONFIG.text_len, text_dim=CONFIG.text_dim, prompts=True)


@pytest.fixture
def options(model, data, tmp_path) -> TrainConfig:
    """A run of six steps of two microbatches, saved every third."""
    return TrainConfig(
        model=str(model),
        data=str(data),
        output=str(tmp_path / "run"),
        steps=6,
        batch_size=2,
        accumulate=2,
        dtype="float32",
        remat="none",
        schedule=str(write_schedule(tmp_path)),
        flow=FlowOptions(distribution="uniform"),
        optimizer=OptimizerOptions(learning_rate=1e-3, warmup=1, eps=1e-8, ema=0.5),
        validation=ValidationOptions(every=3, samples=2, videos=0),
        checkpoint=CheckpointOptions(every=3, keep=2, best=0),
    )


def write_schedule(folder: pathlib.Path) -> pathlib.Path:
    from fps_jax.attention.schedule import FPSSchedule, Regime

    path = folder / "schedule.json"
    FPSSchedule(
        grid=(2, 4, 4),
        tile=(1, 2, 4),
        regimes=(
            Regime(until=0.4, scales_per_tile=1, window=(1, 2, 1)),
            Regime(until=1.0, scales_per_tile=1, window=(2, 1, 1)),
        ),
    ).save(path)
    return path
