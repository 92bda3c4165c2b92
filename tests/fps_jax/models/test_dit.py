"""The DiT against upstream's WanModel, activation by activation. Goldens: tests/data/README.md."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.attention.attend import dense_attention
from fps_jax.config import WAN_FLF2V_14B, WAN_I2V_14B, WAN_T2V_1_3B, WAN_T2V_14B
from fps_jax.models.dit import build_dit, cast_params, dit, stage_name
from fps_jax.models.params import abstract_params, bind, flatten, init_params
from fps_jax.models.rope import rope_table
from tests.checkpoints import TINY, TINY_FLF2V, tiny_dit
from tests.reference import golden, rel_l2

# Names of upstream's activations in ours.
BLOCK_TAPS = {"norm3": "norm_cross", "ffn": "mlp"}


def batch_of(g: dict, channels_last: tuple[str, ...] = ("x",)) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents, timesteps and text states of a golden case; text is padded to the batch's longest with zeros."""
    count = sum(k.startswith("in.x") for k in g)
    latents = [np.concatenate([g[f"in.{name}{i}"] for name in channels_last]) for i in range(count)]
    texts = [g[f"in.context{i}"] for i in range(count)]
    longest = max(len(t) for t in texts)
    text = np.stack([np.pad(t, ((0, longest - len(t)), (0, 0))) for t in texts])
    return jnp.asarray(np.stack(latents)), jnp.asarray(g["in.t"]).astype(jnp.float32), jnp.asarray(text)


def outputs(g: dict) -> np.ndarray:
    return np.stack([g[k] for k in sorted(g) if k.startswith("out.")])


@pytest.fixture(scope="module")
def t2v_main():
    g = golden("dit_t2v_main")
    taps: dict[str, jax.Array] = {}
    out = dit(TINY, tiny_dit(), *batch_of(g), taps=taps)
    return g, out, taps


def test_t2v_output_and_every_activation_match_upstream(t2v_main):
    g, out, taps = t2v_main
    assert rel_l2(out.velocity, outputs(g)) <= 1e-5
    assert int(out.first_bad) == -1
    checked = 0
    for key, want in g.items():
        if not key.startswith("act."):
            continue
        name = key.removeprefix("act.")
        if name == "text_embedding_first32":
            got = taps["text_embedding"][:, :32]
        elif name.startswith("block"):
            block, _, part = name.partition(".")
            part = part.replace("norm3", "norm_cross").replace("ffn", "mlp") if part else "out"
            got = taps[f"blocks.{part}"][int(block.removeprefix("block"))]
        else:
            got = taps[name]
        assert rel_l2(got, want) <= 1e-5, name
        checked += 1
    assert checked >= 12


@pytest.mark.parametrize("case", ["single", "float_t"])
def test_t2v_single_sample_and_fractional_timestep(case):
    g = golden(f"dit_t2v_{case}")
    assert rel_l2(dit(TINY, tiny_dit(), *batch_of(g)).velocity, outputs(g)) <= 1e-5


def test_flf2v_output_matches_diffusers():
    g = {k: jnp.asarray(v.astype(np.float32)) for k, v in golden("flf2v_forward").items()}
    image = g["in.image_embeds"].reshape(-1, 514, 80)  # first and last frame of a sample, one after the other
    out = dit(TINY_FLF2V, tiny_dit("flf2v"), g["in.latents"], g["in.timestep"], g["in.text_first24"], image)
    assert rel_l2(out.velocity, g["out"]) <= 1e-5


