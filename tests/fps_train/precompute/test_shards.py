"""Records come back as they were, shards are whole or not there, and damage is named."""

from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python import array_record_module

from fps_train.precompute.shards import ShardWriter, Store


def tensor(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal((4, 100)).astype(jnp.bfloat16)


def fill(folder, keys, shard_bytes=2500):
    with ShardWriter(folder, shard_bytes=shard_bytes, owner="0-of-1") as writer:
        for i in keys:
            writer.add(f"key{i}", {"latents": tensor(i), "image": tensor(-i % 7)}, {"source": f"{i}.mp4"})


def test_records_come_back_bit_for_bit_from_any_thread(tmp_path):
    fill(tmp_path / "new", range(10))
    store = Store(tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 5  # two records of 1.6 kB each
    assert sorted(store.places) == [f"key{i}" for i in range(10)]
    assert store.places["key3"].shapes == {"latents": (4, 100), "image": (4, 100)}

    def same(i: int) -> bool:
        tensors, notes = store.read(f"key{i}")
        assert tensors["latents"].dtype == jnp.bfloat16
        assert notes == {"source": f"{i}.mp4", "key": f"key{i}"}
        return tensors["latents"].tobytes() == tensor(i).tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, [*range(10)] * 20))
    with pytest.raises(KeyError):
        store.read("key10")


def test_the_same_records_are_the_same_shard(tmp_path):
    for _ in range(2):
        fill(tmp_path, range(4))
    assert len(list(tmp_path.iterdir())) == 2
    assert not Store(tmp_path / "none").places


def test_an_error_keeps_what_is_whole_and_a_kill_leaves_only_a_partial_file(tmp_path):
    def fail():
        with ShardWriter(tmp_path, shard_bytes=1 << 20, owner="0-of-1") as writer:
            writer.add("one", {"text": tensor(1)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(Store(tmp_path).places) == ["one"]
    killed = ShardWriter(tmp_path, shard_bytes=1 << 20, owner="0-of-1")
    killed.add("two", {"text": tensor(2)})
    del killed
    assert list(Store(tmp_path).places) == ["one"]
    (tmp_path / ".1-of-2.abcd.partial").touch()  # another worker's, at work
    assert len(list(tmp_path.iterdir())) == 3
    ShardWriter(tmp_path, shard_bytes=1 << 20, owner="0-of-1")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == [".1-of-2.abcd.partial"]


def test_a_full_disk_is_one_line_and_whole_shards_stay(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    real = array_record_module.ArrayRecordWriter
    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", lambda path, options: real("/dev/full", options))
    with pytest.raises(OSError, match=r"can't write a shard in .*No space left on device.*; make room, then run again"):
        fill(tmp_path, [2])
    assert list(Store(tmp_path).places) == ["key1"]
    assert len(list(tmp_path.iterdir())) == 1


def shard(folder):
    (path,) = folder.glob("*.array_record")
    return path, bytearray(path.read_bytes())


def test_a_flipped_bit_is_found_when_its_record_is_read(tmp_path):
    fill(tmp_path, range(3), shard_bytes=1 << 20)
    path, content = shard(tmp_path)
    content[bytes(content).index(tensor(1).tobytes()[:64]) + 100] ^= 1
    path.write_bytes(content)
    store = Store(tmp_path)
    store.read("key0")
    with pytest.raises(ValueError, match=r"shard '.*' is damaged: .*; delete it and run fps-precompute again") as error:
        store.read("key1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_shard_that_is_cut_short_is_none(tmp_path, share):
    fill(tmp_path, range(3), shard_bytes=1 << 20)
    path, content = shard(tmp_path)
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="is damaged"):
        Store(tmp_path)


def test_somebody_elses_array_record_is_none(tmp_path):
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(b'{"other": 1}')
    writer.close()
    with pytest.raises(ValueError, match="its last record is no index"):
        Store(tmp_path)
