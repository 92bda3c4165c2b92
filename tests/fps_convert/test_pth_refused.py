"""The .pth reader refuses: what would run code, what claims to be larger or elsewhere than it is, what is cut or corrupt."""

import pickle
import struct
import zipfile

import pytest

from fps_convert.formats.pth import PthFile, interpret
from tests.fps_convert.pth_files import GOLDEN, SIX, Call, Fake, pickled, pth, storage, tensor


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
        (Call(Fake("builtins", "eval"), ("1",)), "asks to import builtins.eval"),
        (Call(Fake("torch", "load"), ("x",)), "asks to import torch.load"),
        (Call(Fake("torch.storage", "_load_from_bytes"), (b"x",)), "asks to import torch.storage._load_from_bytes"),
        (Call(Fake("torch", "FloatStorage"), (6,)), "calls torch.FloatStorage with arguments"),
        (Call(Fake("collections", "OrderedDict"), ([("a", 1)],)), "calls collections.OrderedDict with arguments"),
        (Call(Fake("torch._utils", "_rebuild_tensor_v2"), (1, 2)), "calls torch._utils._rebuild_tensor_v2 with arguments"),
        (Call(Call(Fake("collections", "OrderedDict"), ()), ()), "calls dict with arguments"),
        (Call(Fake("collections", "OrderedDict"), (), {"__class__": 1}), "sets the state of an object"),
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
        ({"x": Call(Fake("torch._utils", "_rebuild_tensor_v2"), (storage(), 0, (2,), (1,), False, {}, {}, 1))}, "calls torch"),
        (Call(Fake("collections", "OrderedDict"), (), [1]), "sets the state of an object"),
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
