"""The .pth reader: what torch writes is read, within bounds that are themselves allowed."""

import struct

import numpy as np
import pytest

from fps_convert.formats import pth as pth_module
from fps_convert.formats.pth import PthFile
from tests.fps_convert.pth_files import GOLDEN, SIX, Call, Fake, pickled, pth, storage, tensor


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
    hooks = Call(Fake("collections", "OrderedDict"), ())
    parameter = Call(Fake("torch._utils", "_rebuild_parameter"), (tensor(storage()), True, hooks))
    plain = PthFile(pth(tmp_path / "a.pth", {"x": parameter}, {"0": SIX.tobytes()}))
    assert list(plain.tensors) == ["x"]
    wrapped = {"state_dict": {"x": tensor(storage())}, "epoch": 3, "note": "plain"}
    assert list(PthFile(pth(tmp_path / "b.pth", wrapped, {"0": SIX.tobytes()})).tensors) == ["x"]
    state = Call(Fake("collections", "OrderedDict"), (), {"_metadata": {"": {"version": 1}}})
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
    hooks, rebuild = Call(Fake("collections", "OrderedDict"), ()), Fake("torch._utils", "_rebuild_tensor_v2")
    content = {
        "last": tensor(storage(), 5, (1,), (1,)),
        "deep": tensor(storage(), 0, (1,) * 32, (1,) * 32),
        "long": tensor(storage(), 0, (0, 2**48 - 1), (1, 1)),
        "none": tensor(storage("FloatStorage", "none", 0), 0, (0,), (1,)),
        "metadata": Call(rebuild, (storage(), 0, (2,), (1,), False, hooks, {})),
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


def test_integers_are_no_weights(tmp_path):
    reader = PthFile(
        pth(tmp_path / "a.pth", {"n": tensor(storage("LongStorage", "0", 3), 0, (3,), (1,))}, {"0": b"\0" * 24})
    )
    with pytest.raises(NotImplementedError, match=r"tensor 'n' has dtype I64; weights are F32, F16 or BF16"):
        reader.read("n")
