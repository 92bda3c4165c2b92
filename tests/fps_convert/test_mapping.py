"""The key tables, against the real checkpoints' keys and shapes and against the models' own parameters."""

import dataclasses
import gzip
import json
import re

import numpy as np
import pytest

from fps_convert import key_patterns, mapping
from fps_convert.infer import _example
from fps_convert.synthetic import tiny_config
from fps_jax.checkpoints.placement import builds
from fps_jax.config import COMPONENTS, WAN_FLF2V_14B, WAN_I2V_14B, WAN_T2V_1_3B, WAN_T2V_14B
from fps_jax.models.params import abstract_params, flatten
from tests.reference import DATA

REAL = json.loads(gzip.decompress((DATA / "convert" / "keys_real.json.gz").read_bytes()))
TABLES = {
    "official_dit_t2v_1.3B": ("dit", WAN_T2V_1_3B, "official"),
    "diffusers_dit_t2v_1.3B": ("dit", WAN_T2V_1_3B, "diffusers"),
    "official_dit_t2v_14B": ("dit", WAN_T2V_14B, "official"),
    "diffusers_dit_t2v_14B": ("dit", WAN_T2V_14B, "diffusers"),
    "official_dit_i2v_14B": ("dit", WAN_I2V_14B, "official"),
    "diffusers_dit_i2v_14B": ("dit", WAN_I2V_14B, "diffusers"),
    "official_dit_flf2v_14B": ("dit", WAN_FLF2V_14B, "official"),
    "official_vae": ("vae", WAN_T2V_14B, "official"),
    "diffusers_vae": ("vae", WAN_T2V_14B, "diffusers"),
    "official_umt5_xxl_encoder": ("text_encoder", WAN_T2V_14B, "official"),
    "transformers_umt5_xxl_encoder": ("text_encoder", WAN_T2V_14B, "diffusers"),
}


@pytest.mark.parametrize("name", sorted(REAL["shapes"]))
def test_keys_and_shapes_are_those_of_the_real_checkpoints(name):
    component, config, layout = TABLES[name]
    want = {key: tuple(shape) for key, shape in REAL["shapes"][name].items()}
    want.pop("encoder.embed_tokens.weight", None)  # tied: a saved file holds shared.weight alone
    got = {tensor.key: tensor.shape for tensor in mapping.tensors(mapping.rows(component, config), layout)}
    assert got == want


@pytest.mark.parametrize("name", sorted(REAL["official_to_diffusers"]))
def test_each_official_key_has_its_diffusers_key(name):
    if name.startswith("dit"):
        config = WAN_I2V_14B if name == "dit_i2v" else WAN_T2V_1_3B
        config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, num_layers=3))
    else:
        text = dataclasses.replace(WAN_T2V_14B.text_encoder, num_layers=3)
        config = dataclasses.replace(WAN_T2V_14B, text_encoder=text)
    rows = mapping.rows(name.split("_i2v")[0].split("_t2v")[0], config)
    assert {row.keys["official"]: row.keys["diffusers"] for row in rows} == REAL["official_to_diffusers"][name]


def test_flf2v_positions_have_the_diffusers_key():
    rows = {row.path: row for row in mapping.rows("dit", WAN_FLF2V_14B)}
    row = rows["image_embedding/positions"]
    assert row.keys["diffusers"] == "condition_embedder.image_embedder.pos_embed"
    assert row.shapes["diffusers"] == (1, 514, 1280)
    assert row.shape == (514, 1280)


@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v"])
def test_leaves_are_the_models_parameters(task):
    config = tiny_config(task)
    if config.image_encoder is not None:
        tower = dataclasses.replace(config.image_encoder, projection_dim=8 if task == "i2v" else None)
        config = dataclasses.replace(config, image_encoder=tower)
    for component, build in builds(config).items():
        want = {path: leaf.shape for path, leaf in flatten(abstract_params(build))}
        assert mapping.leaves(mapping.rows(component, config)) == want


def test_a_t2v_model_has_no_image_tower():
    with pytest.raises(ValueError, match="t2v model has no image tower"):
        mapping.rows("image_encoder", tiny_config("t2v"))


@pytest.mark.parametrize("layout", mapping.NAMINGS)
@pytest.mark.parametrize("component", COMPONENTS)
def test_from_ours_undoes_to_ours(component, layout):
    for tensor in mapping.tensors(mapping.rows(component, tiny_config("flf2v")), layout):
        whole = np.arange(np.prod(tensor.shape), dtype=np.float32).reshape(tensor.shape)
        pieces = np.split(whole, len(tensor.rows)) if len(tensor.rows) > 1 else [whole]
        for row, piece in zip(tensor.rows, pieces, strict=True):
            ours = mapping.to_ours(piece, row)
            assert ours.shape == row.shape
            np.testing.assert_array_equal(mapping.from_ours(ours, row, layout).reshape(piece.shape), piece)


def test_a_linear_kernel_is_transposed_and_a_conv_kernel_has_channels_last():
    rows = {row.path: row for row in mapping.rows("dit", tiny_config())}
    weight = np.arange(48 * 24).reshape(48, 24)
    np.testing.assert_array_equal(mapping.to_ours(weight, rows["text_embedding/up/kernel"]), weight.T)
    patches = np.arange(48 * 16 * 4).reshape(48, 16, 1, 2, 2)
    ours = mapping.to_ours(patches, rows["patch_embedding/kernel"])
    assert ours[5 * 4 + 1 * 2 + 0, 7] == patches[7, 5, 0, 1, 0]  # rows are (c, pt, ph, pw)
    rows = {row.path: row for row in mapping.rows("vae", tiny_config())}
    kernel = np.arange(4 * 3 * 27).reshape(4, 3, 3, 3, 3)
    assert mapping.to_ours(kernel, rows["encoder/conv_in/kernel"])[0, 1, 2, 1, 3] == kernel[3, 1, 0, 1, 2]


def test_examples_of_patterns_are_keys_that_they_match():
    """A message shows a tensor's name, never a regular expression."""
    tables = (key_patterns.DIT, key_patterns.VAE, key_patterns.TEXT_ENCODER, key_patterns.IMAGE_ENCODER)
    names = {"q", "up", "head", "image", "base", "z_dim", "norm", "bias", "patch"}  # for a whole key
    for record in (record for table in tables for record in table.values()):
        for name in names & {field.name for field in dataclasses.fields(record)}:
            pattern = getattr(record, name)
            assert re.fullmatch(pattern, _example(pattern)), pattern
            assert not set("\\()[]|*+?") & set(_example(pattern))
