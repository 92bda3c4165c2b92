"""Damage of every kind, bounded and the same each time: a file is read, or told in a ValueError or NotImplementedError, soon."""

import contextlib
import copy
import json
import pathlib
import shutil
import struct
import time
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fps_convert import to_torch
from fps_convert.formats.pth import PthFile
from fps_convert.formats.readers import SafetensorsFile
from fps_convert.open import open_checkpoint
from fps_convert.synthetic import tiny_config
from fps_jax import FPSSchedule, Regime
from fps_jax.checkpoints.format import is_checkpoint, read_config, write_config
from fps_jax.files import read_json
from tests.fps_convert.pth_files import SIX, pickled, storage, tensor

TOLD = (ValueError, NotImplementedError, FileNotFoundError)
FEW, MANY = (
    settings(max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    for n in (15, 100)
)
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 10**9, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), True, False]
)
LEAVES = (
    NUMBERS | st.none() | st.text(max_size=5) | st.sampled_from(["t2v", "F32", "1" * 5000, "\ud800", "../x", "a\0b"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@contextlib.contextmanager
def soon():
    """In two seconds of this process: a wall clock would tell of the machine's other work."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 2


def names(error: Exception, where: str) -> None:
    """The message says where."""
    assert where in str(error)


def paths(content, path=()):
    """Every place in a JSON value, outside in."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


@st.composite
def damaged(draw, content):
    """A JSON value with a place or two replaced, taken out or added to."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(sorted((p for p in paths(content) if p), key=repr)) | st.just((None,)))
        parent = content
        for key in path:
            parent = parent[key]
        if last is None:
            content["added"] = draw(VALUES)
        elif isinstance(parent, dict) and draw(st.booleans()):
            parent.pop(last)
            if not content:
                break
        else:
            parent[last] = draw(VALUES)
    return content


def text_of(content) -> str:
    """JSON as Python writes it, NaN, digits and lone surrogates included."""
    return json.dumps(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("fuzz")


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


@MANY
@given(header=damaged(HEADER), length=st.sampled_from([None, None, None, 0, 7, 10**9, 2**63]))
def test_safetensors_headers(folder, header, length):
    file = folder / "a.safetensors"
    text = text_of(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(32))
    try:
        with soon():
            reader = SafetensorsFile(file)
    except TOLD as error:
        names(error, "a.safetensors")
        return
    for key in reader.tensors:
        try:
            assert reader.read(key).shape == reader.tensors[key].shape
        except NotImplementedError as error:
            names(error, "a.safetensors")


@MANY
@given(content=st.text(max_size=30) | VALUES.map(text_of) | st.sampled_from(["[" * 100_000, '{"a":' * 50_000]))
def test_json(folder, content):
    (folder / "a.json").write_bytes(content.encode(errors="surrogatepass"))
    try:
        with soon():
            assert isinstance(read_json(folder / "a.json"), dict)
    except ValueError as error:
        names(error, "a.json")
    assert not is_checkpoint(folder / "a.json")


OPCODES = b"}](tNQRuesabq\x00h\x00.\x80\x02\x85\x86\x87K\x01J\xff\xff\xff\xffX\x01\x00\x00\x00a\x8a\x01\x05G\x94"
GLOBALS = [
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    b"cos\nsystem\n",
]
WHOLE = pickled({"x": tensor(storage()), "y": tensor(storage(), 2, (2, 2), (1, 2))})


@st.composite
def pickles(draw):
    if draw(st.booleans()):  # a sound one with bytes changed
        data = bytearray(WHOLE)
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    opcode = st.sampled_from(sorted({bytes([n]) for n in OPCODES})) | st.sampled_from(GLOBALS)
    return b"\x80\x02" + b"".join(draw(st.lists(opcode, max_size=30))) + b"."


@MANY
@given(data=pickles())
def test_pickles(folder, data):
    file = folder / "a.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", SIX.tobytes())
    try:
        with soon():
            reader = PthFile(file)
    except TOLD as error:
        names(error, "a.pth")
        return
    for key in reader.tensors:
        try:
            np.asarray(reader.read(key)).sum()
        except NotImplementedError as error:
            names(error, "a.pth")


OURS = json.loads(json.dumps(tiny_config("i2v").to_dict()))


@MANY
@given(config=damaged({"format": "fps_jax", "version": 1, "config": OURS}))
def test_our_config(folder, config):
    (folder / "config.json").write_text(text_of(config))
    try:
        with soon():
            read = read_config(folder)
    except ValueError as error:
        names(error, str(folder))
        return
    write_config(folder, read)  # what is taken can be written and read again: no NaN among it
    assert read_config(folder) == read


SCHEDULE = FPSSchedule(
    regimes=(Regime(until=0.5, scales_per_tile=1, density=0.2), Regime(until=1.0, window=(1, 1, 1))), dense_layers=(0,)
).to_dict()


@MANY
@given(record=damaged(SCHEDULE))
def test_schedules(folder, record):
    (folder / "schedule.json").write_text(text_of(record))
    try:
        with soon():
            schedule = FPSSchedule.load(folder / "schedule.json")
    except ValueError as error:
        names(error, "schedule.json")
        return
    try:
        schedule.resolve((2, 4, 4))
    except ValueError as error:
        names(error, "")


JSONS = {
    "diffusers": (
        "model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
        "image_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
    ),
    "official": ("config.json", "google/umt5-xxl/tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, names in JSONS.items() for name in names])
def test_their_configs(pristine, folder, layout, name):
    source = folder / layout
    if not source.exists():
        shutil.copytree(pristine(layout, "i2v"), source)
    whole = (source / name).read_text()
    content = json.loads(whole)
    if "tokenizer" in name:  # its words are many, and all alike
        content = {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "added_tokens": [{"id": 1, "content": "b"}]}

    @FEW
    @given(changed=damaged(content))
    def check(changed):
        (source / name).write_text(text_of(changed))
        try:
            with soon():
                open_checkpoint(source)
        except TOLD as error:
            names(error, str(source))

    try:
        check()
    finally:
        (source / name).write_text(whole)


NOTED = {
    "components": ["dit", "vae", "text_encoder"],
    "spelling": {"text_embedding": ["shared.weight"], "vision_prefix": ""},
    "mixed_dtypes": {"dit": {"blocks/self_attn/q/kernel": ["F32", "BF16"]}},
}


@FEW
@given(noted=damaged(NOTED))
def test_what_was_noted_for_the_way_back(folder, noted):
    """Our config.json beside the config: none of the arrays is there, which is told at the latest."""
    path = folder / "ours"
    path.mkdir(exist_ok=True)
    (path / "tokenizer").mkdir(exist_ok=True)
    (path / "config.json").write_text(
        text_of({"format": "fps_jax", "version": 1, "config": json.loads(json.dumps(tiny_config().to_dict())), **noted})
    )
    with pytest.raises(TOLD, match="ours"), soon():
        to_torch(path, folder / "out", "diffusers")
