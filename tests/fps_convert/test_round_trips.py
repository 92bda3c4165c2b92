"""To ours and back, in every direction: each tensor comes back bit for bit."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from fps_convert import open_checkpoint, to_flax, to_torch
from fps_convert.formats.pth import PthFile
from fps_convert.formats.writers import Output, write_pth
from fps_convert.synthetic import tiny_config, write_checkpoint
from fps_jax.checkpoints.format import SAMPLING, abstract_component, load_component, read_config, read_manifest
from fps_jax.config import SamplingDefaults
from fps_jax.models.params import flatten
from tests.checkpoints import T2V
from tests.fps_convert.tensors import read_all, rewrite

LAYOUTS = ("official", "diffusers")
BF16 = {"dit": "BF16", "text_encoder": "BF16", "image_encoder": "F16"}


def same_arrays(a, b) -> bool:
    a, b = dict(flatten(a)), dict(flatten(b))
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_comes_back_bit_for_bit(pristine, tmp_path, layout, task):
    source = pristine(layout, task, dtypes=BF16)
    audit = to_flax(source, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back", layout)
    assert read_all(tmp_path / "back") == read_all(source)
    listed = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    assert {
        str(file.relative_to(tmp_path / "back")) for file in (tmp_path / "back").rglob("*") if file.is_file()
    } == listed
    assert read_config(tmp_path / "ours") == open_checkpoint(source).config
    for part in audit["components"].values():
        assert part["missing"] == part["extra"] == part["left_out"] == part["dtype_changes"] == []
        assert part["used"] == part["source_tensors"] == len(part["tensors"])
    assert json.loads((tmp_path / "ours" / "audit.json").read_text()) == audit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_of_a_model_s_own_go_along(tmp_path, layout):
    """What its videos are by default, and how many tokens it reads, which diffusers leaves to a pipeline's argument."""
    own = SamplingDefaults(height=48, width=64, num_frames=17, negative_prompt="")
    config = tiny_config()
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, text_len=20), sampling=own)
    write_checkpoint(tmp_path / "torch", config, layout=layout)
    to_flax(tmp_path / "torch", tmp_path / "ours")
    assert read_config(tmp_path / "ours") == config
    to_torch(tmp_path / "ours", tmp_path / "back", layout)
    assert open_checkpoint(tmp_path / "back").config == config


@pytest.mark.parametrize("text", ['{"height": 0}', '{"depth": 3}', "[]", "{"])
def test_sizes_that_are_damaged_are_refused(pristine, tmp_path, text):
    shutil.copytree(pristine("official", "t2v"), tmp_path / "torch")
    (tmp_path / "torch" / SAMPLING).write_text(text)
    with pytest.raises(ValueError, match=SAMPLING):
        open_checkpoint(tmp_path / "torch")


@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v"])
def test_layouts_convert_into_each_other(pristine, tmp_path, task):
    """Official -> ours -> diffusers -> ours -> official, and the parameters are the same all the way."""
    source = pristine("official", task, dtypes=BF16)
    to_flax(source, tmp_path / "a")
    to_torch(tmp_path / "a", tmp_path / "diffusers", "diffusers")
    assert not (tmp_path / "diffusers" / SAMPLING).exists()  # Wan's own sizes need no file
    to_flax(tmp_path / "diffusers", tmp_path / "b")
    to_torch(tmp_path / "b", tmp_path / "official", "official")
    assert read_all(tmp_path / "official") == read_all(source)
    for component in read_manifest(tmp_path / "a")["components"]:
        assert same_arrays(load_component(tmp_path / "a" / component), load_component(tmp_path / "b" / component))
    there = open_checkpoint(tmp_path / "diffusers").config
    assert there.dit == open_checkpoint(source).config.dit
    assert there.image_encoder == open_checkpoint(source).config.image_encoder


def test_upstream_files_of_both_layouts_hold_the_same_parameters(tmp_path):
    """A .pth that torch wrote and the safetensors that transformers wrote, of one text encoder."""
    diffusers = tmp_path / "diffusers"
    shutil.copytree(T2V, diffusers)
    to_flax(diffusers, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "official", "official")
    name = "models_t5_umt5-xxl-enc-bf16.pth"
    want = read_all(T2V.parent / "convert")[name]
    assert read_all(tmp_path / "official")[name] == want
    shutil.copy(T2V.parent / "convert" / name, tmp_path / "official" / name)
    a, b = open_checkpoint(tmp_path / "official"), open_checkpoint(diffusers)
    assert same_arrays(a.load("text_encoder"), b.load("text_encoder"))


def test_load_is_what_was_saved(pristine, tmp_path):
    source = open_checkpoint(pristine("official", "i2v", dtypes=BF16))
    to_flax(source.path, tmp_path / "ours")
    for component in source.components:
        loaded = source.load(component)
        assert same_arrays(load_component(tmp_path / "ours" / component, expected=loaded), loaded)
    abstract = abstract_component(tmp_path / "ours" / "dit")
    assert abstract["blocks"]["mlp"]["up"]["kernel"].shape == (2, 48, 64)
    assert abstract["blocks"]["mlp"]["up"]["kernel"].dtype == ml_dtypes.bfloat16


