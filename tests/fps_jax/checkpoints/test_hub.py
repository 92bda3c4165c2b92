"""Repositories of a hub that is a local folder: which of their files are fetched, and that none are of what isn't supported."""

import fnmatch
import json
import re
import shutil
import types

import huggingface_hub
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fps_convert.synthetic import tiny_config, write_checkpoint
from fps_jax.checkpoints.open import open_description, open_model
from fps_jax.commands import info
from tests.checkpoints import T2V, assemble

WEIGHTS = (".safetensors", ".pth", ".gguf")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """`repository(folder)`: a hub that holds just this; returns the list of what is fetched."""

    def serve(folder):
        cache, fetched = tmp_path / "cache", []
        cache.mkdir()
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())

        def download(repo, *, allow_patterns=None, local_files_only=False):
            if local_files_only:
                raise OSError("not cached")
            for name in names:
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns) and name not in fetched:
                    (cache / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / name, cache / name)
                    fetched.append(name)
            return str(cache)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

        def header(repo, name):
            with safe_open(folder / name, "np") as file:
                return types.SimpleNamespace(tensors=dict.fromkeys(file.keys()))

        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: names)
        monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", header)
        return fetched

    return serve


def weights_of(fetched) -> list[str]:
    return sorted(name for name in fetched if name.endswith(WEIGHTS))


def test_what_is_read_is_fetched_and_nothing_else(repository, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(T2V, source)
    for beside in ("transformer/diffusion_pytorch_model.fp16.safetensors", "extra/lora.safetensors", "teaser.mp4"):
        (source / beside).parent.mkdir(exist_ok=True)
        (source / beside).write_bytes(b"not fetched")
    fetched = repository(source)
    model = open_model("someone/Wan2.1-T2V-Diffusers")
    assert (model.layout, model.config) == ("diffusers", open_model(T2V).config)
    parts = ("text_encoder/model", "transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    assert weights_of(fetched) == [f"{part}.safetensors" for part in parts]
    assert "tokenizer/spiece.model" in fetched
    assert "teaser.mp4" not in fetched


def test_an_official_repository(repository, tmp_path):
    write_checkpoint(tmp_path / "source", tiny_config("flf2v"), layout="official", tokenizer_dir=T2V / "tokenizer")
    fetched = repository(tmp_path / "source")
    assert open_model("Wan-AI/Wan2.1-FLF2V").config == open_model(tmp_path / "source").config
    assert len(weights_of(fetched)) == 4


def test_a_checkpoint_of_ours(repository, tmp_path):
    from fps_convert import to_flax

    to_flax(T2V, tmp_path / "source")
    fetched = repository(tmp_path / "source")
    assert open_model("someone/ours").layout == "ours"
    assert len(fetched) == sum(file.is_file() for file in (tmp_path / "source").rglob("*"))


def second_transformer(path):
    index = json.loads((path / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    (path / "model_index.json").write_text(json.dumps(index))


def change(file, **fields):
    def edit(path):
        content = json.loads((path / file).read_text()) | fields
        (path / file).write_text(json.dumps(content))

    return edit


def collection(path):
    for file in path.rglob("*.json"):
        file.unlink()
    (path / "transformer").rename(path / "diffusion_models")


def loras(path):
    empty(path)
    factors = {f"diffusion_model.blocks.0.self_attn.q.lora_{x}.weight": np.zeros((1, 1), np.float32) for x in "AB"}
    for name in ("flat_color.safetensors", "epochs/20.safetensors"):
        (path / name).parent.mkdir(exist_ok=True)
        save_file(factors, path / name)


def in_folders(path):
    shutil.copytree(path, path / "T2V")
    for entry in path.iterdir():
        if entry.name != "T2V":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def gguf(path):
    empty(path)
    (path / "wan2.1-t2v-14b-Q4_0.gguf").write_bytes(b"GGUF")


def fastwan(path):
    file = path / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"blocks.0.to_gate_compress.weight": np.zeros(1, np.float32)}, file)


def sharded_fastwan(path):
    index = {"weight_map": {"blocks.0.to_gate_compress.weight": "diffusion_pytorch_model.safetensors"}}
    (path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (second_transformer, "is a Wan2.2 checkpoint (it has a transformer_2)"),
        (lambda path: (path / "transformer").rename(path / "high_noise_model"), "is a Wan2.2 checkpoint"),
        (lambda path: (path / "vae").rename(path / "Wan2.2_VAE.pth"), "is a Wan2.2 checkpoint (it has a Wan2.2 VAE)"),
        (change("vae/config.json", is_residual=True), "is a Wan2.2 VAE"),
        (change("model_index.json", _class_name="WanCausalDMDPipeline"), "is a causal few-step model"),
        (change("model_index.json", _class_name="WanVACEPipeline"), "is a VACE model"),
        (change("model_index.json", _class_name="HunyuanVideoPipeline"), "is no Wan model"),
        (sharded_fastwan, "VSA"),
        (fastwan, "VSA"),
        (change("transformer/config.json", in_channels=48), "48 input and 16 output channels"),
        (change("transformer/config.json", in_channels=48, out_channels=48), "as Wan2.2's TI2V-5B, beside a VAE of 16"),
        (lambda path: shutil.rmtree(path / "vae"), "missing vae/diffusion_pytorch_model.safetensors"),
        (lambda path: shutil.rmtree(path / "tokenizer"), "missing tokenizer/tokenizer.json (or spiece.model)"),
        (lambda path: shutil.rmtree(path / "scheduler"), "missing scheduler/scheduler_config.json"),
        (
            lambda path: [
                shutil.rmtree(p) if p.is_dir() else p.unlink() for p in path.iterdir() if p.name != "transformer"
            ],
            "is not a whole Wan2.1 checkpoint (diffusers layout): missing vae/",
        ),
        (collection, "is a collection of 3 single files (diffusion_models/diffusion_pytorch_model.safetensors, "),
        (collection, "of which nothing was downloaded; hf download someone/model FILE those that you want"),
        (loras, "holds LoRAs and no model (epochs/20.safetensors, flat_color.safetensors), and nothing was downloaded"),
        (loras, "give the file with --lora (pipe.load_lora)"),
        (
            in_folders,
            "has its checkpoints in folders (T2V), and nothing was downloaded; hf download someone/model --include 'T2V/*'",
        ),
        (gguf, "is GGUF, which isn't supported"),
        (lambda path: shutil.rmtree(path / "transformer"), "someone/model"),
    ],
)
def test_of_what_is_not_supported_no_weights_are_fetched(repository, tmp_path, edit, part):
    source = tmp_path / "source"
    shutil.copytree(T2V, source)
    edit(source)
    fetched = repository(source)
    for opener in (open_model, open_description):
        with pytest.raises((NotImplementedError, ValueError, FileNotFoundError)) as caught:
            opener("someone/model")
        assert part in str(caught.value)
        assert "someone/model" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert weights_of(fetched) == []


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("alibaba-pai/Wan2.1-Fun-1.3B-Control", "is a control model (Wan-Fun) by its name"),
        ("Wan-AI/Wan2.1-VACE-1.3B", "is a VACE model by its name"),
        ("Wan-AI/Wan2.2-T2V-A14B", "is a Wan2.2 model by its name"),
    ],
)
def test_a_repository_is_told_by_its_name(repository, name, part):
    fetched = repository(T2V)
    with pytest.raises(NotImplementedError, match=re.escape(f"{name} {part}")):
        open_model(name)
    assert weights_of(fetched) == []


