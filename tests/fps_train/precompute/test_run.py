"""A run makes what is missing and no more, whoever stopped it and however many share it. The encoders are stand-ins here."""

import dataclasses
import fcntl
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fps_jax.checkpoints import open as checkpoints
from fps_train.data import open_data
from fps_train.precompute import encode, run
from fps_train.precompute.buckets import Size
from fps_train.precompute.run import Recipe, precompute
from tests.checkpoints import small_checkpoint
from tests.fps_train.clip_files import folder_of_clips

LENGTHS = {"a": 9, "b": 9, "c": 13, "d": 9, "e": 20, "f": 3}


class Counted:
    """Stand-ins for the encoders: cheap functions of what they are given, which count their calls and can be made to fail."""

    def __init__(self):
        self.videos = self.texts = 0
        self.fail_at = None

    def encode(self, config, params, video, *, tiling):
        if self.videos == self.fail_at:
            raise KeyboardInterrupt
        self.videos += 1
        assert video.dtype == np.float32
        assert -1 <= video.min() <= video.max() <= 1
        small = video[:, ::4, ::8, ::8].mean(-1)[:, None]
        return np.repeat(small, config.z_dim, axis=1)

    def text_states(self, config, params, ids, mask, *, dtype):
        self.texts += len({tuple(row) for row in ids})
        return jnp.asarray(np.repeat((ids * mask)[..., None], config.dit.text_dim, -1), dtype)


@pytest.fixture
def encoders(monkeypatch):
    counted = Counted()
    monkeypatch.setattr(encode, "encode", counted.encode)
    monkeypatch.setattr(encode, "text_states", counted.text_states)
    return counted


@pytest.fixture
def clips(tmp_path):
    return folder_of_clips(tmp_path / "clips", LENGTHS)


def make(tmp_path, clips, name="data", tell=None, **changes) -> list[str]:
    said = []
    fields = {
        "model": str(small_checkpoint()), "videos": clips, "captions": None, "output": tmp_path / name,
        "sizes": (Size(32, 48, 13),), "exact": False, **changes,
    }  # fmt: skip
    precompute(Recipe(**fields), tell or said.append)
    return said


def test_a_run_makes_data_and_a_second_one_nothing(tmp_path, clips, encoders, monkeypatch):
    said = make(tmp_path, clips)
    assert "kept 5 of 6" in said[0]
    assert "shorter than 5 frames at 16 fps: f.mp4 (3)" in said[0]
    assert (encoders.videos, encoders.texts) == (5, 6)  # five captions and the empty one
    data = open_data(tmp_path / "data")
    assert [(b.name, b.num_samples) for b in data.buckets] == [("32x48x13", 2), ("32x48x9", 3)]
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    monkeypatch.setattr(checkpoints, "place", lambda *a: pytest.fail("weights were read"))
    monkeypatch.setattr("fps_train.precompute.scan.probe", lambda *a, **k: pytest.fail("a clip was decoded"))
    make(tmp_path, clips)
    assert (encoders.videos, encoders.texts) == (5, 6)
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before


def test_the_table_comes_before_anything_is_encoded_and_has_the_images(tmp_path, clips, encoders):
    for name, level in (("p.png", 40), ("q.jpg", 90)):
        Image.fromarray(np.full((32, 48, 3), level, np.uint8)).save(clips / name)
        (clips / name).with_suffix(".txt").write_text(f"A picture called {name}.")
    (clips / "d.txt").unlink()
    begun = []

    def tell(line):
        begun.append((line, encoders.videos, encoders.texts, len(list((tmp_path / "data").rglob("*.array_record")))))

    make(tmp_path, clips, tell=tell)
    (table, *before), *_ = begun
    assert before == [0, 0, 0]
    rows = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"^(\d+x\d+x\d+) +(\d+) +(\d+) ", table, re.M)}
    assert rows == {"32x48x13": (2, 1), "32x48x9": (2, 0), "32x48x1": (2, 0)}  # kept, cut
    assert "kept 6 of 8; 16 frames a second" in table
    dropped = dict(re.findall(r"^ +1  (.*): (.*)$", table, re.M))
    assert dropped == {"no caption": "d.mp4", "shorter than 5 frames at 16 fps": "f.mp4 (3)"}
    data = open_data(tmp_path / "data")
    ((name, samples),) = [
        (b.name, s) for b, s in zip(data.buckets, data.samples, strict=True) if b.latent_shape[1] == 1
    ]
    assert name == "32x48x1"
    assert {s.source for s in samples} == {"p.png", "q.jpg"}


