"""`open_model`: one interface to a checkpoint of ours, one in each torch layout, and a Hugging Face repository."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_convert import to_flax, to_torch
from fps_jax.checkpoints.open import open_model
from fps_jax.models.params import flatten
from fps_jax.sampling.pipeline import WanPipeline
from tests.checkpoints import T2V


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    to_flax(T2V, folder / "ours")
    to_torch(folder / "ours", folder / "official", "official")
    to_torch(folder / "ours", folder / "comfyui", "comfyui")
    return {"ours": folder / "ours", "official": folder / "official", "diffusers": T2V, "comfyui": folder / "comfyui"}


@pytest.mark.parametrize("layout", ["ours", "official", "diffusers", "comfyui"])
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


def test_only_a_path_of_two_parts_may_be_a_repository():
    for path in ("a", "a/b/c", "./b", "/b", "a/"):
        with pytest.raises(FileNotFoundError, match="doesn't exist; pass a directory, or 'owner/name'"):
            open_model(path)


def test_files_one_by_one_are_the_model(places):
    files = {
        "dit": places["comfyui"] / "diffusion_models" / "wan2.1_dit.safetensors",
        "vae": places["comfyui"] / "vae" / "wan_2.1_vae.safetensors",
        "text_encoder": places["official"] / "models_t5_umt5-xxl-enc-bf16.pth",
    }
    with pytest.raises(FileNotFoundError, match="--tokenizer DIR"):
        WanPipeline.from_files(**files)
    with pytest.raises(ValueError, match="dtype='float8' is not one of"):
        WanPipeline.from_files(**files, dtype="float8")
    got = WanPipeline.from_files(**files, tokenizer=T2V / "tokenizer", dtype="float32")
    want = WanPipeline.from_pretrained(T2V, dtype="float32")
    assert (got.config.dit, got.tokenizer.source) == (want.config.dit, want.tokenizer.source)
    for name, params in want.params.items():
        theirs = dict(flatten(got.params[name]))
        for path, leaf in flatten(params):
            np.testing.assert_array_equal(np.asarray(theirs[path]), np.asarray(leaf), err_msg=path)


def test_a_file_is_no_checkpoint_and_what_to_do_is_said(places):
    with pytest.raises(NotADirectoryError, match="files for all parts to from_files"):
        open_model(places["comfyui"] / "vae" / "wan_2.1_vae.safetensors")
