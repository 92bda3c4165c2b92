"""Microbatch i is a function of (data, seed, i); every sample comes once an epoch; data that don't fit are refused."""

import collections
import dataclasses
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.config import DiTConfig, VAEConfig, WanConfig
from fps_train.batches import Batches
from fps_train.data import open_data
from tests.fps_train.sample_data import IMAGE, TEXT_DIM, TEXT_LEN, Z, noise, write_data

SIZES = {"32x48x9": 13, "48x32x9": 8, "32x32x1": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data(write_data(tmp_path_factory.mktemp("data") / "t2v", SIZES))


def same(a, b) -> bool:
    arrays = itertools.zip_longest(a, b)
    return all((x is None and y is None) or (x.shape == y.shape and x.tobytes() == y.tobytes()) for x, y in arrays)


def keys_of(data, batch, bucket):
    """Which samples these are, by their latents."""
    known = {noise(s.clip, *data.buckets[bucket].latent_shape).tobytes(): s for s in data.samples[bucket]}
    return [known[np.ascontiguousarray(row).tobytes()] for row in batch.latents]


def test_what_was_written_is_what_is_read(data):
    assert [(b.name, b.latent_shape, b.num_samples) for b in data.buckets] == [
        ("48x32x9", (Z, 3, 6, 4), 8), ("32x48x9", (Z, 3, 4, 6), 13), ("32x32x1", (Z, 1, 4, 4), 5),
    ]  # fmt: skip
    assert (data.task, data.z_dim, data.text_len, data.text_dim, data.fps) == ("t2v", Z, TEXT_LEN, TEXT_DIM, 16)
    assert data.fingerprints == {"vae": "v", "text_encoder": "t"}
    batches = Batches(data, batch_size=3, seed=0, text_dropout=0)
    for i in range(30):
        batch, bucket = batches.at(i), batches.bucket(i)
        assert batch.latents.dtype == batch.text.dtype == jnp.bfloat16
        assert batch.sample.tolist() == [3 * i, 3 * i + 1, 3 * i + 2]
        for sample, text in zip(keys_of(data, batch, bucket), batch.text, strict=True):
            record, _ = data.text_store.read(sample.text)
            tokens = len(record["text"])
            assert text[:tokens].tobytes() == record["text"].tobytes()
            assert not text[tokens:].any()
    assert data.empty_text.shape == (TEXT_LEN, TEXT_DIM)
    assert data.empty_text[:1].tobytes() == noise("empty", 1, TEXT_DIM).tobytes()
    assert not data.empty_text[1:].any()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])  # 16: more than there are of any
def test_every_sample_of_a_bucket_comes_once_an_epoch(data, batch_size):
    batches = Batches(data, batch_size=batch_size, seed=3, text_dropout=0)
    taken = collections.defaultdict(list)
    for i in range(3 * batches.num_samples):
        taken[batches.bucket(i)] += keys_of(data, batches.at(i), batches.bucket(i))
    for bucket, samples in taken.items():
        count = data.buckets[bucket].num_samples
        assert len(samples) == 3 * count * batch_size  # three rounds
        epochs = [samples[k : k + count] for k in range(0, len(samples), count)]
        assert all(set(epoch) == set(data.samples[bucket]) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) / 2  # in an order of its own


def test_a_microbatch_depends_on_data_seed_and_its_number_alone(data, tmp_path):
    batches = Batches(data, batch_size=4, seed=7)
    want = [batches.at(i) for i in range(40)]
    fresh = Batches(data, batch_size=4, seed=7)
    assert all(same(fresh.at(i), want[i]) for i in reversed(range(40)))
    assert not all(same(Batches(data, batch_size=4, seed=8).at(i), want[i]) for i in range(5))
    # other shards, other workers, another order of writing: the same data
    folder = write_data(tmp_path / "other", SIZES, shard_bytes=400, workers=3, reverse=True)
    other = open_data(folder)
    assert other.fingerprint == data.fingerprint
    moved = Batches(other, batch_size=4, seed=7)
    # texts of sample_data get their length by the order of writing
    assert all(same(moved.at(i).latents, want[i].latents) for i in range(40))
    fewer = open_data(write_data(tmp_path / "fewer", {**SIZES, "32x32x1": 4}))
    assert fewer.fingerprint != data.fingerprint


