"""Bad input ends in one line that names file, value and fix, exit status 2, and leaves everything as it was."""

import json
import os
import pathlib
import shutil
import struct

import numpy as np
import pytest

from fps_convert import flax_to_torch, open_checkpoint, to_flax, to_torch
from fps_convert.source import Source
from tests.fps_convert.failing import fails, snapshot
from tests.fps_convert.tensors import rewrite

DIT = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def refused(capsys, tmp_path):
    """Converting `source` fails with a message of these parts, and nothing but `source` is there afterwards."""

    def check(source, *parts):
        before = snapshot(tmp_path)
        message = fails(capsys, "to-flax", source, tmp_path / "out")
        for part in parts:
            assert part in message, message
        assert snapshot(tmp_path) == before

    return check


def edit_json(file: pathlib.Path, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))


def test_sources_that_are_no_checkpoint(refused, tmp_path, pristine):
    refused(tmp_path / "nowhere", "nowhere doesn't exist", "give a Wan2.1 directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty is not a Wan checkpoint", "model_index.json", "diffusion_pytorch_model")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file is a file", "give the directory")
    shutil.copytree(pristine("diffusers") / "transformer", tmp_path / "alone")
    refused(tmp_path / "alone", "transformer/ folder of a diffusers checkpoint", "give the folder above")


def test_our_own_format_is_told(refused, pristine, tmp_path):
    to_flax(pristine("official"), tmp_path / "ours")
    refused(tmp_path / "ours", "already in this project's format")


@pytest.mark.parametrize(
    ("layout", "gone", "parts"),
    [
        ("official", "Wan2.1_VAE.pth", ["missing Wan2.1_VAE.pth"]),
        ("official", "models_t5_umt5-xxl-enc-bf16.pth", ["missing models_t5_umt5-xxl-enc-bf16.pth"]),
        ("official", "google", ["missing google/umt5-xxl/tokenizer.json (or spiece.model)"]),
        ("official", "config.json", ["config.json is missing"]),
        ("diffusers", "vae", ["missing vae/diffusion_pytorch_model.safetensors"]),
        ("diffusers", "transformer/config.json", ["transformer/config.json is missing"]),
        ("diffusers", "scheduler", ["missing scheduler/scheduler_config.json"]),
        ("diffusers", "tokenizer", ["missing tokenizer/tokenizer.json"]),
    ],
)
def test_a_missing_part_is_named(refused, source, layout, gone, parts):
    path = source(layout)
    shutil.rmtree(path / gone) if (path / gone).is_dir() else (path / gone).unlink()
    refused(path, *parts)


def test_a_dit_alone_lists_all_that_is_missing(refused, source):
    path = source("official")
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (path / name).unlink()
    refused(path, "Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda b: b[:-10], "truncated: the header describes"),
        (lambda b: b[: len(b) // 3], "truncated: the header describes"),
        (lambda b: b[:100], "the header should be"),
        (lambda b: b[:4], "the header should be"),
        (lambda b: b"", "is empty"),
        (lambda b: b + b"12345678", "longer than its header says"),
        (lambda b: b[:8] + b"\xff" * 20 + b[28:], "its header is not JSON"),
        (lambda b: struct.pack("<Q", 1 << 60) + b[8:], "the header should be 1152921504606846976 bytes long"),
        (lambda b: b.replace(b'"F32"', b'"F99"', 1), "unknown dtype 'F99'"),
        (lambda b: b.replace(b'"shape":[48', b'"shape":[49', 1), "can't have"),
        (lambda b: b.replace(b'"shape":[48', b'"shape":[-8', 1), "lacks a sound dtype, shape or data_offsets"),
        (lambda b: b.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1), "can't have"),
    ],
)
def test_damaged_safetensors_are_told(refused, source, change, part):
    path = source("official")
    data = (path / DIT).read_bytes()
    assert change(data) != data
    (path / DIT).write_bytes(change(data))
    refused(path, DIT, part)


