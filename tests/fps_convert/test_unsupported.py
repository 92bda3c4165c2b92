"""Models of Wan's family that aren't supported are told by name, and never with advice to remove what they learned."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fps_convert import open_checkpoint
from fps_convert.formats.writers import Output, write_pth
from fps_convert.single_files import Given
from tests.fps_convert.failing import fails
from tests.fps_convert.tensors import rewrite
from tests.fps_convert.test_round_trips import same_arrays

DIT = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def refused(capsys, tmp_path):
    def check(source, *parts):
        message = fails(capsys, "to-flax", source, tmp_path / "out")
        for part in parts:
            assert part in message.replace(str(source), "SRC"), message
        assert "remove" not in message

    return check


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("vace_blocks.0.before_proj.weight", "a VACE model"),
        ("blocks.0.to_gate_compress.weight", "trained with another attention (FastVideo's VSA"),
        ("control_adapter.conv.weight", "a control model"),
        ("ref_conv.weight", "a control model"),
        ("blocks.1.cam_encoder.weight", "a control model"),
        ("face_adapter.fuser_blocks.0.q_norm.weight", "Wan2.2 Animate"),
        ("casual_audio_encoder.weights", "driven by sound"),
        ("fps_embedding.weight", "SkyReels-V2"),
        ("blocks.0.self_attn.q.weight.absmax", "quantized by bitsandbytes"),
    ],
)
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_dit_with_other_parts_is_told_by_them(source, refused, layout, key, part):
    path = source(layout)
    file = path / DIT if layout == "official" else path / "transformer" / DIT
    rewrite(file, lambda t: t.update({key: np.zeros((3, 3), np.float32)}))
    refused(path, part, repr(key), "supported are Wan2.1 T2V, I2V and FLF2V")


def test_both_layouts_of_wan22_are_told(source, refused, tmp_path):
    path = source("official")
    for name in ("high_noise_model", "low_noise_model"):
        (path / name).mkdir()
        for file in (DIT, "config.json"):
            shutil.copy(path / file, path / name)
    refused(path, "a Wan2.2 checkpoint (it has a high_noise_model)")
    for file in (DIT, "config.json"):
        (path / file).unlink()
    refused(path, "a Wan2.2 checkpoint (it has a high_noise_model)")
    shutil.rmtree(path)
    path = source("diffusers")
    shutil.copytree(path / "transformer", path / "transformer_2")
    refused(path, "a Wan2.2 checkpoint (it has a transformer_2)")


def single(source, path, name="wan2.1_t2v.safetensors"):
    """The official checkpoint with its DiT as a file of another name."""
    made = source("official")
    (made / DIT).rename(made / name)
    (made / "config.json").unlink()
    return made


@pytest.mark.parametrize("name", ["wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "Wan2_2-T2V-LOW.safetensors"])
def test_single_files_of_wan22_are_told_by_name(source, refused, tmp_path, name):
    path = single(source, tmp_path, name)
    refused(path, f"{name} is a Wan2.2 model by its name")
    with pytest.raises(NotImplementedError, match=r"Wan2\.2 model by its name"):
        open_checkpoint(path, Given(dit=path / name))
    shutil.copy(path / name, path / "wan2.1_t2v.safetensors")  # and don't block another
    assert any("Wan2.2 model by its name" in note for note in open_checkpoint(path).audit["notes"])


def test_gguf_is_told(source, refused, tmp_path):
    path = single(source, tmp_path, "model.gguf")
    (path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    refused(path, "model.gguf is GGUF, which isn't supported")
    disguised = path / "model.safetensors"
    (path / "model.gguf").rename(disguised)
    with pytest.raises(NotImplementedError, match="is GGUF"):
        open_checkpoint(path, Given(dit=disguised))


def test_what_is_not_supported_is_told_of_the_file_itself(source, refused, tmp_path):
    for name, part in (
        ("model.gguf", "SRC is GGUF, which isn't supported"),
        ("wan2.2_t2v_high_noise.safetensors", "SRC is a Wan2.2 model by its name"),
    ):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(100) if "gguf" in name else bytes(100))
        refused(tmp_path / name, part)
    with pytest.raises(NotImplementedError, match=r"model\.gguf is GGUF"):
        open_checkpoint(source("official"), Given(text_encoder=tmp_path / "model.gguf"))
    (tmp_path / "source").rename(tmp_path / "high_noise_model")
    refused(tmp_path / "high_noise_model", "SRC is a part of a Wan2.2 checkpoint by its name")


def test_ti2v_5b_beside_the_vae_of_16_channels(source, refused):
    path = source("official")

    def wider(tensors):
        tensors["patch_embedding.weight"] = np.zeros((48, 48, 1, 2, 2), np.float32)
        tensors["head.head.weight"] = np.zeros((192, 48), np.float32)
        tensors["head.head.bias"] = np.zeros(192, np.float32)

    rewrite(path / DIT, wider)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"in_dim": 48, "out_dim": 48}))
    refused(path, "a DiT of 48 channels, as Wan2.2's TI2V-5B, beside a VAE of 16")
    (path / DIT).rename(path / "wan_5B.safetensors")
    refused(path, "a DiT of 48 channels, as Wan2.2's TI2V-5B, beside a VAE of 16")


def test_pipelines_that_sample_otherwise(source, refused):
    path = source("diffusers")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanCausalDMDPipeline"}))
    refused(path, "a causal few-step model (WanCausalDMDPipeline)")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16", "diffusion_pytorch_model.bf16"])
def test_files_of_a_variant_are_read(source, pristine, name):
    path = source("diffusers")
    (path / "transformer" / DIT).rename(path / "transformer" / f"{name}.safetensors")
    assert same_arrays(open_checkpoint(path).load("dit"), open_checkpoint(pristine("diffusers")).load("dit"))
    shutil.copy(
        path / "transformer" / f"{name}.safetensors", path / "transformer" / "diffusion_pytorch_model.x.safetensors"
    )
    with pytest.raises(ValueError, match="keep the one to be used"):
        open_checkpoint(path)
    shutil.copy(pristine("diffusers") / "transformer" / DIT, path / "transformer" / DIT)
    open_checkpoint(path)  # the plain one goes before its variants


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("diffusion_pytorch_model.fp16-{}.safetensors", "diffusion_pytorch_model.fp16.safetensors.index.json"),
        ("diffusion_pytorch_model-{}.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ],
)
def test_shards_of_a_variant_are_read(source, pristine, shard, index):
    path = source("diffusers", shard_bytes=60_000)
    folder = path / "transformer"
    old = json.loads((folder / f"{DIT}.index.json").read_text())
    names = {}
    for file in folder.glob("*-of-*.safetensors"):
        names[file.name] = shard.format(file.name.removesuffix(".safetensors").removeprefix("diffusion_pytorch_model-"))
        file.rename(folder / names[file.name])
    old["weight_map"] = {key: names[name] for key, name in old["weight_map"].items()}
    (folder / f"{DIT}.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing, and .* is a shard"):
        open_checkpoint(path)
    (folder / index).write_text(json.dumps(old))
    assert same_arrays(open_checkpoint(path).load("dit"), open_checkpoint(pristine("diffusers")).load("dit"))


def test_stray_files_beside_dont_block_a_checkpoint(source):
    path = source("official")
    (path / "RealESRGAN_x2.pth").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 50)
    lora = Output("blocks.0.self_attn.q.lora_A.weight", (4, 48), "F32", lambda: np.zeros((4, 48), np.float32))
    write_pth(path / "my_lora.pth", [lora], lambda _: None)
    save_file({"blocks.0.self_attn.q.lora_A.weight": np.zeros((4, 48), np.float32)}, path / "style.safetensors")
    notes = open_checkpoint(path).audit["notes"]
    assert any(note.startswith("RealESRGAN_x2.pth is left out: ") for note in notes)
    assert "my_lora.pth is no part of a Wan2.1 model and is left out" in notes


def test_a_dit_as_pth_isnt_taken_for_a_text_encoder(source):
    path = source("official")
    tensors = load_file(path / DIT)
    outputs = [Output(key, value.shape, "F32", lambda value=value: value) for key, value in tensors.items()]
    write_pth(path / "student.pth", outputs, lambda _: None)
    assert "student.pth is no part" in " ".join(open_checkpoint(path).audit["notes"])