def rows_of(process, processes):
    """Equal parts, one after the other; all of what can't be shared out."""
    return lambda n: range(n) if n % processes else range(process * n // processes, (process + 1) * n // processes)


def test_processes_share_the_rows_of_the_same_microbatch(data):
    whole = Batches(data, batch_size=4, seed=7)
    for processes in (2, 4):
        parts = [Batches(data, batch_size=4, seed=7, rows=rows_of(p, processes)) for p in range(processes)]
        for i in range(12):
            joined = [None if a[0] is None else np.concatenate(a) for a in zip(*(p.at(i) for p in parts), strict=True)]
            assert same(joined, whole.at(i))


@pytest.mark.parametrize("start", [0, 17])
def test_reading_ahead_gives_the_same(data, start):
    batches = Batches(data, batch_size=2, seed=1, validation_samples=3)
    for i, (number, batch) in enumerate(itertools.islice(batches.iterate(start), 15), start):
        assert number == i
        assert same(batch, batches.at(i))


def test_an_error_while_reading_ahead_comes_out(data, monkeypatch):
    batches = Batches(data, batch_size=2, seed=1)
    monkeypatch.setattr(batches, "at", lambda i: 1 / (i - 3))
    running = batches.iterate(0)
    assert [next(running)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(running)


def test_text_dropout_is_decided_by_seed_and_sample(data):
    def dropped(microbatches=60, **changes) -> np.ndarray:
        batches = Batches(data, **{"batch_size": 5, "seed": 2, "text_dropout": 0.1, **changes})
        empty = data.empty_text.tobytes()
        found = {}
        for i in range(microbatches):
            batch = batches.at(i)
            found |= {
                int(n): text.tobytes() == empty for n, text in zip(batch.sample, batch.text, strict=True)
            }  # fmt: skip
        return np.array([found[n] for n in sorted(found)])

    share = dropped(600)
    # 3000 draws of 0.1: a standard deviation of 0.0055
    assert abs(share.mean() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / share.size)
    np.testing.assert_array_equal(dropped(batch_size=6), share[:360])  # of n, not of rows
    assert (dropped(seed=3) != share[:300]).any()
    assert not dropped(text_dropout=0).any()
    assert dropped(text_dropout=1).all()


@pytest.mark.parametrize("sizes", [{"32x48x9": 62, "32x32x1": 38}, {"32x48x9": 38, "48x32x9": 24, "32x32x1": 38}])
def test_buckets_come_in_proportion_and_out_of_step_with_a_golden_ratio_of_regimes(tmp_path, sizes):
    """A low-discrepancy mix of 62 to 38 would give one regime one bucket for ever: both go by frac(n * 0.618)."""
    data = open_data(write_data(tmp_path / "data", sizes, shard_bytes=1 << 20))
    batches = Batches(data, batch_size=1, seed=0)
    rounds, total = 40, batches.num_samples
    buckets = np.array([batches.bucket(i) for i in range(rounds * total)]).reshape(rounds, total)
    for b, bucket in enumerate(data.buckets):
        assert ((buckets == b).sum(1) == bucket.num_samples).all()
    n = np.arange(rounds * total)
    regimes = (np.mod(0.3 + n * 0.6180339887498949, 1) < 0.5).astype(int)
    for b, bucket in enumerate(data.buckets):
        p = bucket.num_samples / total
        joint = ((buckets.ravel() == b) & (regimes == 1)).mean()
        assert abs(joint - p * regimes.mean()) < 4 * math.sqrt(p * (1 - p) / 4 / n.size)  # 4 standard deviations


def test_held_out_clips_are_never_trained_on_and_never_change(tmp_path, data):
    batches = Batches(data, batch_size=2, seed=5, validation_samples=6)
    held = [batch for _, batch in batches.validation(2)]
    assert sum(len(b.latents) for b in held) == 6
    want = sorted((s for samples in data.samples for s in samples), key=lambda s: s.content)[:6]
    by_shape = {bucket.latent_shape: b for b, bucket in enumerate(data.buckets)}
    found = [s for batch in held for s in keys_of(data, batch, by_shape[batch.latents.shape[1:]])]
    assert sorted(found) == sorted(want)
    assert [n for batch in held for n in batch.sample.tolist()] == list(range(6))
    assert batches.num_samples == 26 - 6
    trained = {s for i in range(60) for s in keys_of(data, batches.at(i), batches.bucket(i))}
    assert trained == {s for samples in data.samples for s in samples} - set(want)
    for seed, size in ((6, 2), (5, 4)):
        other = Batches(data, batch_size=size, seed=seed, validation_samples=6)
        assert all(same(a, b) for a, (_, b) in zip(held, other.validation(2), strict=True))
    # texts are theirs, however much is dropped in training
    all_dropped = Batches(data, batch_size=2, seed=5, validation_samples=6, text_dropout=1)
    assert all(same(a, b) for a, (_, b) in zip(held, all_dropped.validation(2), strict=True))


def test_the_last_validation_microbatch_of_a_bucket_is_smaller(data):
    held = {s for s in sorted((s for b in data.samples for s in b), key=lambda s: s.content)[:10]}
    counts = [sum(s in held for s in samples) for samples in data.samples]
    whole = Batches(data, batch_size=4, seed=0, validation_samples=10).validation(4)
    sizes = [len(b.latents) for _, b in whole]
    assert sizes == [min(4, n - k) for n in counts for k in range(0, n, 4)]
    parts = [
        Batches(data, batch_size=4, seed=0, validation_samples=10, rows=rows_of(p, 4)).validation(4) for p in range(4)
    ]
    for (numbers, batch), *pieces in zip(whole, *parts, strict=True):
        assert list(batch.sample) == list(numbers)
        for _, piece in pieces:  # a small last microbatch is everybody's
            assert len(piece.latents) == (1 if len(numbers) == 4 else len(numbers))
        got = [n for _, piece in pieces for n in piece.sample]
        assert sorted(set(got)) == list(numbers)


def test_another_caption_of_a_held_out_clip_is_not_trained_on(tmp_path, data):
    first = min((s for samples in data.samples for s in samples), key=lambda s: s.content)
    bucket = next(b for b, samples in enumerate(data.samples) if first in samples)
    again = first._replace(text=data.samples[bucket][-1].text, caption="another")
    samples = [[*s, again] if b == bucket else list(s) for b, s in enumerate(data.samples)]
    more = dataclasses.replace(data, samples=tuple(map(tuple, samples)))
    assert Batches(more, batch_size=1, seed=0, validation_samples=1).num_samples == 25  # of 27


def test_image_tasks_have_mask_condition_and_tokens(tmp_path):
    for task in ("i2v", "flf2v"):
        data = open_data(write_data(tmp_path / task, {"32x48x9": 3}, task=task, prompts=True))
        assert data.fingerprints["image_encoder"] == "i"
        batch = Batches(data, batch_size=2, seed=0).at(0)
        (first, _) = keys_of(data, batch, 0)
        assert batch.condition.shape == (2, 4 + Z, 3, 4, 6)
        assert batch.condition.dtype == batch.image.dtype == jnp.bfloat16
        mask = batch.condition[0, :4].astype(np.float32)
        want = np.zeros((4, 3))
        want[:, 0] = 1
        want[3, -1] = task == "flf2v"
        assert (mask == want[:, :, None, None]).all()
        assert batch.condition[0, 4:].tobytes() == noise(first.clip + "c", Z, 3, 4, 6).tobytes()
        assert batch.image[0].tobytes() == noise(first.clip + "i", *IMAGE).tobytes()
        prompt = data.validation_prompts[1]
        assert (prompt.prompt, prompt.latent_shape) == ("prompt 1", (Z, 3, 4, 6))
        assert prompt.image.tobytes() == noise("clip-p1i", *IMAGE).tobytes()
        assert prompt.condition[4:].tobytes() == noise("clip-p1c", Z, 3, 4, 6).tobytes()


def test_without_prompts_of_ones_own_captions_of_what_is_held_out_first_serve(data):
    want = sorted((s for samples in data.samples for s in samples), key=lambda s: s.content)[:2]
    assert [p.prompt for p in data.validation_prompts] == [s.caption for s in want]
    shapes = {bucket.name: bucket.latent_shape for bucket in data.buckets}
    assert [p.latent_shape for p in data.validation_prompts] == [shapes[s.size] for s in want]


def config(task="t2v", z=Z, **changes) -> WanConfig:
    image = {} if task == "t2v" else {"image_dim": 3, "image_positions": 5 if task == "flf2v" else None}
    dit = DiTConfig(
        task=task,
        dim=12,
        mlp_dim=8,
        num_heads=2,
        num_layers=1,
        in_channels=z if task == "t2v" else 4 + 2 * z,
        out_channels=z,
        text_dim=TEXT_DIM,
        text_len=TEXT_LEN,
        **image,
    )
    vae = VAEConfig(z_dim=z, latents_mean=(0.0,) * z, latents_std=(1.0,) * z)
    return WanConfig(dit=dataclasses.replace(dit, **changes), vae=vae)


def test_a_model_that_the_data_are_not_for(tmp_path, data):
    data.check(config())
    flf2v = open_data(write_data(tmp_path / "flf2v", {"32x48x9": 3}, task="flf2v"))
    flf2v.check(config("flf2v"))
    for one, model, message in [
        (flf2v, config(), "are for flf2v, the model is t2v; run fps-precompute with this model"),
        (data, config("i2v"), "are for t2v, the model is i2v"),
        (data, config(z=16), "have latent channels 4, the model takes 16"),
        (data, config(text_dim=4096), "have text states of width 8, the model takes 4096"),
        (data, config(text_len=512), "have text states of length 6, the model takes 512"),
        (flf2v, config("flf2v", image_dim=1280), "have image tokens of width 3, the model takes 1280"),
        (flf2v, config("flf2v", image_positions=514), "have image tokens numbering 5, the model takes 514"),
    ]:
        with pytest.raises(ValueError, match=message):
            one.check(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is not a positive number of samples"),
        ({"seed": -1}, "seed=-1 is not in 0 to 2"),
        ({"text_dropout": 1.5}, "text_dropout=1.5 is not a share in 0 to 1"),
        ({"validation_samples": 26}, "validation.samples=26 leaves none of 26 samples to train on"),
        ({"validation_samples": 25}, "validation_samples=25 leaves no sample of bucket .* to train on"),
    ],
)
def test_batches_that_cannot_be(data, changes, message):
    with pytest.raises(ValueError, match=message):
        Batches(data, **{"batch_size": 2, "seed": 0, **changes})
    with pytest.raises(ValueError, match="microbatch -1 is before the first"):
        Batches(data, batch_size=2, seed=0).at(-1)


def break_manifest(**changes):
    def change(folder):
        record = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps(record))

    return change


