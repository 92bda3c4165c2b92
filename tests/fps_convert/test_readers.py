"""Safetensors in: what a header says is held against the file's bytes, shards against their index, names against each other."""

import json
import pathlib
import re
import struct

import ml_dtypes
import numpy as np
import pytest

from fps_convert.formats import readers
from fps_convert.formats.readers import (
    Renamed,
    SafetensorsFile,
    ShardedSafetensors,
    map_file,
    open_safetensors,
    open_weights,
)


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write(path: pathlib.Path, header, data: bytes = b"") -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def ones(path: pathlib.Path, *keys: str, **header) -> pathlib.Path:
    """A file with a tensor of two float32 ones under each key."""
    entries = {key: entry("F32", [2], 8 * i, 8 * i + 8) for i, key in enumerate(keys)}
    return write(path, {**entries, **header}, np.ones(2 * len(keys), np.float32).tobytes())


VALUES = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "I64": np.int64, "I32": np.int32,
    "U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip


@pytest.mark.parametrize("dtype", VALUES)
def test_each_dtype_is_a_view_of_the_file(tmp_path, dtype):
    want = np.arange(6).reshape(2, 3).astype(VALUES[dtype])
    header = {"first": entry("U8", [3], 0, 3), "x": entry(dtype, [2, 3], 3, 3 + want.nbytes)}
    reader = SafetensorsFile(write(tmp_path / "a.safetensors", header, b"abc" + want.tobytes()))
    got = reader.read("x")
    assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())
    assert not got.flags.writeable
    assert reader.read("first").tobytes() == b"abc"