def test_a_tensor_twice_in_a_header_or_two_in_one_place(refused, source):
    path = source("official")
    entry = '{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}'
    for text, part in (
        (f'{{"a":{entry % (1, 0, 4)},"a":{entry % (1, 4, 8)}}}', "'a' stands twice in the header"),
        (f'{{"a":{entry % (1, 0, 4)},"b":{entry % (2, 0, 8)}}}', "starts at byte"),
        ("[1]", "not a JSON object"),
    ):
        header = text.encode()
        (path / DIT).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
        refused(path, DIT, part)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_corrupt_json_is_told(refused, source, file):
    path = source("diffusers")
    (path / file).write_text('{"a": ')
    refused(path, file, "is not valid JSON")


@pytest.mark.parametrize(
    ("layout", "file", "key"),
    [
        ("official", DIT, "blocks.1.cross_attn.norm_q.weight"),
        ("diffusers", "transformer/" + DIT, "blocks.0.attn1.to_q.bias"),
        ("diffusers", "vae/" + DIT, "decoder.up_blocks.2.resnets.1.conv1.weight"),
        ("diffusers", "text_encoder/model.safetensors", "encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        ("diffusers", "image_encoder/model.safetensors", "vision_model.post_layernorm.bias"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(refused, source, layout, file, key):
    path = source(layout, "i2v")
    whole = (path / file).read_bytes()
    rewrite(path / file, lambda t: t.pop(key))
    refused(path, file, "lacks tensor", repr(key), "download it again")
    (path / file).write_bytes(whole)
    rewrite(path / file, lambda t: t.update({"surplus." + key: np.zeros(3, np.float32)}))
    refused(path, file, f"has tensor 'surplus.{key}'", "doesn't use")
    (path / file).write_bytes(whole)
    rewrite(path / file, lambda t: t.update({key: np.zeros((*t[key].shape, 2), np.float32)}))
    refused(path, file, repr(key), "has shape", "this model needs")


def test_a_misspelt_tensor_comes_with_the_name_that_is_near(refused, source):
    path = source("official")
    key = "blocks.1.self_attn.norm_q.weight"
    rewrite(path / DIT, lambda t: t.update({"blocks.1.self_attn.normq.weight": t.pop(key)}))
    refused(path, repr(key), "it has 'blocks.1.self_attn.normq.weight'")


def test_a_wrong_tensor_doesnt_pass_for_the_size_of_all(refused, source):
    """Sizes that no config holds go by most tensors: the odd one out is named, not the others."""
    path = source("official")
    rewrite(path / DIT, lambda t: t.update({"text_embedding.0.weight": np.zeros((48, 30), np.float32)}))
    refused(path, "text_encoder is 24 wide, the DiT reads 30")


def test_sizes_in_config_json_that_tensors_contradict(refused, source):
    path = source("official")
    edit_json(path / "config.json", ffn_dim=65)
    refused(path, "'blocks.0.ffn.0.weight' has shape [64, 48], this model needs [65, 48]")
    edit_json(path / "config.json", ffn_dim=64, num_layers=3)
    refused(path, "lacks tensor 'blocks.2.")
    edit_json(path / "config.json", num_layers="two")
    refused(path, "config.json: num_layers='two' should be of type int")
    edit_json(path / "config.json", num_layers=2, num_heads=None)
    refused(path, "num_heads=None")


def test_shards_that_disagree_with_their_index(refused, source, tmp_path):
    path = source("diffusers", shard_bytes=60_000) / "transformer"
    index = path / f"{DIT}.index.json"
    whole, root = index.read_text(), path.parent
    weight_map = json.loads(whole)["weight_map"]
    key, shard = next(iter(weight_map.items()))
    other = next(name for name in weight_map.values() if name != shard)
    edit_json(index, weight_map=weight_map | {"ghost": shard})
    refused(root, index.name, "places tensor 'ghost' in", "shards and index disagree")
    edit_json(index, weight_map={k: v for k, v in weight_map.items() if k != key})
    refused(root, shard, repr(key), "doesn't name it")
    edit_json(index, weight_map=weight_map | {key: other})
    refused(root, shard, repr(key), f"places it in {other}")
    edit_json(index, weight_map=weight_map | {key: "../../elsewhere.safetensors"})
    refused(root, "not a plain file name")
    edit_json(index, weight_map={})
    refused(root, index.name, "no weight_map")
    index.write_text(whole)
    shutil.copy(path / shard, path / "diffusion_pytorch_model-00099-of-00099.safetensors")
    refused(root, "00099-of-00099.safetensors is not named by")
    (path / "diffusion_pytorch_model-00099-of-00099.safetensors").unlink()
    (path / other).rename(tmp_path / "aside")
    refused(root, other, "is missing", "copy or download it again")
    (tmp_path / "aside").rename(path / other)
    index.unlink()
    refused(root, index.name, "is missing")


def test_a_pth_that_would_run_code_is_refused_and_nothing_ran(refused, source, tmp_path):
    import pickle
    import zipfile

    mark = tmp_path.parent / f"{tmp_path.name}.ran"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    path = source("official")
    with zipfile.ZipFile(path / "Wan2.1_VAE.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Payload()}, 2))
    refused(path, "Wan2.1_VAE.pth is refused", "system", "nothing was run")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("layout", "file", "changes", "part"),
    [
        ("official", "config.json", {"model_type": "vace"}, "VACE"),
        ("official", "config.json", {"in_dim": 36}, "no Wan2.1 T2V"),
        ("diffusers", "vae/config.json", {"is_residual": True}, "Wan2.2 VAE"),
        ("diffusers", "vae/config.json", {"patch_size": 2}, "Wan2.2 VAE"),
        ("diffusers", "vae/config.json", {"latents_mean": [0.0]}, "latents_mean has 1 entries"),
        ("diffusers", "model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "Wan2.2"),
        ("diffusers", "transformer/config.json", {"qk_norm": "rms_norm"}, "qk_norm='rms_norm'"),
        ("diffusers", "transformer/config.json", {"patch_size": 2}, "patch_size=2 should be a list"),
        ("diffusers", "text_encoder/config.json", {"dense_act_fn": "relu"}, "dense_act_fn='relu'"),
        ("diffusers", "image_encoder/config.json", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ("diffusers", "scheduler/scheduler_config.json", {"flow_shift": -1.0}, "flow_shift=-1.0 must be positive"),
        ("diffusers", "scheduler/scheduler_config.json", {"flow_shift": None}, "shift=None should be of type float"),
    ],
)
def test_other_models_are_told_apart(refused, source, layout, file, changes, part):
    task = "i2v" if layout == "diffusers" else "t2v"
    path = source(layout, task)
    if "flow_shift" in changes and changes["flow_shift"] is None:
        edit_json(path / file, flow_shift=None)
    else:
        edit_json(path / file, **changes)
    refused(path, part)


def test_dtypes_that_are_no_weights(refused, source):
    path = source("official")
    whole = (path / DIT).read_bytes()
    rewrite(path / DIT, lambda t: t.update({"head.head.bias": np.zeros(64, np.int64)}))
    refused(path, DIT, "'head.head.bias' has dtype I64", "F32, F16 or BF16")
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    entry = header["head.head.bias"]
    entry.update(dtype="F8_E4M3", shape=[256])
    data = json.dumps(header).encode()
    (path / DIT).write_bytes(struct.pack("<Q", len(data)) + data + whole[8 + length :])
    refused(path, "shape [256]")


def test_a_tied_embedding_that_differs(refused, source):
    path = source("diffusers")
    tied = "encoder.embed_tokens.weight"
    rewrite(path / "text_encoder/model.safetensors", lambda t: t.update({tied: t["shared.weight"] + 1}))
    refused(path, "text_encoder/model.safetensors", tied, "differs from 'shared.weight'")


def test_two_files_of_one_component(refused, source):
    path = source("official")
    shutil.copy(path / "Wan2.1_VAE.pth", path / "another.pth")
    (path / "Wan2.1_VAE.pth").rename(path / "a_vae.pth")
    refused(path, "has two for the vae: a_vae.pth and another.pth; keep one of them")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', "'a' lacks a sound dtype, shape or data_offsets"),
        ('{"a":{"dtype":"F32","shape":[' + "1," * 40 + '1],"data_offsets":[0,4]}}', "lacks a sound dtype, shape"),
        ('{"a":{"dtype":"F32","shape":[1' + "0" * 5000 + '],"data_offsets":[0,4]}}', "its header is not JSON"),
        ('{"__metadata__":{"num_heads":3}}', "its __metadata__ is not a JSON object of texts"),
        ("[" * 100_000, "its header is not JSON"),
        (
            '{"a":1,"b":' + '"' + "x" * 16_000_000 + '"}',
            "its header has 16,000,014 bytes, metadata included, more than the 16,000,000 that are read",
        ),
    ],
)
def test_headers_beyond_what_names_of_tensors_take(refused, source, text, part):
    path = source("official")
    (path / DIT).write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"\0" * 8)
    refused(path, DIT, part)


def test_metadata_of_some_megabytes_are_read(source):
    """Trainers keep the words of all captions there."""
    path = source("official")
    whole = (path / DIT).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length]) | {"__metadata__": {"ss_tag_frequency": "cat, " * 1_000_000}}
    text = json.dumps(header).encode()
    (path / DIT).write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    assert open_checkpoint(path).parts["dit"].nbytes