def test_batch_of_two_grids_with_masked_padding_matches_upstream():
    g = golden("dit_t2v_pad")
    grids = [tuple(n // p for n, p in zip(g[f"in.x{i}"].shape[1:], (1, 2, 2), strict=True)) for i in range(2)]
    seq_len = 80
    patches = np.zeros((2, seq_len, 64), np.float32)
    rope = np.zeros((2, 2, seq_len, 16), np.float32)
    rope[0] = 1  # cos 1, sin 0: padded tokens aren't rotated
    mask = np.zeros((2, seq_len), bool)
    for i, (f, y, x) in enumerate(grids):
        n = f * y * x
        cells = g[f"in.x{i}"].reshape(16, f, 1, y, 2, x, 2).transpose(1, 3, 5, 0, 2, 4, 6)
        patches[i, :n] = cells.reshape(n, 64)
        rope[:, i, :n] = rope_table((f, y, x), 32)
        mask[i, :n] = True
    texts = [np.pad(g[f"in.context{i}"], ((0, 512 - len(g[f"in.context{i}"])), (0, 0))) for i in range(2)]
    taps: dict[str, jax.Array] = {}
    with jax.default_matmul_precision("highest"):
        tokens, _ = bind(build_dit(TINY), tiny_dit()).tokens(
            jnp.asarray(patches),
            jnp.asarray(g["in.t"]).astype(jnp.float32),
            jnp.asarray(np.stack(texts)),
            jnp.asarray(rope),
            token_mask=jnp.asarray(mask),
            taps=taps,
        )
    assert rel_l2(taps["blocks.out"][0], g["act.block0"]) <= 1e-5
    for i, (f, y, x) in enumerate(grids):
        out = np.asarray(tokens[i, : f * y * x]).reshape(f, y, x, 2, 2, 16).transpose(5, 0, 1, 3, 2, 4)
        assert rel_l2(out.reshape(16, f, 2 * y, 2 * x), g[f"out.{i}"]) <= 1e-5


def test_bf16_error_is_at_most_twice_upstreams():
    g, upstream = golden("dit_t2v_main"), golden("dit_t2v_main_bf16")
    want = outputs(g)
    out = dit(TINY, cast_params(tiny_dit(), jnp.bfloat16), *batch_of(g), dtype=jnp.bfloat16)
    bar = 2 * rel_l2(outputs(upstream), want)
    assert 0 < rel_l2(out.velocity, want) <= bar <= 2 * 3.5e-3


@pytest.mark.parametrize("remat", ["attention", "dots", "full"])
def test_remat_changes_neither_output_nor_gradient(remat):
    latents, t, text = batch_of(golden("dit_t2v_single"))

    def loss(params, remat):
        return jnp.square(dit(TINY, params, latents, t, text, remat=remat).velocity).mean()

    params = jax.tree.map(jnp.asarray, tiny_dit())
    plain = jax.value_and_grad(loss)(params, "none")
    again = jax.value_and_grad(loss)(params, remat)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_unknown_remat_names_the_choices():
    with pytest.raises(ValueError, match="remat='some' is not one of 'none', 'attention', 'dots', 'full'"):
        build_dit(TINY, remat="some")


def test_layers_differ_after_creation():
    params = init_params(build_dit(TINY), jax.random.key(0))
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape[0] == 3
    assert not np.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize(
    ("path", "stage"),
    [("patch_embedding/bias", 0), ("blocks/mlp/up/bias", 2), ("head/proj/bias", 4)],
)
def test_the_first_stage_with_a_nan_is_named(path, stage):
    params = {p: np.array(a) for p, a in flatten(tiny_dit())}
    if path.startswith("blocks"):
        params[path][1] = np.nan  # the second layer
    else:
        params[path][:] = np.nan
    from fps_jax.models.params import unflatten

    out = dit(TINY, unflatten(params), *batch_of(golden("dit_t2v_single")))
    assert int(out.first_bad) == stage
    assert stage_name(TINY, stage) == {0: "the embeddings", 2: "block 1", 4: "the head"}[stage]


def test_cast_keeps_norms_modulation_and_time_embedding_in_float32():
    cast = dict(flatten(cast_params(tiny_dit(), jnp.bfloat16)))
    assert cast["blocks/self_attn/q/kernel"].dtype == jnp.bfloat16
    for path in ("blocks/modulation", "blocks/self_attn/norm_q/scale", "time_projection/kernel", "head/proj/kernel"):
        assert cast[path].dtype == jnp.float32, path


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (WAN_T2V_1_3B, 1.418996800),
        (WAN_T2V_14B, 14.288491584),
        (WAN_I2V_14B, 16.394878784),
        (WAN_FLF2V_14B, 16.395536704),
    ],
)
def test_real_sizes_have_upstreams_parameter_counts_and_evaluate_abstractly(config, billions):
    """Counts: Wan-Video/Wan2.1's own models on the meta device."""
    shapes = abstract_params(build_dit(config.dit))
    assert sum(a.size for _, a in flatten(shapes)) == round(billions * 1e9)
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    image = None
    if config.dit.image_dim:
        image = spec((1, config.dit.image_positions or 257, 1280))
    latents = spec((1, config.dit.in_channels, 21, 60, 104))
    out = jax.eval_shape(
        functools.partial(dit, config.dit, dtype=jnp.bfloat16), shapes, latents, spec((1,)), spec((1, 512, 4096)), image
    )
    assert out.velocity.shape == (1, 16, 21, 60, 104)


