"""The .pth writer: sound zips that read back, with the globals and opcodes that torch itself writes."""

import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from fps_convert.formats import writers
from fps_convert.formats.pth import PthFile
from fps_convert.formats.writers import Output, write_pth
from tests.fps_convert.pth_files import GOLDEN


@pytest.mark.parametrize("zip64_from", [writers.ZIP64_FROM, 40])
def test_written_pth_files_are_sound_zips_that_read_back(tmp_path, monkeypatch, zip64_from):
    """The 64-bit fields of large files too, on small ones."""
    monkeypatch.setattr(writers, "ZIP64_FROM", zip64_from)
    arrays = {
        "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "b": np.arange(5).astype(ml_dtypes.bfloat16),
        "c": np.float32(3).reshape(()),
        "ünï": np.ones((1, 7), np.float16),
    }
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    outputs = [Output(k, v.shape, names[v.dtype.name], lambda v=v: v) for k, v in arrays.items()]
    done = []
    write_pth(tmp_path / "w.pth", outputs, done.append)
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        assert archive.testzip() is None
        assert archive.read("w/version") == b"3\n"
        assert [archive.getinfo(f"w/data/{i}").file_size for i in range(4)] == [96, 10, 4, 14]
        offset = archive.getinfo("w/data/1").header_offset
    raw = (tmp_path / "w.pth").read_bytes()
    name, extra = struct.unpack("<HH", raw[offset + 26 : offset + 30])
    assert (offset + 30 + name + extra) % 64 == 0  # torch.load(mmap=True) wants it so
    reader = PthFile(tmp_path / "w.pth")
    assert list(reader.tensors) == list(arrays)
    for key, array in arrays.items():
        got = reader.read(key)
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert sum(done) >= sum(array.nbytes for array in arrays.values())


class _Unpickler(pickle.Unpickler):
    """Python's own, with names in place of what torch has."""

    def find_class(self, module, name):
        return dict if name == "OrderedDict" else lambda *args: (name, *args)

    def persistent_load(self, pid):
        return pid[2:]


def test_a_root_is_a_dict_around_the_tensors(tmp_path):
    two = [Output(key, (2,), "F32", lambda: np.ones(2, np.float32)) for key in "xy"]
    write_pth(tmp_path / "w.pt", two, lambda _: None, root="generator", name="archive")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        content = _Unpickler(io.BytesIO(archive.read("archive/data.pkl"))).load()
    assert list(content) == ["generator"]
    assert {key: tensor[1:3] for key, tensor in content["generator"].items()} == {
        "x": (("0", "cpu", 2), 0),
        "y": (("1", "cpu", 2), 0),
    }
    reader = PthFile(tmp_path / "w.pt")
    assert (reader.root, list(reader.tensors)) == ("generator", ["x", "y"])


@pytest.mark.parametrize("root", [None, "generator"])
def test_the_pickle_holds_only_what_the_golden_file_holds(tmp_path, root):
    """torch.load(weights_only=True) admits what torch itself writes: the same globals, and opcodes among its list."""
    import pickletools

    def content(path):
        with zipfile.ZipFile(path) as archive:
            data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
        operations = list(pickletools.genops(data))
        return {op.name for op, _, _ in operations}, {arg for op, arg, _ in operations if op.name == "GLOBAL"}

    write_pth(tmp_path / "w.pth", [Output("x", (2,), "F32", lambda: np.ones(2, np.float32))], lambda _: None, root=root)
    opcodes, names = content(tmp_path / "w.pth")
    _, golden_names = content(GOLDEN)
    assert names == golden_names
    admitted = {
        "PROTO",
        "GLOBAL",
        "EMPTY_TUPLE",
        "REDUCE",
        "MARK",
        "BINUNICODE",
        "TUPLE",
        "BININT",
        "BINPERSID",
        "NEWFALSE",
    }
    assert opcodes <= admitted | {"SETITEMS", "STOP", "LONG1"}