def test_layers_are_in_their_places(pristine):
    source = pristine("diffusers")
    tensors = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    stacked = open_checkpoint(source).load("dit")["blocks"]["self_attn"]["q"]["kernel"]
    for i in range(2):
        np.testing.assert_array_equal(stacked[i], tensors[f"blocks.{i}.attn1.to_q.weight"].T)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_casts_all_but_the_vae_to_nearest(pristine, tmp_path, dtype):
    source = pristine("official", "i2v")
    audit = to_flax(source, tmp_path / "ours", dtype=dtype)
    original = open_checkpoint(source)
    for component in original.components:
        want = dict(flatten(original.load(component)))
        got = dict(flatten(load_component(tmp_path / "ours" / component)))
        kind = np.dtype("float32" if component == "vae" else dtype)
        assert {leaf.dtype for leaf in got.values()} == {kind}
        for path, leaf in got.items():
            np.testing.assert_array_equal(leaf, want[path].astype(kind))
        changed = audit["components"][component]["dtype_changes"]
        assert len(changed) == (0 if kind == np.float32 else len(got))
    assert same_arrays(original.load("dit", dtype), load_component(tmp_path / "ours" / "dit"))


def test_layers_of_different_dtypes_come_back_as_they_were(source, tmp_path):
    path = source("diffusers")
    key = "blocks.1.attn1.to_q.weight"

    def change(tensors):
        tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)
        tensors["blocks.1.ffn.net.2.weight"] = tensors["blocks.1.ffn.net.2.weight"].astype(np.float16)

    rewrite(path / "transformer" / "diffusion_pytorch_model.safetensors", change)
    audit = to_flax(path, tmp_path / "ours")
    changes = audit["components"]["dit"]["dtype_changes"]
    assert {"parameter": "blocks/self_attn/q/kernel", "from": ["BF16", "F32"], "to": "F32"} in changes
    to_torch(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert read_all(tmp_path / "back") == read_all(path)
    assert read_all(tmp_path / "back")["transformer"][key][0] == "BF16"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_read_like_one_file(pristine, tmp_path, layout):
    whole, shards = pristine(layout, "i2v"), pristine(layout, "i2v", shard_bytes=200_000)
    folder = shards if layout == "official" else shards / "transformer"
    assert len(list(folder.glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert read_all(shards) == read_all(whole)
    assert same_arrays(open_checkpoint(shards).load("dit"), open_checkpoint(whole).load("dit"))
    to_flax(shards, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back", layout)
    assert read_all(tmp_path / "back") == read_all(whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_i2v_without_an_image_tower_converts(pristine, tmp_path, layout):
    source = pristine(layout, "i2v", config={"image_encoder": None})
    audit = to_flax(source, tmp_path / "ours")
    assert any("image_embeds" in note for note in audit["notes"])
    config = read_config(tmp_path / "ours")
    assert (config.task, config.image_encoder, config.dit.image_dim) == ("i2v", None, 80)
    to_torch(tmp_path / "ours", tmp_path / "back", layout)
    assert read_all(tmp_path / "back") == read_all(source)


def test_parts_that_wan_never_uses_are_listed_and_left_out(source, tmp_path):
    path = source("diffusers", "i2v")
    file = path / "image_encoder" / "model.safetensors"
    rewrite(file, lambda t: t.update({"visual_projection.weight": np.zeros((8, 80), np.float32)}))
    audit = to_flax(path, tmp_path / "ours")
    assert audit["components"]["image_encoder"]["left_out"] == ["visual_projection.weight"]
    to_torch(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert "visual_projection.weight" not in read_all(tmp_path / "back")["image_encoder"]


def test_clips_text_tower_is_listed_and_left_out(source, tmp_path):
    path = source("official", "i2v")
    file = path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    reader = PthFile(file)
    outputs = [Output(k, i.shape, i.dtype, lambda k=k: reader.read(k)) for k, i in reader.tensors.items()]
    outputs += [Output(k, (3,), "F32", lambda: np.zeros(3, np.float32)) for k in ("textual.head.0.weight", "log_scale")]
    write_pth(tmp_path / "whole.pth", outputs, lambda _: None)
    (tmp_path / "whole.pth").replace(file)
    audit = to_flax(path, tmp_path / "ours")
    assert audit["components"]["image_encoder"]["left_out"] == ["log_scale", "textual.head.0.weight"]
    to_torch(tmp_path / "ours", tmp_path / "back", "official")
    want = read_all(path)[file.name]
    del want["textual.head.0.weight"], want["log_scale"]
    assert read_all(tmp_path / "back")[file.name] == want


def test_the_projection_of_an_official_tower_is_kept_and_told_where_diffusers_has_none(pristine, tmp_path):
    tower = dataclasses.replace(tiny_config("i2v").image_encoder, projection_dim=8)
    source = pristine("official", "i2v", config={"image_encoder": tower})
    to_flax(source, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "official", "official")
    assert read_all(tmp_path / "official") == read_all(source)
    report = to_torch(tmp_path / "ours", tmp_path / "diffusers", "diffusers")
    assert report["notes"][0] == "projection has no tensor in the diffusers layout and is left out"
    assert open_checkpoint(tmp_path / "diffusers").config.image_encoder == dataclasses.replace(
        tower, projection_dim=None
    )


def test_clip_files_without_the_prefix_of_transformers_4_come_back_without_it(source, tmp_path):
    path = source("diffusers", "i2v")

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("vision_model.")] = tensors.pop(key)

    want = open_checkpoint(path).load("image_encoder")
    rewrite(path / "image_encoder" / "model.safetensors", strip)
    assert same_arrays(open_checkpoint(path).load("image_encoder"), want)
    to_flax(path, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert read_all(tmp_path / "back") == read_all(path)


@pytest.mark.parametrize("both", [True, False])
def test_a_tied_text_embedding_comes_back_under_the_same_names(source, tmp_path, both):
    path = source("diffusers")

    def tie(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] if both else tensors.pop("shared.weight")

    rewrite(path / "text_encoder" / "model.safetensors", tie)
    audit = to_flax(path, tmp_path / "ours")
    assert "shared.weight" in audit["components"]["text_encoder"]["notes"][0]
    to_torch(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert read_all(tmp_path / "back") == read_all(path)


@pytest.mark.parametrize(
    ("layout", "task", "shift", "shift_480p"),
    [("official", "t2v", 5.0, None), ("official", "i2v", 5.0, 3.0), ("official", "flf2v", 16.0, None)],
)
def test_official_flow_shift_goes_by_the_task(pristine, layout, task, shift, shift_480p):
    config = open_checkpoint(pristine(layout, task)).config
    assert (config.flow_shift, config.flow_shift_480p) == (shift, shift_480p)


@pytest.mark.parametrize(
    "scheduler", [{"flow_shift": 7.5}, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.5}]
)
def test_diffusers_flow_shift_is_the_schedulers(source, scheduler):
    path = source("diffusers", "i2v")
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    assert open_checkpoint(path).config.flow_shift == 7.5


@pytest.mark.parametrize(
    ("source_layout", "task", "layout", "words"),
    [
        ("diffusers", "t2v", "official", "flow_shift=7.5 has no place in the official layout, which means 5"),
        (
            "official",
            "i2v",
            "diffusers",
            "flow_shift=5 (3 up to 480 x 832) has no place in the diffusers layout, which means 5",
        ),
        ("official", "t2v", "diffusers", None),
        ("official", "i2v", "official", None),
    ],
)
def test_a_flow_shift_that_a_layout_cannot_say_is_noted(source, tmp_path, source_layout, task, layout, words):
    path = source(source_layout, task)
    if source_layout == "diffusers":
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 7.5}))
    to_flax(path, tmp_path / "ours")
    notes = [note for note in to_torch(tmp_path / "ours", tmp_path / "back", layout)["notes"] if "flow_shift" in note]
    assert notes == ([] if words is None else [f"{words}; give it when you sample"])


def test_fastwans_way_of_sampling_goes_along(source, tmp_path):
    """`_class_name` is all that FastVideo's folders say of it; the official layout has no place for that."""
    path = source("diffusers")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    to_flax(path, tmp_path / "ours")
    assert open_checkpoint(path).config.preset == read_config(tmp_path / "ours").preset == "dmd"
    assert not to_torch(tmp_path / "ours", tmp_path / "back", "diffusers")["notes"]
    assert open_checkpoint(tmp_path / "back").config.preset == "dmd"
    notes = to_torch(tmp_path / "ours", tmp_path / "official", "official")["notes"]
    assert "preset='dmd' has no place in the official layout; give it when you sample" in notes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_task_goes_by_the_tensors_and_not_by_names(source, layout):
    path = source(layout, "flf2v")
    if layout == "diffusers":
        index = json.loads((path / "model_index.json").read_text()) | {"_class_name": "WanPipeline"}
        (path / "model_index.json").write_text(json.dumps(index))
    else:
        config = json.loads((path / "config.json").read_text()) | {"model_type": "t2v", "_class_name": "X"}
        (path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(path.rename(path.parent / "Wan-T2V-Diffusers")).config.task == "flf2v"


def test_sizes_that_no_file_states_come_from_shapes(pristine):
    want = tiny_config("flf2v")
    got = open_checkpoint(pristine("official", "flf2v")).config
    assert (got.vae, got.text_encoder, got.dit) == (want.vae, want.text_encoder, want.dit)
    assert got.image_encoder == want.image_encoder


def test_tokenizer_files_are_copied_as_they_are(pristine, tmp_path):
    to_flax(pristine("official"), tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back", "diffusers")
    for file in (T2V / "tokenizer").iterdir():
        assert (tmp_path / "back" / "tokenizer" / file.name).read_bytes() == file.read_bytes()
