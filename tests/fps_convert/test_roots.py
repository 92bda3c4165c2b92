"""Self-Forcing's and CausVid's `.pt`: several models under names, wrappers in keys, no VAE, no settings; read and written again."""

import dataclasses
import json
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import fps_convert.cli
from fps_convert import to_flax, to_torch
from fps_convert.formats.pth import PthFile
from fps_convert.layouts import OFFICIAL
from fps_convert.report import lost_causal
from fps_convert.single_files import Given
from fps_convert.synthetic import tiny_config
from fps_jax import FPSSchedule, Regime
from fps_jax.causal import CAUSAL_PRESETS, CausalConfig
from fps_jax.checkpoints.format import load_component, read_config, read_manifest
from fps_jax.checkpoints.open import open_model_files
from tests.fps_convert.failing import fails, snapshot
from tests.fps_convert.pth_files import pth, storage, tensor
from tests.fps_convert.test_round_trips import same_arrays
from tests.fps_convert.test_single_files import DIT

_KINDS = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage"}


def write_roots(path, roots):
    """A .pt of {root: {key: array}}, pickled by another writer than the converter's; {key: array} for a file without roots."""
    records = {}

    def stored(array):
        name = str(len(records))
        records[name] = array.tobytes()
        strides = tuple(s // array.itemsize for s in array.strides)
        return tensor(storage(_KINDS[array.dtype.name], name, array.size), 0, array.shape, strides)

    content = {
        name: {key: stored(array) for key, array in value.items()}
        if isinstance(value, dict)
        else stored(value)
        if isinstance(value, np.ndarray)
        else value
        for name, value in roots.items()
    }
    return pth(path, content, records)


def wrapped(key: str) -> str:
    """A key as FSDP and activation checkpointing leave it in the moving average's shadows."""
    block, _, rest = key.removeprefix("blocks.").partition(".")
    inner = (
        f"blocks.{block}._fsdp_wrapped_module._checkpoint_wrapped_module.{rest}" if key.startswith("blocks.") else key
    )
    return f"model._fsdp_wrapped_module.{inner}"


@pytest.fixture(scope="module")
def base(pristine):
    return pristine("official")


@pytest.fixture(scope="module")
def models(base):
    """By root: arrays under official keys, no two roots alike."""
    weights = load_file(base / DIT)
    rng = np.random.default_rng(0)

    def other(dtype):
        return {key: rng.standard_normal(x.shape, np.float32).astype(dtype) for key, x in weights.items()}

    roots = {"generator": ml_dtypes.bfloat16, "critic": np.float32, "generator_ema": np.float32}
    return {name: other(np.dtype(dtype)) for name, dtype in roots.items()}


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """What Self-Forcing's trainer saves after its moving average began."""
    keys = {"generator": "model.{}".format, "critic": "model.{}".format, "generator_ema": wrapped}
    content = {root: {keys[root](key): x for key, x in weights.items()} for root, weights in models.items()}
    return write_roots(tmp_path_factory.mktemp("trained") / "model.pt", content)


@pytest.fixture(scope="module")
def ours(base, trained, tmp_path_factory):
    """Converted once."""
    path = tmp_path_factory.mktemp("converted") / "ours"
    to_flax(base, path, given=Given(dit=trained), preset="causvid-4")
    return path


def same(file, root: str, weights) -> bool:
    """Whether a .pt is {root: weights under 'model.'}, bit for bit, and nothing else."""
    reader = PthFile(file)
    want = {f"model.{key}": x for key, x in weights.items()}
    return (reader.root, reader.roots) == (root, (root,)) and reader.tensors.keys() == want.keys() and all(
        (reader.read(key).dtype, reader.read(key).shape, reader.read(key).tobytes()) == (x.dtype, x.shape, x.tobytes())
        for key, x in want.items()
    )  # fmt: skip


def convert(capsys, *argv) -> str:
    """What `fps-convert *argv` prints, where it ends well."""
    with pytest.raises(SystemExit) as stop:
        fps_convert.cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert not stop.value.code, captured.err
    return captured.out


@pytest.mark.parametrize("root", [None, "generator"])
def test_a_root_comes_back_bit_for_bit(base, trained, models, tmp_path, capsys, root):
    """The moving average where none is named; in the names of its file, without the wrappers."""
    chosen = [] if root is None else ["--root", root]
    argv = ("to-flax", "--base", base, "--dit", trained, "--preset", "self-forcing", *chosen, tmp_path / "ours")
    out, wanted = convert(capsys, *argv), root or "generator_ema"
    assert f"note: dit: {wanted!r} is read, of critic, generator, generator_ema in model.pt" in out
    assert ("keys have a trainer's wrappers" in out) == (wanted == "generator_ema")
    assert read_config(tmp_path / "ours").causal == CAUSAL_PRESETS["self-forcing"]
    out = convert(capsys, "to-torch", tmp_path / "ours", tmp_path / "back.pt", "--layout", "self-forcing")
    assert (
        "note: how the model makes its blocks has no place in the self-forcing layout; when it is read again, give --p"
        in out
    )
    assert same(tmp_path / "back.pt", wanted, models[wanted])
    with zipfile.ZipFile(tmp_path / "back.pt") as archive:
        assert archive.testzip() is None
        assert "back/data.pkl" in archive.namelist()
    assert "back.pt.audit.json" in {file.name for file in tmp_path.iterdir()}
    report = to_flax(base, tmp_path / "again", given=Given(dit=tmp_path / "back.pt"))
    assert report["components"]["dit"]["used"] == len(models[wanted])


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_base_of_either_layout_says_the_heads(pristine, trained, tmp_path, layout):
    """No shape says them, and a guess would be two."""
    dit = dataclasses.replace(tiny_config().dit, num_heads=4)
    given = Given(dit=trained, root="generator")
    to_flax(pristine(layout, config={"dit": dit}), tmp_path / "ours", given=given, preset="causvid-3")
    config = read_config(tmp_path / "ours")
    assert (config.dit, config.causal) == (dit, CAUSAL_PRESETS["causvid-3"])


def test_a_base_may_be_in_our_format(base, trained, ours, models, tmp_path):
    """The rest of it is copied; the result is what comes of the torch directory."""
    to_flax(base, tmp_path / "plain")
    report = to_flax(tmp_path / "plain", tmp_path / "causal", given=Given(dit=trained), preset="causvid-4")
    assert read_config(tmp_path / "causal") == read_config(ours)
    for name in ("dit", "vae", "text_encoder"):
        assert same_arrays(load_component(tmp_path / "causal" / name), load_component(ours / name))
    assert f"vae is copied from {tmp_path / 'plain'}" in report["notes"]
    assert (tmp_path / "causal" / "tokenizer" / "tokenizer.json").exists()
    to_torch(tmp_path / "causal", tmp_path / "back.pt", "self-forcing")
    assert same(tmp_path / "back.pt", "generator_ema", models["generator_ema"])
    other = Given(dit=trained, root="generator")  # a causal model is a base too, and its root and its blocks don't stay
    report = to_flax(tmp_path / "causal", tmp_path / "again", given=other)
    assert any("makes its blocks isn't taken over to another DiT: say it with --preset" in n for n in report["notes"])
    assert read_config(tmp_path / "again").causal is None
    assert read_manifest(tmp_path / "again")["spelling"]["root"] == "generator"


def test_a_base_in_our_format_of_another_model_is_refused(pristine, trained, tmp_path, capsys):
    to_flax(pristine("official", "i2v"), tmp_path / "i2v")
    to_flax(
        pristine("diffusers", config={"dit": dataclasses.replace(tiny_config().dit, num_layers=3)}), tmp_path / "deep"
    )
    before = snapshot(tmp_path)
    for base, message in (
        (
            "i2v",
            "is a t2v model that reads text of width 24, and {} is a i2v model of 24; give the directory of the model",
        ),
        ("deep", "{} is of a DiT with num_layers=3, and {trained} has 2; give the directory of the model"),
    ):
        argv = ("to-flax", "--base", tmp_path / base, "--dit", trained, "--preset", "self-forcing", tmp_path / "ours")
        assert message.format(tmp_path / base, trained=trained) in fails(capsys, *argv)
        assert snapshot(tmp_path) == before


def test_a_converted_model_needs_no_preset(ours):
    from fps_jax import CausalPipeline

    assert CausalPipeline.from_pretrained(ours, dtype="float32").causal == CAUSAL_PRESETS["causvid-4"]


@pytest.mark.parametrize(
    ("roots", "wanted"),
    [
        ({"generator": "model.{}"}, "generator"),  # CausVid's
        ({"model": "model.{}"}, "model"),  # an ODE initialisation
        ({"student": "{}"}, "student"),  # the only one
        (
            {"critic": "model.{}", "generator": "model._orig_mod.{}", "optimizer": [], "step": 600, "note": "x"},
            "generator",
        ),
    ],
)
def test_other_files_name_their_models_otherwise(base, models, tmp_path, roots, wanted):
    weights = models["generator"]
    content = {
        name: {keys.format(key): x for key, x in weights.items()} if "{}" in str(keys) else keys
        for name, keys in roots.items()
    }
    file = write_roots(tmp_path / "causal.pt", content)
    to_flax(base, tmp_path / "ours", given=Given(dit=file))
    to_torch(tmp_path / "ours", tmp_path / "back.pt", "self-forcing")
    reader = PthFile(tmp_path / "back.pt")
    assert reader.root == wanted
    assert set(reader.tensors) == {roots[wanted].replace("_orig_mod.", "").format(key) for key in models["generator"]}


def test_single_files_take_a_root_too(base, trained, models):
    """The door that WanPipeline.from_files goes through."""
    files = {
        "vae": base / OFFICIAL.places["vae"].file,
        "text_encoder": base / OFFICIAL.places["text_encoder"].file,
        "tokenizer": base / OFFICIAL.tokenizer,
    }
    for root in ("generator_ema", "critic"):
        model = open_model_files(dit=trained, root=root, **files)
        got = model.load("dit", np.float32)["patch_embedding"]["bias"]
        assert np.array_equal(np.asarray(got), models[root]["patch_embedding.bias"])
    assert any("'generator_ema' is read, of" in note for note in open_model_files(dit=trained, **files).notes)


def test_a_model_that_came_otherwise_is_written_as_a_generator(base, tmp_path):
    to_flax(base, tmp_path / "ours")
    report = to_torch(tmp_path / "ours", tmp_path / "new.pt", "self-forcing")
    assert same(tmp_path / "new.pt", "generator", load_file(base / DIT))
    assert report["notes"] == [
        "self-forcing files hold the DiT alone: vae, text_encoder and the tokenizer are left out"
    ]
    FPSSchedule(regimes=(Regime(until=1.0),)).save(tmp_path / "ours" / "fps_schedule.json")
    report = to_torch(tmp_path / "ours", tmp_path / "trained.pt", "self-forcing")
    assert "the schedule that it was trained with has no place in it: keep" in report["notes"][-1]


def test_a_trainers_file_that_merely_lies_there_is_left_out(base, trained, tmp_path):
    """Which of its models is meant nobody has said."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in (DIT, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        shutil.copy(base / name, folder / name)
    shutil.copytree(base / "google", folder / "google")
    (folder / DIT).rename(folder / "wan.safetensors")
    shutil.copy(trained, folder / "trained.pth")
    report = to_flax(folder, tmp_path / "ours")
    assert (
        "trained.pth is left out: it holds critic, generator, generator_ema; give it with --dit FILE" in report["notes"]
    )


@pytest.mark.parametrize("name", [1, ""])
def test_a_root_is_a_text(models, tmp_path, name):
    path = write_roots(tmp_path / "odd.pt", {name: models["critic"], "critic": models["critic"]})
    with pytest.raises(ValueError, match="doesn't hold a state dict"):
        PthFile(path)


@pytest.mark.parametrize("layout", ["official", "diffusers", "comfyui"])
def test_other_layouts_say_that_blocks_are_not_kept(ours, tmp_path, layout):
    notes = to_torch(ours, tmp_path / "torch", layout)["notes"]
    want = f"how the model makes its blocks has no place in the {layout} layout; when it is read again, give --preset causvid-4"
    assert want in notes


def test_blocks_of_no_preset_are_said_in_full():
    config = dataclasses.replace(tiny_config(), causal=CausalConfig(frames_per_block=2))
    (note,) = lost_causal(config, OFFICIAL)
    assert "say it again: CausalConfig(frames_per_block=2, steps=" in note


def test_roots_that_are_not_there_are_told_with_those_that_are(base, trained, models, tmp_path, capsys):
    two = {"a": {"x": np.ones(2, np.float32)}, "b": {"x": np.ones(2, np.float32)}}
    unknown = write_roots(tmp_path / "unknown.pt", two)
    flat = write_roots(tmp_path / "flat.pt", {f"model.{key}": x for key, x in models["generator"].items()})
    before = snapshot(tmp_path)
    for argv, message in (
        (("--base", base, "--dit", trained, "--root", "ema"), "root='ema' is not in {trained}, which has critic, generator, gen"),
        (("--base", base, "--dit", flat, "--root", "generator"), "flat.pt is one state dict, without roots; leave it out"),
        (("--base", base, "--dit", base / DIT, "--root", "generator"), "is one state dict, without roots; leave it out"),
        (("--base", base, "--dit", unknown), "unknown.pt holds several state dicts: a, b; say which with --root"),
        (("--base", base, "--root", "generator"), "root='generator' is of the DiT's file, and none is given; give --dit FILE"),
        (("--base", base, "--dit", unknown, "--root", "a"), "unknown.pt is no part of a Wan2.1 model, not a dit of Wan2.1"),
        (("--dit", trained), "only one path was given, and no --vae, --text-encoder; give SRC (--base) and DST"),
        (("--base", base, "--dit", trained, "elsewhere"), "2 paths were given with --base, which is SRC; give DST alone"),
    ):  # fmt: skip
        assert message.format(trained=trained) in fails(capsys, "to-flax", *argv, tmp_path / "ours")
        assert snapshot(tmp_path) == before
    to_flax(base, tmp_path / "ours", given=Given(dit=flat))  # without a root it is read as ever
    assert "root" not in read_manifest(tmp_path / "ours")["spelling"]


def damaged(weights, change):
    keys = {f"model.{key}": x for key, x in weights.items()}
    change(keys)
    return {"generator": keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("model.head.head.bias"), "lacks tensor 'head.head.bias'"),
        (lambda d: d.update({"model.blocks.0.gate": np.ones(2, np.float32)}), "has tensor 'blocks.0.gate', which this dit"),
        (lambda d: d.update({"epoch": np.ones(2, np.float32)}), "has tensor 'epoch', which this dit doesn't use"),
        (
            lambda d: d.update({"model._fsdp_wrapped_module.head.head.bias": np.ones(2, np.float32)}),
            "has tensor 'model.head.head.bias' twice, with and without a trainer's wrappers",
        ),
        (lambda d: d.update({"model.img_emb.proj.0.weight": np.ones(2, np.float32)}), "image"),
    ],
)  # fmt: skip
def test_every_key_counts(base, models, tmp_path, capsys, change, message):
    file = write_roots(tmp_path / "bad.pt", damaged(models["generator"], change))
    before = snapshot(tmp_path)
    assert message in fails(capsys, "to-flax", "--base", base, "--dit", file, tmp_path / "ours")
    assert snapshot(tmp_path) == before


def test_a_preset_of_another_model_is_refused(pristine, base, trained, tmp_path, capsys):
    small = tiny_config().dit
    wide = pristine("official", config={"dit": dataclasses.replace(small, dim=1552, num_heads=1, num_layers=1)})
    deep = pristine("diffusers", config={"dit": dataclasses.replace(small, num_layers=3)})
    for argv, message in (
        ((pristine("official", "i2v"),), "preset='self-forcing' is of Wan2.1-T2V-1.3B, and {} is a i2v model; leave it out"),
        ((wide,), "preset='self-forcing' is of Wan2.1-T2V-1.3B, and this DiT has 1 layers of width 1552; leave it out, and"),
        (("--base", deep, "--dit", trained), "is of a DiT with num_layers=3, and {1} has 2; give the directory of the model"),
        (("--base", pristine("official", "i2v"), "--dit", trained), "is of a DiT with in_channels=36, and {1} has 16; give the"),
    ):  # fmt: skip
        told = fails(capsys, "to-flax", "--preset", "self-forcing", *argv, tmp_path / "ours")
        assert message.format(argv[0], trained) in told
        assert not list(tmp_path.iterdir())


def test_destinations_that_no_file_can_be(pristine, ours, tmp_path, capsys):
    shutil.copytree(ours, tmp_path / "ours")
    to_flax(pristine("official", "i2v"), tmp_path / "i2v")
    (tmp_path / "there.pt").write_bytes(b"what was there")
    (tmp_path / "folder.pt").mkdir()
    before = snapshot(tmp_path)
    for src, dst, message in (
        ("ours", "out", "out is one file in layout='self-forcing'; give a name that ends in .pt"),
        ("ours", "there.pt", "there.pt exists; give another or --overwrite"),
        ("ours", "folder.pt", "folder.pt is a directory, and layout='self-forcing' is one file; give a name"),
        ("ours", "nowhere/out.pt", "its folder doesn't exist; make it first"),
        ("ours", "ours/out.pt", "overlap; give a destination outside the source"),
        ("i2v", "out.pt", "is a i2v model; layout='self-forcing' is of t2v models"),
    ):
        argv = ("to-torch", tmp_path / src, tmp_path / dst, "--layout", "self-forcing")
        assert message in fails(capsys, *argv)
        assert snapshot(tmp_path) == before
    bfloat16 = fails(
        capsys, "to-torch", tmp_path / "ours", tmp_path / "o.pt", "--layout", "self-forcing", "--dtype", "bfloat16"
    )
    assert "dtype='bfloat16' with layout='self-forcing'" in bfloat16
    to_torch(tmp_path / "ours", tmp_path / "there.pt", "self-forcing", overwrite=True)
    assert PthFile(tmp_path / "there.pt").root == "generator_ema"


@pytest.mark.parametrize("spelling", [{"root": 3}, {"root": "a" * 201}, {"root_prefix": None}, {"root": "\ud800"}])
def test_notes_on_roots_that_are_none_are_refused(ours, tmp_path, spelling):
    shutil.copytree(ours, tmp_path / "ours")
    manifest = read_manifest(tmp_path / "ours") | {"spelling": spelling}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="mixed_dtypes or spelling aren't what fps-convert writes"):
        to_torch(tmp_path / "ours", tmp_path / "out.pt", "self-forcing")
    assert not (tmp_path / "out.pt").exists()
