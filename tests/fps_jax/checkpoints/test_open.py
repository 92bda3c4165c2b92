"""`open_model`: one interface to a checkpoint of ours, one in each torch layout, and a Hugging Face repository."""

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_convert import to_flax, to_torch
from fps_jax.checkpoints.open import open_model
from fps_jax.models.params import flatten
from tests.checkpoints import T2V


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    to_flax(T2V, folder / "ours")
    to_torch(folder / "ours", folder / "official", "official")
    return {"ours": folder / "ours", "official": folder / "official", "diffusers": T2V}


@pytest.mark.parametrize("layout", ["ours", "official", "diffusers"])
def test_every_layout_gives_the_same_model(places, layout):
    want, got = open_model(places["diffusers"]), open_model(places[layout])
    assert (got.layout, got.directory) == (layout, places[layout])
    assert sorted(got.components) == ["dit", "text_encoder", "vae"]
    assert (got.config.dit, got.config.vae, got.config.text_encoder) == (
        want.config.dit, want.config.vae, want.config.text_encoder,
    )  # fmt: skip
    assert got.stored_dtypes() == want.stored_dtypes()
    assert got.stored_dtypes()["dit"]["patch_embedding/kernel"] == np.float32
    assert any((got.tokenizer_dir / name).is_file() for name in ("tokenizer.json", "spiece.model"))
    for name in got.components:
        ours, theirs = (dict(flatten(model.load(name, jnp.bfloat16))) for model in (got, want))
        assert ours.keys() == theirs.keys()
        for path, leaf in ours.items():
            assert leaf.dtype == theirs[path].dtype
            assert isinstance(leaf, jax.Array)  # the host is the device here
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[path]), err_msg=path)


def test_a_directory_that_only_looks_like_ours_gets_our_readers_error(tmp_path):
    (tmp_path / "dit").mkdir()
    with pytest.raises(ValueError, match="is not a checkpoint of this project"):
        open_model(tmp_path)


def test_a_repository_is_downloaded_and_its_failure_told_in_one_line(monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(T2V)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").directory == T2V
    assert asked == [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ["*.json", "*.safetensors", "*.pth", "*.model", "*.txt"])]

    def fail(name, *, allow_patterns):
        raise OSError("401 Client Error\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        FileNotFoundError, match=r"'a/b' is no local directory, and downloading .* failed: 401 Client Error$"
    ):
        open_model("a/b")
    for path in ("a", "a/b/c", "./b", "/b", "a/"):
        with pytest.raises(FileNotFoundError, match="doesn't exist; pass a directory, or 'owner/name'"):
            open_model(path)
