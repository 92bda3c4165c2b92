"""Configs that can't be are refused when they are made, in one line."""

import dataclasses
import json

import pytest

from fps_jax.causal import CausalConfig
from fps_jax.config import (
    MAX_LAYERS,
    MAX_SHIFT,
    MAX_SIZE,
    WAN_FLF2V_14B,
    WAN_I2V_14B,
    WAN_T2V_1_3B,
    WAN_T2V_14B,
    DiTConfig,
    ImageEncoderConfig,
    SamplingDefaults,
    TextEncoderConfig,
    VAEConfig,
    WanConfig,
)
from tests.reference import DATA

SMALL_VAE = VAEConfig(base_dim=8, z_dim=6, latents_mean=(0.0,) * 6, latents_std=(1.0,) * 6)


@pytest.mark.parametrize("config", [WAN_T2V_1_3B, WAN_T2V_14B, WAN_I2V_14B, WAN_FLF2V_14B])
def test_wans_own_come_back_from_json(config):
    assert WanConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_no_shape_tells_is_as_in_the_originals():
    """Shapes are held against the real checkpoints' in tests/fps_convert/test_mapping.py. Here, from wan/configs, wan/modules/t5.py
    and clip.py of Wan-Video/Wan2.1: heads, lengths, what attention looks up, shifts, and the video that is made unasked."""
    models = WAN_T2V_1_3B, WAN_T2V_14B, WAN_I2V_14B, WAN_FLF2V_14B
    assert [config.dit.num_heads for config in models] == [12, 40, 40, 40]
    assert [config.flow_shift for config in models] == [5, 5, 5, 16]
    assert [config.flow_shift_480p for config in models] == [None, None, 3, None]
    for config in models:
        assert config.dit.head_dim == 128
        assert (config.dit.text_len, config.dit.freq_dim, config.dit.eps) == (512, 256, 1e-6)
        assert (config.sampling.width, config.sampling.height, config.sampling.num_frames) == (832, 480, 81)
    text = WAN_T2V_14B.text_encoder
    assert (text.num_heads, text.head_dim, text.num_buckets, text.max_distance, text.eps) == (64, 64, 32, 128, 1e-6)
    assert WAN_T2V_14B.image_encoder is None
    for config in models[2:]:
        tower = config.image_encoder
        assert tower is not None
        assert (tower.image_size, tower.patch_size, tower.num_tokens, tower.eps) == (224, 14, 257, 1e-5)
        assert (tower.dim, tower.mlp_dim, tower.num_heads, tower.num_layers) == (1280, 5120, 16, 32)
        assert config.dit.image_dim == tower.dim
    vae = json.loads((DATA / "Wan2.1-T2V-tiny-Diffusers" / "vae" / "config.json").read_text())
    assert vae["latents_mean"] == list(WAN_T2V_14B.vae.latents_mean)
    assert vae["latents_std"] == list(WAN_T2V_14B.vae.latents_std)


