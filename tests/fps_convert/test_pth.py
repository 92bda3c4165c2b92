"""The .pth reader: what torch writes is read; what would run code is refused, and nothing runs."""

import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from fps_convert.formats import pth as pth_module
from fps_convert.formats import writers
from fps_convert.formats.pth import PthFile, interpret
from fps_convert.formats.writers import Output, write_pth
from tests.reference import DATA

GOLDEN = DATA / "convert" / "models_t5_umt5-xxl-enc-bf16.pth"


class Fake:
    """Stands for a global of torch in a pickle, without torch."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class _Call:
    def __init__(self, function, args, state=None):
        self.function, self.args, self.state = function, args, state


class Pickler(pickle._Pickler):  # type: ignore[attr-defined]
    """Pickles `Fake` as a global, `_Call` as a call and `_Storage` as a persistent id."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Fake):
            self.write(b"c" + obj.module.encode() + b"\n" + obj.name.encode() + b"\n")
        elif isinstance(obj, _Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(b"R")
            if obj.state is not None:
                self.save(obj.state)
                self.write(b"b")
        elif isinstance(obj, tuple) and obj and obj[0] == "storage" and len(obj) == 5 and save_persistent_id:
            super().save(obj, False)
            self.write(b"Q")
        else:
            super().save(obj)


def storage(kind="FloatStorage", record="0", numel=6):
    return ("storage", Fake("torch", kind), record, "cpu", numel)


def tensor(store, offset=0, shape=(2, 3), stride=(3, 1), name="_rebuild_tensor_v2"):
    hooks = _Call(Fake("collections", "OrderedDict"), ())
    return _Call(Fake("torch._utils", name), (store, offset, shape, stride, False, hooks))


def pickled(content) -> bytes:
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


def pth(path, content, records=(), *, compression=zipfile.ZIP_STORED, prefix="archive/", byteorder=b"little"):
    data = content if isinstance(content, bytes) else pickled(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{prefix}data.pkl", data)
        archive.writestr(f"{prefix}byteorder", byteorder)
        for name, values in dict(records).items():
            archive.writestr(f"{prefix}data/{name}", values)
    return path


SIX = np.arange(6, dtype=np.float32)


def test_reads_what_torch_wrote():
    reader = PthFile(GOLDEN)
    assert len(reader.tensors) == 32
    assert reader.tensors["blocks.2.ffn.fc2.weight"].shape == (32, 64)
    values = reader.read("token_embedding.weight")
    assert values.dtype == np.float32
    assert values.shape == (416, 32)
    assert not values.flags.writeable


@pytest.mark.parametrize("prefix", ["archive/", "", "model/inner/"])
def test_any_prefix_of_the_records(tmp_path, prefix):
    reader = PthFile(pth(tmp_path / "a.pth", {"x": tensor(storage())}, {"0": SIX.tobytes()}, prefix=prefix))
    np.testing.assert_array_equal(reader.read("x"), SIX.reshape(2, 3))


def test_strides_offsets_and_shared_storages(tmp_path):
    store = storage()
    content = {
        "transposed": tensor(store, 0, (3, 2), (1, 3)),
        "tail": tensor(store, 4, (2,), (1,)),
        "expanded": tensor(store, 1, (2, 3), (0, 1)),
        "scalar": tensor(store, 5, (), ()),
        "empty": tensor(store, 0, (0, 3), (3, 1)),
    }
    reader = PthFile(pth(tmp_path / "a.pth", content, {"0": SIX.tobytes()}))
    np.testing.assert_array_equal(reader.read("transposed"), SIX.reshape(2, 3).T)
    np.testing.assert_array_equal(reader.read("tail"), [4, 5])
    np.testing.assert_array_equal(reader.read("expanded"), [[1, 2, 3], [1, 2, 3]])
    assert reader.read("scalar") == 5
    assert reader.read("empty").shape == (0, 3)


def test_parameters_ordered_dicts_metadata_and_one_wrapper(tmp_path):
    hooks = _Call(Fake("collections", "OrderedDict"), ())
    parameter = _Call(Fake("torch._utils", "_rebuild_parameter"), (tensor(storage()), True, hooks))
    plain = PthFile(pth(tmp_path / "a.pth", {"x": parameter}, {"0": SIX.tobytes()}))
    assert list(plain.tensors) == ["x"]
    wrapped = {"state_dict": {"x": tensor(storage())}, "epoch": 3, "note": "plain"}
    assert list(PthFile(pth(tmp_path / "b.pth", wrapped, {"0": SIX.tobytes()})).tensors) == ["x"]
    state = _Call(Fake("collections", "OrderedDict"), (), {"_metadata": {"": {"version": 1}}})
    body = pickled({"model": state})  # an empty state dict with torch's module versions
    with pytest.raises(ValueError, match="doesn't hold a state dict"):
        PthFile(pth(tmp_path / "c.pth", body))


def roots(path, *names, beside=(), **arguments):
    """Opens a file with a state dict of its own under each name, `x` of each of one value."""
    records = {str(i): np.float32(i).tobytes() for i in range(len(names))}
    content = {name: {"x": tensor(storage("FloatStorage", str(i), 1), 0, (), ())} for i, name in enumerate(names)}
    return PthFile(pth(path / "r.pt", content | dict(beside), records), **arguments)


def test_of_several_state_dicts_one_is_read(tmp_path):
    for names, asked, read in (
        (("other",), None, "other"),
        (("other", "generator"), None, "generator"),
        (("model", "generator", "generator_ema"), None, "generator_ema"),
        (("model", "generator", "generator_ema"), "model", "model"),
        (("a", "b"), "b", "b"),
    ):
        reader = roots(
            tmp_path, *names, root=asked, beside={"step": 3, "lr": 0.1, "none": None, "list": [1], "dict": {}}
        )
        assert (reader.root, reader.roots) == (read, names)
        assert reader.read("x") == names.index(read)
    plain = PthFile(pth(tmp_path / "p.pth", {"x": tensor(storage())}, {"0": SIX.tobytes()}))
    assert (plain.root, plain.roots) == ("", ("",))


def test_a_root_that_cant_be_read_is_told_with_those_there_are(tmp_path):
    for names, asked, message in (
        (("a", "b"), None, r"r.pt holds several state dicts: a, b; say which with --root"),
        (("b", "a"), "c", r"root='c' is not in .*r.pt, which has a, b; give one of these"),
    ):
        with pytest.raises(ValueError, match=message):
            roots(tmp_path, *names, root=asked)
    plain = pth(tmp_path / "p.pth", {"x": tensor(storage())}, {"0": SIX.tobytes()})
    with pytest.raises(ValueError, match=r"root='x': .*p.pth is one state dict, without roots; leave it out"):
        PthFile(plain, "x")
    for names, beside in (((), {"step": 1}), (("",), {}), (("a", 1), {}), (("a",), {"tuple": (1, 2)})):
        with pytest.raises(ValueError, match="doesn't hold a state dict"):
            roots(tmp_path, *names, beside=beside)


def test_bounds_of_tensors_are_themselves_allowed(tmp_path):
    hooks, rebuild = _Call(Fake("collections", "OrderedDict"), ()), Fake("torch._utils", "_rebuild_tensor_v2")
    content = {
        "last": tensor(storage(), 5, (1,), (1,)),
        "deep": tensor(storage(), 0, (1,) * 32, (1,) * 32),
        "long": tensor(storage(), 0, (0, 2**48 - 1), (1, 1)),
        "none": tensor(storage("FloatStorage", "none", 0), 0, (0,), (1,)),
        "metadata": _Call(rebuild, (storage(), 0, (2,), (1,), False, hooks, {})),
    }
    reader = PthFile(pth(tmp_path / "a.pth", content, {"0": SIX.tobytes(), "none": b""}))
    assert reader.read("last").tolist() == [5]
    assert reader.read("deep").shape == (1,) * 32
    assert reader.read("long").shape == (0, 2**48 - 1)
    assert reader.read("none").shape == (0,)
    assert reader.read("metadata").tolist() == [0, 1]


WIDTHS = {
    "FloatStorage": "f", "HalfStorage": "e", "BFloat16Storage": "e", "DoubleStorage": "d", "LongStorage": "q", "IntStorage": "i",
    "ShortStorage": "h", "CharStorage": "b", "ByteStorage": "B", "BoolStorage": "?",
}  # fmt: skip


@pytest.mark.parametrize("kind", WIDTHS)
def test_a_record_has_the_bytes_of_its_storage(tmp_path, kind):
    size = 3 * struct.calcsize(WIDTHS[kind])
    content = {"x": tensor(storage(kind, "0", 3), 0, (3,), (1,))}
    assert list(PthFile(pth(tmp_path / "a.pth", content, {"0": bytes(size)})).tensors) == ["x"]
    with pytest.raises(ValueError, match=f"should have {size} bytes and has {size - 1}"):
        PthFile(pth(tmp_path / "b.pth", content, {"0": bytes(size - 1)}))


def test_a_pickle_may_have_as_many_bytes_as_are_read(tmp_path, monkeypatch):
    content = {"x": tensor(storage())}
    path = pth(tmp_path / "a.pth", content, {"0": SIX.tobytes()})
    monkeypatch.setattr(pth_module, "_MAX_PICKLE", len(pickled(content)))
    assert list(PthFile(path).tensors) == ["x"]
    monkeypatch.setattr(pth_module, "_MAX_PICKLE", len(pickled(content)) - 1)
    with pytest.raises(ValueError, match="more than the"):
        PthFile(path)


def test_a_record_that_isnt_where_the_directory_says(tmp_path):
    whole = pth(tmp_path / "a.pth", {"x": tensor(storage())}, {"0": SIX.tobytes()}).read_bytes()
    at = whole.rindex(b"PK\1\2")  # the last entry is the record's
    (header,) = struct.unpack_from("<I", whole, at + 42)
    for place, changed, message in (
        (at + 42, struct.pack("<I", header + 1), "has no local header where the directory says"),
        (at + 24, struct.pack("<I", 25), "is compressed"),
        # extra fields that lead out of the file, and to its last ten bytes
        (header + 28, b"\xff\xff", "should have 24 bytes and has 24"),
        (
            header + 28,
            struct.pack("<H", len(whole) - 10 - header - 30 - len("archive/data/0")),
            "should have 24 bytes and has 24",
        ),
    ):
        (tmp_path / "b.pth").write_bytes(whole[:place] + changed + whole[place + len(changed) :])
        with pytest.raises(ValueError, match=f"b.pth is refused: its record archive/data/0 {message}"):
            PthFile(tmp_path / "b.pth")


class Payload:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["value", "before", "wrapped"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, protocol, place):
    import os

    mark = tmp_path / "ran"
    payload = Payload(os.system, f"touch {mark}")
    content = {"value": {"x": payload}, "before": [payload, {}], "wrapped": {"state_dict": {"x": payload}}}[place]
    path = pth(tmp_path / "evil.pth", pickle.dumps(content, protocol))
    with pytest.raises(
        ValueError, match=r"evil\.pth is refused: its pickle asks to import (posix|nt)\.system.*nothing was run"
    ):
        PthFile(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(content, protocol))
    assert mark.exists()  # the payload does work


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Call(Fake("builtins", "eval"), ("1",)), "asks to import builtins.eval"),
        (_Call(Fake("torch", "load"), ("x",)), "asks to import torch.load"),
        (_Call(Fake("torch.storage", "_load_from_bytes"), (b"x",)), "asks to import torch.storage._load_from_bytes"),
        (_Call(Fake("torch", "FloatStorage"), (6,)), "calls torch.FloatStorage with arguments"),
        (_Call(Fake("collections", "OrderedDict"), ([("a", 1)],)), "calls collections.OrderedDict with arguments"),
        (_Call(Fake("torch._utils", "_rebuild_tensor_v2"), (1, 2)), "calls torch._utils._rebuild_tensor_v2 with arguments"),
        (_Call(_Call(Fake("collections", "OrderedDict"), ()), ()), "calls dict with arguments"),
        (_Call(Fake("collections", "OrderedDict"), (), {"__class__": 1}), "sets the state of an object"),
        ({"x": tensor(storage(), 1)}, "reaches past its storage of 6 elements"),
        ({"x": tensor(storage(), -1, (2,), (1,))}, "arguments that no state dict has"),
        ({"x": tensor(storage(), 0, (2**50, 0), (1, 1))}, "arguments that no state dict has"),
        ({"x": tensor(storage(), 0, (1,) * 40, (1,) * 40)}, "arguments that no state dict has"),
        ({"x": tensor(storage(), 0, (2, 3), (3, -1))}, "arguments that no state dict has"),
        ({"x": tensor(storage(), 0, (2, 3), (1,))}, "arguments that no state dict has"),
        ({"x": tensor(storage("FloatStorage", "0", 7), 0)}, "record archive/data/0 should have 28 bytes and has 24"),
        ({"x": tensor(storage("FloatStorage", "9"))}, "names the record archive/data/9, which the archive lacks"),
        ({"x": tensor(storage("QInt8Storage"))}, "asks to import torch.QInt8Storage"),
        ({"x": tensor(storage("FloatStorage", "0", -1), 0, (0,), (1,))}, "a persistent id that is not a tensor's storage"),
        ({"x": tensor(storage(), 0, (2**48,), (0,))}, "arguments that no state dict has"),
        ({"x": tensor(storage(), 0, (1,) * 33, (1,) * 33)}, "arguments that no state dict has"),
        ({"x": tensor(storage(), 6, (1,), (1,))}, "reaches past its storage of 6 elements"),
        ({"x": _Call(Fake("torch._utils", "_rebuild_tensor_v2"), (storage(), 0, (2,), (1,), False, {}, {}, 1))}, "calls torch"),
        (_Call(Fake("collections", "OrderedDict"), (), [1]), "sets the state of an object"),
        (b"\x80\x02K\x01(K\x01K\x02u.", "sets items of something that is not a dict"),
        (b"\x80\x02}(K\x01u.", "sets items of something that is not a dict"),
        (b"\x80\x02}K\x01a.", "appends to something that is not a list"),
        (b"\x80\x02K\x01}b.", "sets the state of an object"),
        ({"x": 1, "y": "z"}, "doesn't hold a state dict"),
        ([1, 2], "doesn't hold a state dict"),
        ({(1, 2): 3}, "dict key of type tuple"),
        (b"\x80\x02}0.", "uses the opcode POP"),
        (b"\x80\x02cos\nsystem\n.", "asks to import os.system"),
        (b"\x80\x02ctorch\n_utils _rebuild_tensor_v2\n.", "asks to import torch._utils _rebuild_tensor_v2"),
        (b"\x80\x02(S'x'\nios\nsystem\n.", "uses the opcode"),
        (b"\x80\x02\x82\x01.", "uses the opcode EXT1"),
    ],
)  # fmt: skip
def test_anything_else_in_a_pickle_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        PthFile(pth(tmp_path / "a.pth", content, {"0": SIX.tobytes()}))


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02", b"\x80\x02u.", b"\x80\x02h\x05.", b"\xff" * 40, b"\x80\x02X\xff\xff\xff\x7fx"]
)
def test_a_corrupt_pickle_is_told(tmp_path, data):
    with pytest.raises(ValueError, match=r"a\.pth (has a corrupt data\.pkl|is refused)"):
        PthFile(pth(tmp_path / "a.pth", data))