def test_chunked_attention_is_softmax_attention(monkeypatch):
    monkeypatch.setattr("fps_jax.attention.chunked._rows", lambda k, heads: 64)  # the last block is padded
    q, k, v = (jax.random.normal(key, (2, 150, 3, 16)) for key in jax.random.split(jax.random.key(1), 3))
    mask = jnp.arange(150)[None] < jnp.array([[150], [70]])
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / 4 + jnp.where(mask, 0, -1e30)[:, None, None]
    want = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v)
    assert rel_l2(dense_attention(q, k, v, mask), want) <= 1e-6


def test_config_errors_name_the_rule():
    with pytest.raises(ValueError, match="dim=65 with num_heads=2"):
        dataclasses.replace(TINY, dim=65)
    with pytest.raises(ValueError, match="only t2v has no image_dim"):
        dataclasses.replace(TINY, task="i2v")


def test_image_states_have_to_fit_the_task():
    g = golden("dit_t2v_single")
    with pytest.raises(ValueError, match="a t2v model takes no image_states"):
        dit(TINY, tiny_dit(), *batch_of(g), jnp.zeros((1, 257, 80)))
    with pytest.raises(ValueError, match="a flf2v model needs image_states"):
        dit(TINY_FLF2V, tiny_dit("flf2v"), jnp.zeros((1, 36, 1, 4, 4)), jnp.zeros(1), jnp.zeros((1, 3, 32)))


def test_text_may_be_keys_and_values_that_were_made_before():
    _, t, text = batch_of(golden("dit_t2v_main"))
    model = bind(build_dit(TINY), tiny_dit())
    patches = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 64), np.float32))
    rope = jnp.asarray(rope_table((1, 2, 3), 32))
    with jax.default_matmul_precision("highest"):
        kv = model.text_kv(text)
        assert kv.k.shape == kv.v.shape == (3, 2, 512, 2, 32)
        want, got = (model.tokens(patches, t, told, rope)[0] for told in (text, kv))
    assert rel_l2(got, want) <= 1e-6


def test_frames_of_a_video_may_begin_anywhere():
    whole = rope_table((1030, 2, 3), 32).reshape(2, 1030, 6, 16)
    assert np.array_equal(rope_table((3, 2, 3), 32, 1027), whole[:, 1027:].reshape(2, 18, 16))


def test_times_have_to_fit_the_frames():
    latents, _, text = batch_of(golden("dit_t2v_single"))
    with pytest.raises(ValueError, match=r"t has shape \(1, 9\); give one for each of .* latent frames"):
        dit(TINY, tiny_dit(), latents, jnp.zeros((1, 9)), text)
    with pytest.raises(ValueError, match=r"t has shape \(1, 3\) without frames"):
        bind(build_dit(TINY), tiny_dit()).tokens(
            jnp.zeros((1, 6, 64)), jnp.zeros((1, 3)), text, jnp.asarray(rope_table((1, 2, 3), 32))
        )