@pytest.mark.parametrize(
    "changes",
    [{"preset": "few-step"}, {"sampling": SamplingDefaults(height=64, guidance_scale=0.0)}, {"causal": CausalConfig()}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_as_wans_is_in_the_record_and_nothing_else(changes):
    """So that releases that don't know a field read the checkpoints that don't need it."""
    plain, config = WAN_T2V_14B.to_dict(), dataclasses.replace(WAN_T2V_14B, **changes)
    record = config.to_dict()
    assert record.keys() - plain.keys() == changes.keys()
    assert not {"preset", "sampling", "causal"} & plain.keys()
    assert WanConfig.from_dict(json.loads(json.dumps(record))) == config
    if "sampling" in changes:
        assert record["sampling"] == {"height": 64, "guidance_scale": 0.0}


def test_a_bound_is_itself_allowed():
    one = VAEConfig(z_dim=1, latents_mean=(1e6,), latents_std=(1.0,))
    assert dataclasses.replace(one, latents_mean=(-1e6,)).z_dim == 1
    deep = {"dim_mult": (1,) * 1000, "temporal_downsample": (True,) * 999}
    assert len(dataclasses.replace(one, **deep).dim_mult) == 1000
    assert TextEncoderConfig(num_layers=MAX_LAYERS, vocab_size=MAX_SIZE, dim=1, eps=0.1).dim == 1
    for shift in (0.5, MAX_SHIFT):  # above 0, below 1 too
        assert dataclasses.replace(WAN_T2V_14B, flow_shift=shift).flow_shift == shift


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_dim": 6}, "latents_mean has 16 values for z_dim=6; give one a latent channel"),
        ({"latents_std": (1.0,) * 4}, "latents_std has 4 values for z_dim=16; give one a latent channel"),
        ({"latents_std": (1.0,) * 15 + (0.0,)}, "must be above 0"),
        ({"dim_mult": (1, 2)}, "temporal_downsample has 3 values for 2 stages"),
    ],
)
def test_a_vae_whose_lists_dont_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**changes)