def test_latents_are_of_the_frames_and_texts_of_the_caption(tmp_path, clips, encoders):
    make(tmp_path, clips)
    data = open_data(tmp_path / "data")
    sample = next(s for samples in data.samples for s in samples if s.source == "e.mp4")
    assert sample.caption == "A clip called e."
    tensors, text = data.read(sample)
    # frame i of the clips is grey of 10 + 6 i; a chunk of 4 starts with frame 1, 5, ... of the stand-in's every fourth: 0, 4, 8, 12
    want = (10 + 6 * np.array([0, 4, 8, 12])) / 127.5 - 1
    # Bf16, H.264's rounding
    np.testing.assert_allclose(tensors["latents"][0, :, 2, 2].astype(np.float32), want, atol=0.02)
    assert text[:, 0].any()
    assert not data.empty_text[1:].any()  # the end token alone
    assert data.empty_text[0].any()


def test_a_run_that_was_stopped_goes_on(tmp_path, clips, encoders):
    encoders.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, clips)
    with pytest.raises(FileNotFoundError, match="is not finished: run fps-precompute again"):
        open_data(tmp_path / "data")
    encoders.fail_at = None
    make(tmp_path, clips)
    assert encoders.videos == 5  # two before, three after
    make(tmp_path, clips, "at_once")
    assert open_data(tmp_path / "data").fingerprint == open_data(tmp_path / "at_once").fingerprint


def test_changed_captions_are_encoded_alone(tmp_path, clips, encoders):
    make(tmp_path, clips)
    before = open_data(tmp_path / "data")
    (clips / "b.txt").write_text("Quite another thing.")
    (clips / "c.txt").unlink()
    make(tmp_path, clips)
    after = open_data(tmp_path / "data")
    assert (encoders.videos, encoders.texts) == (5, 7)
    assert after.fingerprint != before.fingerprint
    captions = {s.source: s.caption for samples in after.samples for s in samples}
    assert captions == {n: f"A clip called {n[0]}." for n in ("a.mp4", "d.mp4", "e.mp4")} | {
        "b.mp4": "Quite another thing."
    }
    # spaces and HTML entities are cleaned before the encoder sees them
    (clips / "b.txt").write_text("Quite  another\nthing.")
    make(tmp_path, clips)
    assert (encoders.videos, encoders.texts) == (5, 7)


def test_workers_make_the_same_data_together(tmp_path, clips, encoders):
    for suffix in (".mp4", ".txt"):  # the same clip under names of two workers' shares
        for copy in "xyz":
            (clips / f"{copy}{suffix}").write_bytes((clips / f"a{suffix}").read_bytes())
    make(tmp_path, clips, "alone")
    encoders.videos = 0
    said = make(tmp_path, clips, "shared", worker=(1, 3))
    assert "not finished before the other workers are: 0/3, 2/3" in said[-1]
    with pytest.raises(FileNotFoundError, match="is not finished"):
        open_data(tmp_path / "shared")
    make(tmp_path, clips, "shared", worker=(0, 3))
    assert "wrote" in make(tmp_path, clips, "shared", worker=(2, 3))[-1]
    assert encoders.videos >= 5
    alone, shared = open_data(tmp_path / "alone"), open_data(tmp_path / "shared")
    assert shared.fingerprint == alone.fingerprint
    assert shared.samples == alone.samples


def test_two_processes_cannot_be_the_same_worker(tmp_path, clips, encoders):
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / ".worker-0-of-1.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (tmp_path / "data" / "scan").mkdir()
        with pytest.raises(ValueError, match=r"another process is worker 0/1 on .*; wait for it"):
            make(tmp_path, clips)
    make(tmp_path, clips)


def test_a_clip_twice_is_a_sample_once(tmp_path, clips, encoders):
    for suffix in (".mp4", ".txt"):
        (clips / f"z{suffix}").write_bytes((clips / f"a{suffix}").read_bytes())
    assert "the same clip and caption twice: z.mp4 (as a.mp4)" in make(tmp_path, clips)[0]
    (clips / "z.txt").write_text("Another caption.")
    make(tmp_path, clips)
    assert encoders.videos == 5
    assert sum(b.num_samples for b in open_data(tmp_path / "data").buckets) == 6