@pytest.mark.parametrize(
    ("layout", "file", "changes", "parts"),
    [
        ("official", "config.json", {"num_layers": 10**9}, ["config.json: num_layers=1000000000 is not a whole number in 1"]),
        ("official", "config.json", {"num_heads": 7}, ["config.json: dim=48 with num_heads=7"]),
        ("official", "config.json", {"eps": float("nan")}, ["config.json: eps=nan is not a finite number"]),
        ("diffusers", "vae/config.json", {"latents_std": [float("nan")] * 16}, ["vae/config.json: latents_std=nan is not a"]),
        ("diffusers", "image_encoder/config.json", {"num_attention_heads": 7}, ["image_encoder/config.json: dim=80 isn't"]),
        ("diffusers", "image_encoder/config.json", {"vision_config": [1]}, ["vision_config=[1] is not an object"]),
        ("diffusers", "scheduler/scheduler_config.json", {"flow_shift": 1e6}, ["flow_shift=1000000.0 must be positive and at"]),
        ("diffusers", "model_index.json", {"_class_name": ["WanPipeline"], "transformer_2": 3}, None),
    ],
)  # fmt: skip
def test_configs_are_held_against_one_set_of_rules(refused, source, tmp_path, layout, file, changes, parts):
    path = source(layout, "i2v" if layout == "diffusers" else "t2v")
    edit_json(path / file, **changes)
    if parts is None:  # odd, and without meaning: nothing is lost
        open_checkpoint(path)
    else:
        refused(path, *parts)


