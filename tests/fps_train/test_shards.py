"""A run starts without a full copy of its parameters on any device."""

import dataclasses

import jax
import numpy as np
import pytest

from fps_jax.checkpoints.format import save_checkpoint
from fps_jax.config import DiTConfig
from fps_jax.models.dit import build_dit
from fps_jax.models.params import abstract_params, init_params
from fps_train import validate
from fps_train.config import LoraOptions, ValidationOptions
from fps_train.data import ValidationPrompt
from fps_train.setup import prepare, start
from tests.fps_train.conftest import WAN
from tests.live_bytes import shard_bytes, watching

# Nearly all of it in matrices, as in the real ones; what isn't cut is small
CONFIG = DiTConfig(
    task="t2v", dim=192, mlp_dim=96, num_heads=12, num_layers=2, text_dim=12, text_len=5, in_channels=4, out_channels=4, freq_dim=32
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "matrices"
    params = jax.jit(lambda key: init_params(build_dit(CONFIG), key))(jax.random.key(0))
    save_checkpoint(path, dataclasses.replace(WAN, dit=CONFIG), {"dit": jax.device_get(params)})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher_weight": 0.5, "dtype": "bfloat16"},
        {"lora": LoraOptions(rank=4), "dtype": "bfloat16"},
        {"from_scratch": True},
    ],
    ids=lambda changes: "+".join(changes) or "full",
)
def test_no_device_ever_holds_the_whole_model(model, options, changes, monkeypatch):
    options = dataclasses.replace(options, model=str(model), data="", mesh="fsdp=4,context=2", batch_size=4, **changes)
    setup = prepare(options, sizes=("64x64x5",))
    with watching(monkeypatch) as watch:
        begun = start(setup)
    kept = shard_bytes((begun.state, begun.frozen, begun.teacher))
    made_of = shard_bytes(begun.state.params)
    assert watch.peak <= kept + made_of + 64, "what stays, and what the state was made of"
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(build_dit(CONFIG))))
    assert watch.peak < 0.75 * size * (2 if options.lora.rank else 4), "as wide as they are read"


def test_validation_videos_are_sampled_from_the_shards(model, options, monkeypatch, tmp_path):
    """What is there beside the state is its weights in the compute dtype, cut as they are."""
    options = dataclasses.replace(options, model=str(model), data="", mesh="fsdp=4,context=2", batch_size=4)
    setup = prepare(options, sizes=("64x64x5",))
    begun = start(setup)
    shape, given, real = setup.buckets[0].latent_shape, [], validate.denoise
    prompt = ValidationPrompt("a circle", np.zeros((CONFIG.text_len, CONFIG.text_dim), np.float32), shape)
    videos = validate.Videos(
        tmp_path, setup.config, dict, (prompt,), prompt.text, setup.buckets, setup.schedule, setup.sampling_shift,
        ValidationOptions(videos=1, steps=2), dtype="bfloat16", fps=16, mesh=setup.mesh,
    )  # fmt: skip

    def denoise(config, params, *args, **kwargs):
        watch.look()
        given.append(params)
        latents = real(config, params, *args, **kwargs)
        watch.look()
        return latents

    monkeypatch.setattr(validate, "denoise", denoise)
    with watching(monkeypatch) as watch:
        (latents,) = videos._sample(begun.state.params, setup.schedule)
    assert latents.shape == (1, *shape)
    (params,) = given
    whole, part = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), shard_bytes(params)
    assert part < whole / 5  # all but what is small is cut in eight
    inputs = 4 * (prompt.text.size * 2 + 3 * np.prod(shape))  # whole on each device, the table of steps with them
    assert watch.peak <= part + inputs + 2000
