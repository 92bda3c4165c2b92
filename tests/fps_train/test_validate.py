"""Validation: videos that follow the weights, a loss that is the same at every look."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.attention.schedule import FPSSchedule
from fps_train import validate
from fps_train.config import FlowOptions, ValidationOptions
from fps_train.data import open_data
from fps_train.plan import BucketPlan
from fps_train.regimes import training_regimes
from fps_train.state import Parts
from fps_train.step import StepOptions
from fps_train.validate import Videos, validation_loss
from tests.fps_train.conftest import WAN, vae_params, write_schedule
from tests.fps_train.models import CONFIG, LATENTS, batch, params

FLOW = FlowOptions(distribution="uniform")


def bucket(schedule):
    regimes = training_regimes(schedule, FLOW, grid=(2, 4, 4), num_layers=2, sampling_shift=3.0, sampling_steps=4)
    return BucketPlan(LATENTS, (2, 4, 4), regimes)


def moved():
    return jax.tree.map(lambda a: 1.3 * a, params())


@pytest.mark.slow
def test_videos_change_when_weights_do_and_only_then(tmp_path, data):
    schedule = FPSSchedule.load(write_schedule(tmp_path))
    opened = open_data(data)

    def videos(schedule):
        return Videos(
            tmp_path, WAN, vae_params, opened.validation_prompts, opened.empty_text, (bucket(schedule),), schedule, 3.0,
            ValidationOptions(videos=1, steps=2, guidance_scale=2.0), dtype="float32", fps=16,
        )  # fmt: skip

    dense = videos(None)
    assert not dense.has_reference
    assert dense.sample(params(), 0) == {}  # nothing to compare with
    dense.dense(params())
    assert dense.has_reference
    reference = tmp_path / "validation" / "dense" / "0.npy"
    before = reference.read_bytes()
    assert np.load(reference).shape == (5, 64, 64, 3)
    assert dense.sample(params(), 1) == {"psnr": 100.0}  # the same weights, dense again: equal
    other = dense.sample(moved(), 2)["psnr"]
    assert other < 60
    approximated = videos(schedule).sample(params(), 3)["psnr"]
    assert approximated < 100
    assert reference.read_bytes() == before
    folder = tmp_path / "validation"
    assert {p.name for p in (folder / "step_00000002").iterdir()} == {"0.mp4", "0.png"}
    assert (folder / "step_00000001" / "0.png").read_bytes() == (folder / "dense" / "0.png").read_bytes()
    assert (folder / "step_00000002" / "0.png").read_bytes() != (folder / "dense" / "0.png").read_bytes()


def test_of_several_processes_one_writes_and_all_read_the_vae(tmp_path, data, monkeypatch):
    """Orbax waits for all processes when it reads: one that didn't would leave the others waiting for ever."""
    opened, read, decoded = open_data(data), [], []
    videos = Videos(
        tmp_path, WAN, lambda: read.append(1) or {}, opened.validation_prompts, opened.empty_text, (), None, 3.0,
        ValidationOptions(videos=2, steps=2), dtype="float32", fps=16,
    )  # fmt: skip
    monkeypatch.setattr(videos, "_sample", lambda *_: iter([np.zeros((1, *LATENTS))] * 2))
    monkeypatch.setattr(videos, "_decode", lambda *_: decoded.append(1))
    monkeypatch.setattr(videos, "_write", lambda *_: None)
    for lead in (False, True):
        monkeypatch.setattr(validate, "is_lead", lambda lead=lead: lead)
        videos.dense({})
        videos.sample({}, 1)
    assert (len(read), len(decoded)) == (4, 4)


def test_the_validation_loss_is_the_same_at_every_look_and_weighs_regimes_by_their_share(tmp_path):
    schedule = FPSSchedule.load(write_schedule(tmp_path))
    own, options = bucket(schedule), StepOptions(Parts(CONFIG, "float32"), FLOW)
    batches = [(own, np.arange(2), jax.tree.map(jnp.asarray, batch()))]
    first = validation_loss(params(), {}, batches, options=options)
    assert first == validation_loss(params(), {}, batches, options=options)
    shares = {regime.name: regime.probability for regime in own.regimes}
    assert set(first) == {*shares, "mean"}
    assert first["mean"] == pytest.approx(sum(share * first[name] for name, share in shares.items()), rel=1e-6)
    # The default is batches of one, whose noise levels must not all be the same
    alone = [(own, np.array([k]), jax.tree.map(lambda a, k=k: a[k : k + 1], batches[0][2])) for k in range(2)]
    for name, loss in validation_loss(params(), {}, alone, options=options).items():
        assert loss == pytest.approx(first[name], rel=1e-5), name
    swapped = [(own, np.array([1]), alone[0][2]._replace(sample=alone[1][2].sample))]
    assert validation_loss(params(), {}, swapped, options=options) != validation_loss(
        params(), {}, alone[:1], options=options
    )
    other = validation_loss(moved(), {}, batches, options=options)
    assert all(first[name] != other[name] for name in first)