def test_a_tokenizer_of_more_words_than_the_table_has_rows(refused, source):
    path = source("official")
    file = path / "google" / "umt5-xxl" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 416, "content": "<more>"})
    file.write_text(json.dumps(content))
    refused(path, "google/umt5-xxl is another model's tokenizer: 417 words, and the text encoder's table has 416 rows")


def test_of_a_tokenizers_folder_its_own_files_are_copied_and_no_link_out_of_it(refused, source, tmp_path, monkeypatch):
    path = source("official")
    folder = path / "google" / "umt5-xxl"
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    to_flax(path, tmp_path / "ours")
    assert not (tmp_path / "ours" / "tokenizer" / "notes.txt").exists()
    (folder / "added_tokens.json").symlink_to(tmp_path / "secret")
    shutil.rmtree(tmp_path / "ours")
    with monkeypatch.context() as patch:  # told before the first component is written, not after the last
        patch.setattr(Source, "save", lambda *_: pytest.fail("a component was written"))
        refused(path, "added_tokens.json is a link to", "outside of its folder; put the file itself there")
    (folder / "added_tokens.json").unlink()
    to_flax(path, tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer" / "added_tokens.json").symlink_to(tmp_path / "secret")
    with monkeypatch.context() as patch:
        patch.setattr(flax_to_torch, "_write_component", lambda *_: pytest.fail("a component was written"))
        with pytest.raises(ValueError, match=r"added_tokens.json is a link to"):
            to_torch(tmp_path / "ours", tmp_path / "back", "official")