def remove(*names):
    def change(folder):
        for name in names:
            for path in folder.glob(name):
                path.unlink()

    return change


def empty_lists(folder):
    for path in (folder / "samples").iterdir():
        path.write_text(path.read_text().splitlines()[0] + "\n")


def without_a_bucket(folder):
    for path in (folder / "samples").iterdir():
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "32x32x1-" not in line))


def another_shape(folder):
    for path in (folder / "samples").iterdir():
        path.write_text(path.read_text().replace('"32x32x1"', '"48x32x9"'))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (remove("manifest.json"), FileNotFoundError, "holds no training data: make it with fps-precompute"),
        (break_manifest(format="other"), ValueError, "is damaged: manifest.json: it isn't 'fps_jax_data'"),
        (break_manifest(version=2), ValueError, "it has version 2, this release reads 1"),
        (break_manifest(contents={"task": "t2v"}), ValueError, "is damaged: manifest.json: .*missing"),
        (break_manifest(samples=["none.jsonl"]), ValueError, "is damaged: manifest.json: .*none.jsonl"),
        (
            break_manifest(empty_text="none"),
            ValueError,
            "lack the empty prompt's text states, which text dropout needs",
        ),
        (remove("latents/*"), ValueError, "lack the latents of '.*.mp4'; run fps-precompute again"),
        (remove("text/*"), ValueError, "lack the empty prompt's text states"),
        (empty_lists, ValueError, "hold no sample; run fps-precompute with clips"),
        (without_a_bucket, ValueError, "have no sample in bucket 32x32x1"),
        (another_shape, ValueError, r"'32x32x1-\d.mp4' has .*its bucket"),
    ],
)
def test_damaged_data_are_refused_in_one_line(tmp_path, change, kind, message):
    folder = write_data(tmp_path / "data", SIZES)
    change(folder)
    with pytest.raises(kind, match=message) as error:
        open_data(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="doesn't exist; make it with fps-precompute"):
        open_data(tmp_path / "none")