@pytest.mark.parametrize("dtype", readers._BITS)
def test_a_tensor_takes_the_bits_that_its_dtypes_name_says(tmp_path, dtype):
    bits = 8 if dtype == "BOOL" else int(re.findall(r"\d+", dtype)[0])
    path = tmp_path / "a.safetensors"
    for count in (3, 8):
        size = -(-count * bits // 8)  # whole bytes
        assert list(SafetensorsFile(write(path, {"x": entry(dtype, [count], 0, size)}, bytes(size))).tensors) == ["x"]
        for wrong in (size - 1, size + 1):
            with pytest.raises(ValueError, match=f"tensor 'x' of shape .* and dtype {dtype} can't have {wrong} bytes"):
                SafetensorsFile(write(path, {"x": entry(dtype, [count], 0, wrong)}, bytes(wrong)))


def test_one_number_may_be_whole_or_double(tmp_path):
    for dtype in ("F32", "BF16", "F64", "I64", "I32"):
        value = np.array([3], VALUES[dtype])
        header = {"pad": entry("U8", [8], 0, 8), "x": entry(dtype, [], 8, 8 + value.nbytes)}
        reader = SafetensorsFile(write(tmp_path / "a.safetensors", header, bytes(8) + value.tobytes()))
        assert reader.number("x") == 3
    with pytest.raises(NotImplementedError, match="tensor 'pad' has dtype U8; weights are F32, F16 or BF16"):
        reader.number("pad")


def test_the_smallest_files(tmp_path):
    path = tmp_path / "a.safetensors"
    assert SafetensorsFile(write(path, {})).tensors == {}
    assert SafetensorsFile(write(path, {"__metadata__": None})).metadata == {}
    assert SafetensorsFile(write(path, {"__metadata__": {"a": "b"}})).metadata == {"a": "b"}
    for data, message in (
        (b"\0" * 7, "the header should be 0 bytes long, the file has 7"),
        (b"\0" * 8, "its header is not JSON"),
        (struct.pack("<Q", 3) + b"{}", "the header should be 3 bytes long, the file has 10"),
        (b"", "is empty; copy or download it again"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": entry("F32", [1], 4, 8)}, "'x' starts at byte 73, where 69 is expected"),
        ({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 0, 4)}, "starts at byte"),
        ({"x": entry("F32", [1], 0, 4)}, "longer than its header says: the header describes 73 bytes, the file has 77"),
        ({"x": entry("F32", [3], 0, 12)}, "truncated: the header describes 82 bytes, the file has 78"),
        ({"x": entry("F32", [2.0], 0, 8)}, "lacks a sound dtype, shape or data_offsets"),
        ({"x": entry("F32", [True, 2], 0, 8)}, "lacks a sound dtype, shape or data_offsets"),
        ({"x": entry("F32", [2**63, 0], 0, 0)}, "lacks a sound dtype, shape or data_offsets"),
        ({"x": entry("F32", [1] * 32 + [2], 0, 8)}, "lacks a sound dtype, shape or data_offsets"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "lacks a sound dtype, shape or data_offsets"),
        (
            {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
            "lacks a sound dtype, shape or data_offsets",
        ),
        ({"x": 3}, "'x' lacks a sound dtype, shape or data_offsets"),
        ({"x": entry("F7", [2], 0, 8)}, "tensor 'x' has the unknown dtype 'F7'"),
        ({"__metadata__": ["a"]}, "its __metadata__ is not a JSON object of texts"),
        ({"__metadata__": {"a": 1}}, "its __metadata__ is not a JSON object of texts"),
        (["x"], "its header is not a JSON object"),
        (b'{"x": 1, "y": 2, "x": 3}', "'x' stands twice in the header"),
    ],
)
def test_a_header_that_isnt_the_files_is_told(tmp_path, header, message):
    with pytest.raises(ValueError, match=f"a.safetensors is not a whole safetensors file: .*{message}"):
        SafetensorsFile(write(tmp_path / "a.safetensors", header, bytes(8)))


def test_bounds_are_themselves_allowed(tmp_path, monkeypatch):
    path, shape = tmp_path / "a.safetensors", [1] * 31 + [2]
    header = json.dumps({"x": entry("F32", shape, 0, 8), "none": entry("F32", [2**63 - 1, 0], 8, 8)}).encode()
    monkeypatch.setattr(readers, "_MAX_HEADER", len(header))
    assert SafetensorsFile(write(path, header, bytes(8))).read("x").shape == tuple(shape)
    monkeypatch.setattr(readers, "_MAX_HEADER", len(header) - 1)
    with pytest.raises(ValueError, match=r"its header has .* bytes, metadata included, more than the"):
        SafetensorsFile(write(path, header, bytes(8)))


def test_a_mapped_file_is_its_bytes_and_cant_be_written(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    mapped = map_file(tmp_path / "a")
    assert mapped.tobytes() == b"abc"
    assert not mapped.flags.writeable


def index(path: pathlib.Path, weight_map) -> pathlib.Path:
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_shards_are_one_reader(tmp_path):
    ones(tmp_path / "1.safetensors", "a", "b", __metadata__={"from": "one"})
    write(
        tmp_path / "2.safetensors",
        {"c": entry("F32", [1], 0, 4), "__metadata__": {"to": "two"}},
        np.float32(2).tobytes(),
    )
    file = index(tmp_path / "i.json", {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    for reader in (ShardedSafetensors(file), open_weights(file)):
        assert list(reader.tensors) == ["a", "b", "c"]
        assert reader.metadata == {"from": "one", "to": "two"}
        assert reader.read("c").tolist() == [2]
        assert reader.read("a").tolist() == [1, 1]
    assert list(open_weights(tmp_path / "1.safetensors").tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map from tensor to file"),
        (["a"], "has no weight_map from tensor to file"),
        ({"a": 1}, "has no weight_map from tensor to file"),
        ({"a": "../1.safetensors"}, "names the shard '../1.safetensors', which is not a plain file name"),
        ({"a": "b\\1.safetensors"}, r"which is not a plain file name"),
        ({"a": "1.safetensors", "b": "2.safetensors"}, "1.safetensors holds tensor 'b', but i.json places it in 2.safetensors"),
        ({"a": "1.safetensors"}, "1.safetensors holds tensor 'b', but i.json doesn't name it"),
        ({"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"}, "places tensor 'c' in 1.safetensors, which lacks"),
    ],
)  # fmt: skip
def test_an_index_that_isnt_its_shards_is_told(tmp_path, weight_map, message):
    ones(tmp_path / "1.safetensors", "a", "b")
    with pytest.raises(ValueError, match=message):
        ShardedSafetensors(index(tmp_path / "i.json", weight_map))


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"1.safetensors is missing, and i.json names it"):
        ShardedSafetensors(index(tmp_path / "i.json", {"a": "1.safetensors"}))


def test_a_renamed_reader_has_the_new_keys(tmp_path):
    file = ones(tmp_path / "a.safetensors", "old.a", "old.b", __metadata__={"x": "y"})
    both = Renamed(SafetensorsFile(file), {"old.a": "a"})
    assert {key: info.key for key, info in both.tensors.items()} == {"a": "a", "old.b": "old.b"}
    assert both.metadata == {"x": "y"}
    assert both.read("a").tolist() == both.read("old.b").tolist() == [1, 1]
    assert list(Renamed(SafetensorsFile(file), {"old.a": "a"}, only=True).tensors) == ["a"]


def folder(path: pathlib.Path, *names: str, **weight_maps: str) -> pathlib.Path:
    """A folder of safetensors with a tensor `x` each, and their names as metadata; indexes that place `x` in a shard."""
    path.mkdir()
    for name in names:
        ones(path / name, "x", __metadata__={"file": name})
    for name, shard in weight_maps.items():
        index(path / name, {"x": shard})
    return path


ONE, HALF = "m-00001-of-00001", "m.fp16-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("names", "indexes", "taken"),
    [
        (["other.safetensors"], {}, None),
        (["m.safetensors"], {}, "m.safetensors"),
        (["m.fp16.safetensors"], {}, "m.fp16.safetensors"),
        (["m.fp16.safetensors", "m.safetensors"], {}, "m.safetensors"),
        (["m.fp16.safetensors", "m.bf16.safetensors", "m.safetensors"], {}, "m.safetensors"),
        (["m.safetensors", HALF], {"m.fp16.safetensors.index.json": HALF}, "m.safetensors"),
        ([f"{ONE}.safetensors"], {"m.safetensors.index.json": f"{ONE}.safetensors"}, f"{ONE}.safetensors"),
        ([f"{ONE}.fp16.safetensors"], {"m.safetensors.index.fp16.json": f"{ONE}.fp16.safetensors"}, f"{ONE}.fp16.safetensors"),
        ([HALF], {"m.fp16.safetensors.index.json": HALF}, HALF),
    ],
)  # fmt: skip
def test_the_files_of_a_component_are_found_by_stem_and_variant(tmp_path, names, indexes, taken):
    reader = open_safetensors(folder(tmp_path / "c", *names, **indexes), "m")
    if taken is None:
        assert reader is None
    else:
        assert reader is not None
        assert reader.metadata == {"file": taken}
        assert reader.read("x").tolist() == [1, 1]


SHARD = f"{ONE}.safetensors"


@pytest.mark.parametrize(
    ("names", "indexes", "error", "message"),
    [
        (["m.fp16.safetensors", "m.bf16.safetensors"], {}, ValueError, "has m.bf16 and m.fp16; keep the one to be used"),
        (["m.safetensors", SHARD], {}, ValueError, f"has both m.safetensors and {SHARD}; remove the stale one"),
        ([SHARD], {}, FileNotFoundError, f"m.safetensors.index.json is missing, and {SHARD} is a shard"),
        ([f"{ONE}.fp16.safetensors"], {}, FileNotFoundError, "m.fp16.safetensors.index.json is missing, and"),
        ([SHARD, "m.safetensors"], {"m.safetensors.index.json": SHARD}, ValueError, "m.safetensors is not named by m.s.*stale"),
        ([SHARD, "m-00002-of-00002.safetensors"], {"m.safetensors.index.json": SHARD}, ValueError, "00002.safetensors is not"),
    ],
)  # fmt: skip
def test_files_that_could_be_two_models_are_told(tmp_path, names, indexes, error, message):
    with pytest.raises(error, match=message):
        open_safetensors(folder(tmp_path / "c", *names, **indexes), "m")