def test_a_clip_that_changes_under_way_is_dropped_and_said(tmp_path, clips, encoders, monkeypatch):
    read = run.read_frames

    def fail(path, **rest):
        if path.name == "d.mp4":
            raise run.ClipError("damaged", "at frame 3")
        return read(path, **rest)

    monkeypatch.setattr(run, "read_frames", fail)
    said = make(tmp_path, clips)
    assert "dropped while encoding: d.mp4: damaged (at frame 3)" in said
    assert "wrote 4 samples" in said[-1]
    assert "d.mp4" not in {s.source for samples in open_data(tmp_path / "data").samples for s in samples}


def test_nan_from_the_vae_names_the_clip_and_keeps_the_rest(tmp_path, clips, encoders, monkeypatch):
    monkeypatch.setattr(
        encode, "encode", lambda *a, **k: encoders.encode(*a, **k) + (np.nan if encoders.videos == 3 else 0)
    )
    with pytest.raises(
        FloatingPointError, match=r"\w.mp4: the VAE gives NaN or inf for it; check the checkpoint's VAE"
    ):
        make(tmp_path, clips)
    monkeypatch.setattr(encode, "encode", encoders.encode)
    make(tmp_path, clips)
    assert encoders.videos == 6  # three of them before, one of those in vain


def test_data_of_another_size_are_not_replaced_by_mistake(tmp_path, clips, encoders):
    make(tmp_path, clips)
    with pytest.raises(
        ValueError, match=r"holds data with sizes \('32x48x13',\), not \('32x48x9',\); name another or --replace"
    ):
        make(tmp_path, clips, sizes=(Size(32, 48, 9),))
    assert open_data(tmp_path / "data").buckets[0].name == "32x48x13"
    make(tmp_path, clips, sizes=(Size(32, 48, 9),), replace=True)
    assert [b.name for b in open_data(tmp_path / "data").buckets] == ["32x48x9"]
    assert encoders.videos == 7  # three of 9 frames were there, c and e were longer


def test_fixed_buckets(tmp_path, clips, encoders):
    make(tmp_path, clips, sizes=(Size(32, 48, 13), Size(32, 48, 5)), exact=True)
    assert [(b.name, b.num_samples) for b in open_data(tmp_path / "data").buckets] == [("32x48x13", 2), ("32x48x5", 3)]
    with pytest.raises(ValueError, match="bucket 32x48x29 gets no clip; leave it out of --buckets"):
        make(tmp_path, clips, "other", sizes=(Size(32, 48, 13), Size(32, 48, 29)), exact=True)
    assert not list((tmp_path / "other").rglob("*.array_record"))


def test_a_dry_run_writes_nothing(tmp_path, clips, encoders):
    assert "kept 5 of 6" in make(tmp_path, clips, dry_run=True)[0]
    assert not (tmp_path / "data").exists()
    assert not encoders.videos


def test_prompts_are_encoded_too(tmp_path, clips, encoders):
    (tmp_path / "prompts.txt").write_text("A cat.\n\nA dog.\n")
    make(tmp_path, clips, validation_prompts=tmp_path / "prompts.txt")
    prompts = open_data(tmp_path / "data").validation_prompts
    assert [(p.prompt, p.latent_shape) for p in prompts] == [("A cat.", (16, 4, 4, 6)), ("A dog.", (16, 4, 4, 6))]
    assert encoders.texts == 8


def test_long_captions_are_cut_with_their_end_token_and_counted(tmp_path, clips, encoders):
    from fps_jax.models.tokenizer import Tokenizer

    (clips / "a.txt").write_text("cat " * 600)
    assert "captions longer than 512 tokens, cut there: 1" in make(tmp_path, clips)[0]
    tokenizer = Tokenizer.from_directory(small_checkpoint() / "tokenizer")
    texts = ["cat " * 600, "cat", ""]
    ids, cut = encode.token_ids(tokenizer, texts, 512)
    want, mask = tokenizer(texts, max_length=512)
    assert cut == 1
    assert ids == [row[: m.sum()].tolist() for row, m in zip(want, mask, strict=True)]


