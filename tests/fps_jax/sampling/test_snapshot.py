"""Sessions that are written down: they go on with the same bits, and what is no session is refused."""

import dataclasses
import json
import threading
import types
import weakref
import zipfile

import jax
import numpy as np
import pytest

from fps_jax import CausalPipeline
from fps_jax.sampling import snapshot
from fps_jax.sampling.rollout import Rollout
from tests.fps_jax.sampling.boat import BOAT, CAUSAL, SIZE, STORM


def test_a_session_that_was_saved_goes_on_with_the_same_bits(pipe, tmp_path):
    session = pipe.session(BOAT, seed=3, **SIZE)
    for _ in range(3):
        next(session)
    session.switch(STORM, "recache")
    session.save(tmp_path / "boat.npz")
    want = [next(session) for _ in range(2)]
    again = pipe.load_session(tmp_path / "boat.npz")
    for block in want:
        got = next(again)
        assert (got.index, got.prompt) == (block.index, STORM)
        assert np.array_equal(got.latents, block.latents)
        assert np.array_equal(got.frames, block.frames)


def test_a_session_is_not_saved_beside_a_block_that_another_thread_makes(pipe, boat, tmp_path, monkeypatch):
    session, begun, going = pipe.session(BOAT, seed=3, blocks=4, **SIZE), threading.Event(), threading.Event()
    real = session.rollout.block

    def block(*args, **kwargs):
        begun.set()
        assert going.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(session.rollout, "block", block)
    maker = threading.Thread(target=lambda: next(session), daemon=True)
    maker.start()
    assert begun.wait(60)
    saver = threading.Thread(target=lambda: session.save(tmp_path / "boat.npz"), daemon=True)
    saver.start()
    saver.join(0.3)
    assert saver.is_alive()
    going.set()
    saver.join(60)
    assert np.array_equal(next(pipe.load_session(tmp_path / "boat.npz")).latents, boat[1].latents)


def test_numbers_of_numpy_are_saved_too(pipe, tmp_path):
    size = {name: np.int64(n) for name, n in SIZE.items()}
    tile = tuple(np.int32(n) for n in (2, 2, 3))
    session = pipe.session(BOAT, seed=np.int64(3), blocks=np.int64(4), tile=tile, window=[np.int8(1)] * 2, **size)
    session.save(tmp_path / "boat.npz")
    assert pipe.load_session(tmp_path / "boat.npz").arguments == session.arguments


def test_a_loaded_cache_takes_the_place_of_the_empty_one(pipe, tmp_path, monkeypatch):
    """On the device there is never room for both."""
    pipe.session(BOAT, **SIZE).save(tmp_path / "boat.npz")
    empty, upload, held, seen = Rollout._empty, snapshot.jnp.asarray, [], []

    def watched(self):
        cache = empty(self)
        held.extend(weakref.ref(x) for x in jax.tree.leaves(cache))
        return cache

    def uploads(x):
        seen.append([ref() is None for ref in held])
        return upload(x)

    monkeypatch.setattr(Rollout, "_empty", watched)
    monkeypatch.setattr(snapshot, "jnp", types.SimpleNamespace(**vars(snapshot.jnp) | {"asarray": uploads}))
    pipe.load_session(tmp_path / "boat.npz")
    assert seen == [[True, True]] * 2


def test_records_of_another_kind_are_refused(pipe, tmp_path):
    path = tmp_path / "boat.npz"
    session = pipe.session(BOAT, blocks=2, **SIZE)
    next(session)
    session.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    record = json.loads(arrays["record"].tobytes())
    for change, message in (
        ({"causal": []}, "causal is a list where"),
        ({"arguments": [1]}, "arguments is a list where"),
        ({"arguments": {"colour": 1}}, "its arguments are colour"),
        ({"arguments": record["arguments"] | {"given": "/etc/passwd"}}, "its arguments are blocks, given, height"),
        ({"index": True}, "index is a bool where"),
        ({"index": -1}, "index, made, next_frame, given and waiting are not all 0 or more"),
        ({"waiting": -1}, "index, made, next_frame, given and waiting are not all 0 or more"),
        ({"waiting": 2}, "waiting=2 is more than the given=0 latent frames"),
        ({"given": 3}, "given=3 are no whole blocks"),
        ({"given": None}, "given is a NoneType where"),
        ({"blocks": 3}, "blocks=3 of it all, where 2 were asked for"),
        ({"blocks": None}, "blocks=None of it all, where 2 were asked for"),
        ({"version": 4}, "it is no session of version 1 to 3"),
        ({"index": 3}, "index=3 is more than its 2 blocks"),
        ({"finished": {}}, "finished is a dict where"),
        ({"next_frame": 4}, "finished blocks end at latent frame 2, and the next begins at 4"),
        ({"finished": ["a"]}, "is damaged or no saved session"),
        ({"pending": ["a"]}, "pending has 1 entries where a prompt and a way belong"),
        ({"pending": "a"}, "pending is a str where"),
    ):
        text = np.frombuffer(json.dumps(record | change).encode(), np.uint8)
        np.savez(path, **{**arrays, "record": text})
        with pytest.raises(ValueError, match=message) as refused:
            pipe.load_session(path)
        assert str(path) in str(refused.value)
    np.savez(path, **{**arrays, "record": np.frombuffer(b"[" * 10**5, np.uint8)})
    with pytest.raises(ValueError, match="is damaged or no saved session"):
        pipe.load_session(path)
    np.savez_compressed(path, **arrays)
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("record.npy")
    content = bytearray(path.read_bytes())
    begin = info.header_offset + 30 + len(info.filename) + 20
    content[begin : begin + info.compress_size] = b"\xff" * info.compress_size
    path.write_bytes(content)
    with pytest.raises(ValueError, match="record is damaged"):
        pipe.load_session(path)


def test_sessions_that_are_none_are_refused(pipe, tmp_path):
    path = tmp_path / "boat.npz"
    with pytest.raises(FileNotFoundError, match=r"session='.*boat.npz' doesn't exist"):
        pipe.load_session(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is damaged or no saved session"):
        pipe.load_session(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="is damaged or no saved session"):
        pipe.load_session(path)
    pipe.session(BOAT, **SIZE).save(path)
    other = CausalPipeline(pipe.wan, dataclasses.replace(CAUSAL, window=6))
    with pytest.raises(ValueError, match="it was made with window=4, and this pipeline has 6"):
        other.load_session(path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "cache.k": np.zeros((9, 9), np.float32)})
    with pytest.raises(ValueError, match=r"cache.k is float32 .* belongs: another model or size"):
        pipe.load_session(path)
    np.savez(path, **{**arrays, "cache.v": np.zeros(10**6, np.float32)})
    with pytest.raises(ValueError, match=r"cache.v has .* bytes where .* belong"):
        pipe.load_session(path)
