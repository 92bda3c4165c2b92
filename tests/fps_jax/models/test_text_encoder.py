"""The text encoder against upstream's numbers: tests/data/t5.safetensors, weights of the tiny diffusers checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fps_jax.config import TextEncoderConfig
from fps_jax.models.params import abstract_params, bind, flatten, init_params
from fps_jax.models.text_encoder import build_text_encoder, encode_text, position_buckets
from tests.reference import DATA, golden, rel_l2

CONFIG = TextEncoderConfig(vocab_size=416, dim=32, mlp_dim=64, num_heads=4, head_dim=8, num_layers=3)
PARITY = 1e-5  # float32, single parts
LAYER_KEYS = {
    "norm1/scale": "layer.0.layer_norm.weight",
    "attn/q/kernel": "layer.0.SelfAttention.q.weight",
    "attn/k/kernel": "layer.0.SelfAttention.k.weight",
    "attn/v/kernel": "layer.0.SelfAttention.v.weight",
    "attn/o/kernel": "layer.0.SelfAttention.o.weight",
    "rel_bias/embedding": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2/scale": "layer.1.layer_norm.weight",
    "mlp/gate/kernel": "layer.1.DenseReluDense.wi_0.weight",
    "mlp/up/kernel": "layer.1.DenseReluDense.wi_1.weight",
    "mlp/down/kernel": "layer.1.DenseReluDense.wo.weight",
}


@pytest.fixture(scope="module")
def params():
    source = load_file(DATA / "Wan2.1-T2V-tiny-Diffusers/text_encoder/model.safetensors")

    def nest(path, leaf, tree):
        *parents, name = path.split("/")
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[name] = leaf

    tree = {}
    nest("token_embedding/embedding", source["shared.weight"], tree)
    nest("norm/scale", source["encoder.final_layer_norm.weight"], tree)
    for path, key in LAYER_KEYS.items():
        leaves = [source[f"encoder.block.{i}.{key}"] for i in range(CONFIG.num_layers)]
        nest(f"blocks/{path}", np.stack([a.T if path.endswith("kernel") else a for a in leaves]), tree)
    return tree


@pytest.fixture(scope="module")
def cases():
    return golden("t5")


def _case(cases, name):
    return cases[f"{name}.in.ids"], cases[f"{name}.in.mask"], cases[f"{name}.out"]


def test_tree_is_the_contract(params):
    expected = {path: leaf.shape for path, leaf in flatten(params)}
    assert {p: a.shape for p, a in flatten(abstract_params(build_text_encoder(CONFIG)))} == expected


@pytest.mark.parametrize("name", ["full_l20", "pad_l20", "long_l300"])
def test_float32_parity(params, cases, name):
    ids, mask, want = _case(cases, name)
    assert rel_l2(encode_text(CONFIG, params, ids, mask), want) <= PARITY


def test_float32_parity_at_512_tokens(params, cases):
    ids, mask, want = _case(cases, "pad512")  # the valid prefixes, concatenated
    out = np.asarray(encode_text(CONFIG, params, ids, mask))
    assert rel_l2(np.concatenate([row[:n] for row, n in zip(out, mask.sum(1), strict=True)]), want) <= PARITY


@pytest.mark.parametrize("name", ["full_l20", "pad_l20"])
def test_activations(params, cases, name):
    ids, mask, _ = _case(cases, name)
    taps = {}
    with jax.default_matmul_precision("highest"):
        bind(build_text_encoder(CONFIG), params)(jnp.asarray(ids), jnp.asarray(mask) > 0, taps)
    for i in range(CONFIG.num_layers):
        assert rel_l2(taps["blocks.out"][i], cases[f"{name}.act.block{i}"]) <= PARITY
    np.testing.assert_array_equal(taps["blocks.position_bias"][0][None], cases[f"{name}.act.pos_bias_block0"])


def test_bf16_error_is_at_most_twice_upstreams(params, cases):
    ids, mask, want = _case(cases, "pad_l20")
    valid = mask > 0
    out = np.asarray(encode_text(CONFIG, params, ids, mask, dtype="bfloat16"))
    assert out.dtype == jnp.bfloat16
    upstream = rel_l2(cases["pad_l20_bf16.out"][valid], want[valid])
    assert upstream == pytest.approx(1.94e-2, rel=0.01)  # as upstream's own run recorded it
    assert rel_l2(out[valid], want[valid]) <= 2 * upstream
    assert rel_l2(out, want) <= 2 * rel_l2(cases["pad_l20_bf16.out"], want)


def test_bf16_parameters_are_used_as_they_are(params, cases):
    ids, mask, _ = _case(cases, "pad_l20")
    stored = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    widened = jax.tree.map(lambda a: np.asarray(a, np.float32), stored)
    np.testing.assert_array_equal(encode_text(CONFIG, stored, ids, mask), encode_text(CONFIG, widened, ids, mask))


def test_padding_does_not_reach_valid_tokens(params, cases):
    ids, mask, _ = _case(cases, "pad_l20")
    out = encode_text(CONFIG, params, np.where(mask > 0, ids, 7), mask)
    want = encode_text(CONFIG, params, ids, mask)
    np.testing.assert_array_equal(np.asarray(out)[mask > 0], np.asarray(want)[mask > 0])


def test_position_buckets_match_upstream(cases):
    got = position_buckets(cases["buckets.relative"], num_buckets=32, max_distance=128)
    np.testing.assert_array_equal(got, cases["buckets.bucket"])
    row = position_buckets(np.arange(300) - 150, num_buckets=32, max_distance=128)
    np.testing.assert_array_equal(row, cases["long_l300.act.bucket"])


def test_layers_are_initialised_apart():
    kernel = init_params(build_text_encoder(CONFIG), jax.random.key(0))["blocks"]["attn"]["q"]["kernel"]
    assert kernel.shape == (3, 32, 32)
    assert float(jnp.abs(kernel[0] - kernel[1]).min()) > 0


def test_xxl_shapes_without_computing():
    config = TextEncoderConfig()
    build = build_text_encoder(config, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 512), jnp.bool_)
    out = jax.eval_shape(lambda p, ids, mask: bind(build, p)(ids, mask), abstract_params(build), tokens, mask)
    assert out.shape == (1, 512, 4096)
    assert sum(np.prod(a.shape) for _, a in flatten(abstract_params(build))) == 5_680_910_336


@pytest.mark.parametrize("bad", [-1, 416])
def test_token_outside_the_vocabulary(params, bad):
    ids = np.array([[5, bad, 1]], np.int32)
    with pytest.raises(ValueError, match=f"token {bad}, but the text encoder's vocabulary is 0 to 415"):
        encode_text(CONFIG, params, ids, np.ones_like(ids))


def test_mask_of_another_shape(params):
    with pytest.raises(ValueError, match=r"ids of shape \(1, 3\) and mask of shape \(1, 2\)"):
        encode_text(CONFIG, params, np.ones((1, 3), np.int32), np.ones((1, 2), np.int32))


def test_other_sizes_of_head_and_bucket():
    """Inner width other than the model's, and one layer: shapes come from the config alone."""
    config = dataclasses.replace(CONFIG, head_dim=16, num_layers=1, num_buckets=8, max_distance=16)
    params = init_params(build_text_encoder(config), jax.random.key(1))
    assert params["blocks"]["attn"]["o"]["kernel"].shape == (1, 64, 32)
    assert encode_text(config, params, np.ones((2, 5), np.int32), np.ones((2, 5), bool)).shape == (2, 5, 32)