@pytest.mark.parametrize(
    ("task", "channels", "message"),
    [
        ("t2v", (16, 16), "in_channels=16 and out_channels=16; a t2v model on a VAE of z_dim=6 has 6 and 6"),
        ("i2v", (6, 6), "a i2v model on a VAE of z_dim=6 has 16 and 6"),
        ("t2v", (6, 5), "out_channels=5"),
    ],
)
def test_a_dit_that_doesnt_take_the_vaes_latents_is_refused(task, channels, message):
    image = {} if task == "t2v" else {"image_dim": 8}
    dit = DiTConfig(
        task=task, dim=16, mlp_dim=16, num_heads=1, num_layers=1, in_channels=channels[0], out_channels=channels[1], **image
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        WanConfig(dit=dit, vae=SMALL_VAE)
    fitting = dataclasses.replace(dit, in_channels=6 if task == "t2v" else 16, out_channels=6)
    assert WanConfig(dit=fitting, vae=SMALL_VAE).vae.z_dim == 6


IMAGE = ImageEncoderConfig(image_size=28, dim=80, mlp_dim=96, num_heads=1, num_layers=2)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (WAN_T2V_14B.dit, {"num_layers": 10**9}, "num_layers=1000000000 is not a whole number in 1 to 1,000"),
        (WAN_T2V_14B.dit, {"dim": 5120.0}, "dim=5120.0 is not a whole number in 1 to 1,048,576"),
        (WAN_T2V_14B.dit, {"mlp_dim": True}, "mlp_dim=True is not a whole number"),
        (WAN_T2V_14B.dit, {"num_heads": 0}, "num_heads=0 is not a whole number"),
        (WAN_T2V_14B.dit, {"num_heads": 7}, "dim=5120 with num_heads=7 doesn't give an even head dim"),
        (WAN_T2V_14B.dit, {"num_heads": 1024}, "dim=5120 with num_heads=1024 doesn't give an even head dim"),
        (WAN_T2V_14B.dit, {"image_dim": 1280}, "task='t2v' with image_dim=1280: only t2v has no image_dim"),
        (WAN_I2V_14B.dit, {"image_dim": None}, "task='i2v' with image_dim=None: only t2v has no image_dim"),
        (WAN_T2V_14B.dit, {"mlp_dim": 10**5000}, "mlp_dim=a number of thousands of digits is not a whole number"),
        (WAN_T2V_14B.dit, {"task": "s2v"}, "task='s2v' is not one of 't2v', 'i2v', 'flf2v'"),
        (WAN_T2V_14B.dit, {"task": ["t2v"]}, "is not one of 't2v', 'i2v', 'flf2v'"),
        (WAN_T2V_14B.dit, {"patch_size": (1, 2)}, r"patch_size=\(1, 2\) is not a list of 3 of whole numbers"),
        (WAN_T2V_14B.dit, {"patch_size": 2}, "patch_size=2 is not a list of 3"),
        (WAN_T2V_14B.dit, {"patch_size": (1, 2, -2)}, "patch_size=-2 is not a whole number"),
        (WAN_T2V_14B.dit, {"eps": float("nan")}, "eps=nan is not a finite number"),
        (WAN_T2V_14B.dit, {"eps": 0}, "eps=0 is not above 0"),
        (WAN_T2V_14B.dit, {"eps": 0.2}, "eps=0.2 is not a finite number of at most 0.1"),
        (WAN_T2V_14B.dit, {"cross_attn_norm": "yes"}, "cross_attn_norm='yes' is not true or false"),
        (WAN_T2V_14B.vae, {"latents_mean": (float("inf"),) * 16}, "latents_mean=inf is not a finite number"),
        (WAN_T2V_14B.vae, {"latents_std": (float("nan"),) * 16}, "latents_std=nan is not a finite number"),
        (
            WAN_T2V_14B.vae,
            {"latents_mean": (1000001.0,) * 16},
            "latents_mean=1000001.0 is not a finite number of at most",
        ),
        (WAN_T2V_14B.vae, {"dim_mult": (1,) * 1001}, r"dim_mult=\(1, 1, .* is not a list of whole numbers"),
        (WAN_T2V_14B.vae, {"temporal_downsample": (0, 1, 1)}, "temporal_downsample=0 is not true or false"),
        (WAN_T2V_14B.vae, {"dim_mult": ()}, r"dim_mult=\(\) is not a list of whole numbers"),
        (WAN_T2V_14B.text_encoder, {"vocab_size": 2**40}, "vocab_size=1099511627776 is not a whole number in 1 to"),
        (IMAGE, {"num_heads": 3}, "dim=80 isn't a multiple of num_heads=3"),
        (IMAGE, {"patch_size": 13}, "image_size=28 isn't a multiple of patch_size=13"),
        (WAN_T2V_14B, {"flow_shift": float("nan")}, "flow_shift=nan is not a finite number"),
        (WAN_T2V_14B, {"flow_shift": -1.0}, "flow_shift=-1.0 is not a positive number of at most 1000"),
        (WAN_T2V_14B, {"flow_shift": 0.0}, "flow_shift=0.0 is not a positive number of at most 1000"),
        (WAN_I2V_14B, {"causal": CausalConfig()}, "causal is set for a i2v model; block diffusion is for t2v models"),
        (WAN_T2V_14B, {"flow_shift_480p": 1e6}, "flow_shift_480p=1000000.0 is not a positive number of at most 1000"),
        (SamplingDefaults(), {"height": 0}, "height=0 is not a whole number in 1 to"),
        (SamplingDefaults(), {"num_frames": 81.0}, "num_frames=81.0 is not a whole number"),
        (SamplingDefaults(), {"num_inference_steps": 2**40}, "num_inference_steps=1099511627776 is not a whole number"),
        (SamplingDefaults(), {"guidance_scale": float("nan")}, "guidance_scale=nan is not a finite number"),
        (SamplingDefaults(), {"guidance_scale": 1000.0}, r"guidance_scale=1000.0 is not a number in \[0, 1000\)"),
        (SamplingDefaults(), {"negative_prompt": 3}, "negative_prompt=3 is not a text"),
        (WAN_T2V_14B, {"vae": {"z_dim": 16}}, "vae={'z_dim': 16} is not a VAEConfig"),
        (WAN_T2V_14B, {"preset": "turbo"}, "preset='turbo' is not one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_field_is_of_its_type_and_in_bounds_whoever_makes_the_config(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_parts_of_a_record_that_are_no_objects_are_told():
    for part in ("dit", "vae", "text_encoder", "sampling"):
        with pytest.raises(ValueError, match=f"{part} is a list, not an object of fields"):
            WanConfig.from_dict(WAN_T2V_14B.to_dict() | {part: [1]})
