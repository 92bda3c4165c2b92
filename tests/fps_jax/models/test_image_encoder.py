"""The image tower against transformers' CLIPVisionModel: tests/data/clip_tower.safetensors, made by tests/make_golden.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.config import ImageEncoderConfig
from fps_jax.models.image_encoder import build_image_encoder, encode_image
from fps_jax.models.params import abstract_params, bind, flatten, init_params, unflatten
from tests.reference import golden, rel_l2

CONFIG = ImageEncoderConfig(image_size=56, patch_size=14, dim=32, mlp_dim=64, num_heads=4, num_layers=4)
PARITY = 1e-5  # float32, single parts
LAYER_KEYS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.out_proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


@pytest.fixture(scope="module")
def case():
    return golden("clip_tower")


@pytest.fixture(scope="module")
def params(case):
    source = {key.removeprefix("weights."): a for key, a in case.items() if key.startswith("weights.")}
    leaves = {
        "class_embedding": source["embeddings.class_embedding"],
        "patch_embedding/kernel": source["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "positions": source["embeddings.position_embedding.weight"],
    }
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm_post", "post_layernorm")):
        leaves[f"{ours}/scale"], leaves[f"{ours}/bias"] = source[f"{theirs}.weight"], source[f"{theirs}.bias"]
    for ours, theirs in LAYER_KEYS.items():
        norm = ours.startswith("norm")
        weights = [source[f"encoder.layers.{i}.{theirs}.weight"] for i in range(CONFIG.num_layers)]
        biases = [source[f"encoder.layers.{i}.{theirs}.bias"] for i in range(CONFIG.num_layers)]
        leaves[f"blocks/{ours}/{'scale' if norm else 'kernel'}"] = np.stack([w if norm else w.T for w in weights])
        leaves[f"blocks/{ours}/bias"] = np.stack(biases)
    return unflatten({path: np.asarray(a, np.float32) for path, a in leaves.items()})


@pytest.fixture(scope="module")
def pixels(case):
    return case["in.pixel_values"].astype(np.float32).transpose(0, 2, 3, 1)


def test_tree_is_the_contract(params):
    expected = {path: a.shape for path, a in flatten(params)}
    assert {path: a.shape for path, a in flatten(abstract_params(build_image_encoder(CONFIG)))} == expected


def test_penultimate_hidden_state(case, params, pixels):
    out = encode_image(CONFIG, params, pixels)
    assert out.dtype == jnp.float32
    assert rel_l2(out, case["out.hidden_states_-2"]) <= PARITY


def test_last_block_and_last_norm_are_not_used(params, pixels):
    def scramble(path, a):
        if path.startswith("blocks/"):
            return np.concatenate([a[:-1], np.full_like(a[-1:], np.nan)])
        return np.full_like(a, np.nan) if path.startswith("norm_post/") else a

    scrambled = unflatten({path: scramble(path, a) for path, a in flatten(params)})
    np.testing.assert_array_equal(encode_image(CONFIG, scrambled, pixels), encode_image(CONFIG, params, pixels))


def test_float16_parameters_compute_in_float32(case, params, pixels):
    """Official files hold float16; the golden weights are exact in it, so nothing changes."""
    half = jax.tree.map(lambda a: a.astype(np.float16), params)
    assert rel_l2(encode_image(CONFIG, half, pixels), case["out.hidden_states_-2"]) <= PARITY


def test_projection_is_held_where_the_source_has_one():
    config = dataclasses.replace(CONFIG, projection_dim=24)
    params = init_params(build_image_encoder(config), jax.random.key(0))
    assert params["projection"].shape == (32, 24)
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert float(jnp.abs(kernel[0] - kernel[1]).min()) > 0  # layers are initialised apart
    assert encode_image(config, params, np.zeros((1, 56, 56, 3), np.float32)).shape == (1, 17, 32)


def test_vit_h_shapes_without_computing():
    config = ImageEncoderConfig()
    build = build_image_encoder(config)
    pixels = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    out = jax.eval_shape(lambda p, x: bind(build, p)(x), abstract_params(build), pixels)
    assert (out.shape, out.dtype) == ((2, 257, 1280), jnp.float32)
    # 630.77M: open_clip's ViT-H-14 visual tower without its projection
    assert sum(np.prod(a.shape) for _, a in flatten(abstract_params(build))) == 630_766_080


@pytest.mark.parametrize("shape", [(1, 56, 48, 3), (56, 56, 3), (1, 3, 56, 56)])
def test_pixels_of_a_wrong_shape(params, shape):
    with pytest.raises(ValueError, match=r"must be \[B, 56, 56, 3\]; use fps_jax.media.images.clip_pixels"):
        encode_image(CONFIG, params, np.zeros(shape, np.float32))