@pytest.mark.parametrize("name", ["alibaba-pai/Wan2.1-Fun-1.3B-InP", "someone/uncontrolled-fun", "someone/service"])
def test_a_repository_s_other_names_say_nothing(repository, name):
    repository(T2V)
    assert open_model(name).config == open_model(T2V).config


@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v"])
def test_info_downloads_no_weights_and_says_the_same(repository, tmp_path, capsys, task):
    source = assemble(tmp_path / "source", task)
    fetched = repository(source)

    def run(model):
        with pytest.raises(SystemExit) as stop:
            info.main([str(model), "--height", "32", "--width", "48", "--num-frames", "9"])
        assert stop.value.code == 0
        return capsys.readouterr().out.splitlines()

    there, here = run("someone/model"), run(source)
    assert there[0] == "someone/model"
    assert weights_of(fetched) == []
    if task == "t2v":  # the others here have no tower, and a note on it
        assert [line.replace("not downloaded", "float32       ") for line in there[1:]] == here[1:]
    assert open_description("someone/model").config == open_model(source).config
    with pytest.raises(ValueError, match="weights of dit were not downloaded"):
        open_description("someone/model").load("dit", "float32")


def test_info_of_an_official_repository(repository, tmp_path):
    write_checkpoint(tmp_path / "source", tiny_config("i2v"), layout="official", tokenizer_dir=T2V / "tokenizer")
    fetched = repository(tmp_path / "source")
    got, want = open_description("someone/model").config, open_model(tmp_path / "source").config
    assert (got.dit.task, got.dit.dim, got.dit.num_heads, got.flow_shift_480p) == ("i2v", want.dit.dim, 2, 3.0)
    assert got.image_encoder is not None
    assert weights_of(fetched) == []


def test_a_hub_that_fails_is_told_in_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("401 Client Error\nsecond line")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        FileNotFoundError, match=r"'a/b' is no local directory, and downloading .* failed: 401 Client Error$"
    ):
        open_model("a/b")


def test_without_a_network_the_cache_is_read(monkeypatch):
    def offline(*args, **kwargs):
        if kwargs.get("local_files_only"):
            return str(T2V)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert open_model("a/b").directory == T2V