def test_flf2v_clips_come_with_their_first_and_last_frame(tmp_path, clips, encoders, monkeypatch):
    from fps_convert.synthetic import tiny_config, write_checkpoint

    seen = []
    monkeypatch.setattr(encode, "encode", lambda *a, **k: seen.append(a[2][0]) or encoders.encode(*a, **k))

    def image_tokens(config, params, frames, batch):
        return np.repeat([f.mean() for f in frames], 5)[None, :, None] * np.ones((1, 1, 80), np.float32)

    monkeypatch.setattr(encode, "image_tokens", image_tokens)
    config = tiny_config("flf2v")
    write_checkpoint(tmp_path / "model", config, layout="diffusers", tokenizer_dir=small_checkpoint() / "tokenizer")
    (clips / "f.mp4").unlink()
    make(tmp_path, clips, model=str(tmp_path / "model"))
    assert len(seen) == 10  # of each clip the video, then what it is given
    for video, given in zip(seen[::2], seen[1::2], strict=True):
        np.testing.assert_allclose(given[[0, -1]], video[[0, -1]], atol=1e-6)
        assert not given[1:-1].any()
    data = open_data(tmp_path / "data")
    data.check(config)
    tensors, _ = data.read(data.samples[0][0])
    image = tensors["image"].astype(np.float32)
    assert image.shape == (10, 80)
    assert (image[:5] == image[0, 0]).all()  # the stand-in's: a frame's brightness
    assert image[5, 0] > image[0, 0]  # the last frame is brighter
    assert tensors["condition"].shape == (20, *data.buckets[0].latent_shape[1:])


def test_keys_change_with_whatever_changes_a_number():
    from fps_jax.config import WAN_I2V_14B, WAN_T2V_14B

    base = {"fps": 16, "config": WAN_T2V_14B, "vae": "v", "tower": None, "tiling": False}
    size = Size(480, 832, 81)
    key = encode.clip_key(["c"], size, **base)
    assert key == encode.clip_key(["c"], size, **base)
    others = [
        encode.clip_key(["d"], size, **base), encode.clip_key(["c"], Size(480, 832, 77), **base),
        *(encode.clip_key(["c"], size, **{**base, **c}) for c in (
            {"fps": 24}, {"vae": "w"}, {"tiling": True}, {"config": WAN_I2V_14B, "tower": "t"},
            {"config": WAN_I2V_14B, "tower": "u"},
        )),
    ]  # fmt: skip
    assert len({key, *others}) == 8
    texts = {encode.text_key(i, encoder=e, dtype=d) for i in ([1], [2]) for e in "ab" for d in ("bfloat16", "float32")}
    assert len(texts) == 8


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: (f / "data").write_text(""), "is a file; name a folder"),
        (
            lambda f: [(f / "data").mkdir(), (f / "data" / "mine").touch()],
            "holds other files ('mine'); name a new folder",
        ),
    ],
)
def test_outputs_that_are_somebody_elses(tmp_path, clips, encoders, prepare, message):
    prepare(tmp_path)
    with pytest.raises(OSError, match=re.escape(message)):
        make(tmp_path, clips)


@pytest.mark.parametrize("damaged", [False, True])
def test_each_encoder_is_resident_in_its_own_phase_alone(tmp_path, clips, encoders, monkeypatch, damaged):
    """Counted in living arrays; also where a clip fails on the way, whose error might hold on to whoever was encoding it."""
    leaves: dict[str, list[weakref.ref]] = {}
    seen: dict[str, set[tuple[str, ...]]] = {"encode": set(), "text_states": set()}
    model = checkpoints.open_model(small_checkpoint())

    def resident() -> tuple[str, ...]:
        gc.collect()
        return tuple(sorted(name for name, refs in leaves.items() if any(ref() is not None for ref in refs)))

    def noted(name, dtype, shardings=None):
        params = model.load(name, dtype, shardings)
        leaves.setdefault(name, []).extend(weakref.ref(leaf) for leaf in jax.tree.leaves(params))
        return params

    monkeypatch.setattr(run, "open_model", lambda _: dataclasses.replace(model, load=noted))
    for phase in seen:
        inner = getattr(encode, phase)
        monkeypatch.setattr(
            encode, phase, lambda *a, phase=phase, inner=inner, **k: seen[phase].add(resident()) or inner(*a, **k)
        )
    if damaged:
        given = encode.LatentsMaker.clip

        def clip(self, pixels):
            if len(pixels) == 13:
                raise run.ClipError("damaged")
            return given(self, pixels)

        monkeypatch.setattr(encode.LatentsMaker, "clip", clip)
    said = make(tmp_path, clips)
    assert ("dropped while encoding" in said[1]) == damaged
    assert seen == {"encode": {("vae",)}, "text_states": {("text_encoder",)}}
    assert resident() == ()
