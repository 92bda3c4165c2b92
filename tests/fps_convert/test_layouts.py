"""A layout is a record and nothing more: one that no code knows is written, told, read, checked and reported like the others."""

import dataclasses
from typing import Any

import pytest

from fps_convert import layouts, open_checkpoint, to_flax, to_torch
from fps_convert.layouts import DIFFUSERS, OFFICIAL, Layout, Place, layout_by_names, layout_of
from fps_convert.synthetic import tiny_config, write_checkpoint
from tests.checkpoints import T2V
from tests.fps_convert.tensors import read_all

# Names of both kinds, several files in one folder, a .pth in another layout's stead; only the DiT has a config.json.
_NAME: Any = "mixed"
MIXED = Layout(
    name=_NAME,
    marks=("wan.safetensors",),
    places={
        "dit": Place(file="wan.safetensors", naming="official", config=OFFICIAL.places["dit"].config),
        "vae": Place(file="autoencoder.safetensors", naming="diffusers"),
        "text_encoder": Place(file="text/umt5.safetensors", naming="diffusers"),
        "image_encoder": Place(file="clip.pth", naming="official"),
    },
    tokenizer="text/tokens",
    flow_shift={"t2v": (4.0, None), "flf2v": (7.0, 6.0)},
)


@pytest.fixture
def mixed(monkeypatch):
    monkeypatch.setitem(layouts.LAYOUTS, "mixed", MIXED)


# By shapes alone a VAE has 16 channels and Wan's statistics, and CLIP heads of width 80: the tiny models have those, too.
@pytest.mark.parametrize("task", ["t2v", "flf2v"])
def test_a_new_layout_is_a_record(mixed, tmp_path, pristine, task):
    source = tmp_path / "source"
    write_checkpoint(source, tiny_config(task), layout=_NAME, tokenizer_dir=T2V / "tokenizer")
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.parent.name != "tokens"}
    wanted = {
        "wan.safetensors",
        "config.json",
        "autoencoder.safetensors",
        "text",
        "text/umt5.safetensors",
        "text/tokens",
    }
    assert names == wanted | ({"clip.pth"} if task == "flf2v" else set())
    assert layout_of(source) is MIXED

    opened, official = open_checkpoint(source), open_checkpoint(pristine("official", task))
    assert opened.layout == "mixed"
    own = {"t2v": (4.0, None), "flf2v": (7.0, 6.0)}[task]
    assert opened.config == dataclasses.replace(official.config, flow_shift=own[0], flow_shift_480p=own[1])
    assert opened.tokenizer_dir == source / "text" / "tokens"

    to_flax(source, tmp_path / "ours")
    report = to_torch(tmp_path / "ours", tmp_path / "back", _NAME)
    assert (report["layout"], report["notes"]) == ("mixed", [])
    assert read_all(tmp_path / "back") == read_all(source)
    notes = to_torch(tmp_path / "ours", tmp_path / "official", "official")["notes"]
    assert any(f"flow_shift={own[0]:g}" in note and "official layout" in note for note in notes)
    (source / "autoencoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(mixed layout\): missing autoencoder\.safetensors$"):
        open_checkpoint(source)


def test_a_directory_is_told_by_its_marks(tmp_path, pristine):
    assert layout_of(pristine("official")) is OFFICIAL
    assert layout_of(pristine("diffusers")) is DIFFUSERS
    (tmp_path / "transformer").write_text("a file, not the folder")
    assert layout_of(tmp_path) is OFFICIAL
    (tmp_path / "model_index.json").write_text("{}")
    assert layout_of(tmp_path) is DIFFUSERS


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["model_index.json"], "diffusers"),
        (["transformer/x.safetensors"], "diffusers"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors", "README.md"], "official"),
        (["wan/diffusion_pytorch_model.safetensors", "transformer.md"], None),
    ],
)
def test_a_listing_is_told_as_a_directory_is(tmp_path, names, layout):
    told = layout_by_names(names)
    assert (told.name if told else None) == layout
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert layout_of(tmp_path).name == (layout or "comfyui")