def test_files_that_are_no_whole_pth(tmp_path):
    whole = GOLDEN.read_bytes()
    for name, data, message in (
        ("cut.pth", whole[:-100], r"cut\.pth is truncated or corrupt"),
        ("half.pth", whole[: len(whole) // 2], r"half\.pth is truncated or corrupt"),
        ("empty.pth", b"", r"empty\.pth is empty"),
        ("legacy.pth", pickle.dumps({"x": 1}, 2), r"legacy\.pth is not a zip-format .pth.*Re-save"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            PthFile(tmp_path / name)
    one = {"x": tensor(storage())}
    with pytest.raises(ValueError, match="is compressed"):
        PthFile(pth(tmp_path / "z.pth", one, {"0": SIX.tobytes()}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="big-endian"):
        PthFile(pth(tmp_path / "b.pth", one, {"0": SIX.tobytes()}, byteorder=b"big"))
    with zipfile.ZipFile(tmp_path / "n.pth", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(ValueError, match=r"0 data\.pkl records"):
        PthFile(tmp_path / "n.pth")


def test_small_records_are_believed_only_so_far(tmp_path):
    """A record that inflates to gigabytes, one that claims to be small, and one that is encrypted."""
    import tracemalloc

    one = {"x": tensor(storage())}
    for name, damage, message in (
        ("bomb", {"byteorder": b"\0" * (64 << 20)}, "byteorder is compressed"),
        ("long", {"byteorder": b"little" * 10}, "byteorder has 60 bytes, more than the 16 that it may have"),
        (
            "pickle",
            {"data.pkl": b"\x80\x02" + b"(t" * (2 << 20) + b"."},
            "data.pkl has .* bytes, more than the 2097152",
        ),
    ):
        kind = zipfile.ZIP_DEFLATED if name == "bomb" else zipfile.ZIP_STORED
        path = tmp_path / f"{name}.pth"
        with zipfile.ZipFile(path, "w", kind) as archive:
            for record, content in ({"data.pkl": pickled(one), "data/0": SIX.tobytes()} | damage).items():
                archive.writestr(f"archive/{record}", content)
        tracemalloc.start()
        with pytest.raises(ValueError, match=rf"{name}\.pth is refused: its (record )?archive/{message}"):
            PthFile(path)
        assert tracemalloc.get_traced_memory()[1] < 4e6
        tracemalloc.stop()
    whole = pth(tmp_path / "whole.pth", one, {"0": SIX.tobytes()}).read_bytes()
    at = whole.index(b"PK\1\2")
    (tmp_path / "locked.pth").write_bytes(whole[: at + 8] + b"\1" + whole[at + 9 :])  # the first bit of its flags
    with pytest.raises(ValueError, match=r"locked.pth is refused: its record \w+/data.pkl is encrypted"):
        PthFile(tmp_path / "locked.pth")


def test_marks_and_tuples_take_linear_time():
    import time

    start = time.process_time()
    with pytest.raises(ValueError, match="exhausted before seeing STOP"):
        interpret(b"\x80\x02" + b"(t" * 100_000)
    assert time.process_time() - start < 5  # from the bottom of the stack each mark was searched for: minutes


def test_integers_are_no_weights(tmp_path):
    reader = PthFile(
        pth(tmp_path / "a.pth", {"n": tensor(storage("LongStorage", "0", 3), 0, (3,), (1,))}, {"0": b"\0" * 24})
    )
    with pytest.raises(NotImplementedError, match=r"tensor 'n' has dtype I64; weights are F32, F16 or BF16"):
        reader.read("n")


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
