"""Configs that can't be are refused when they are made, in one line."""

import dataclasses
import json

import pytest

from fps_jax.config import WAN_FLF2V_14B, WAN_I2V_14B, WAN_T2V_1_3B, WAN_T2V_14B, DiTConfig, VAEConfig, WanConfig

SMALL_VAE = VAEConfig(base_dim=8, z_dim=6, latents_mean=(0.0,) * 6, latents_std=(1.0,) * 6)


@pytest.mark.parametrize("config", [WAN_T2V_1_3B, WAN_T2V_14B, WAN_I2V_14B, WAN_FLF2V_14B])
def test_wans_own_come_back_from_json(config):
    assert WanConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


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
