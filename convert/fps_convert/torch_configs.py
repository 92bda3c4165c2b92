"""The JSON files of both real layouts, written from a config.

Those of a component take the dtype that most of its tensors have, of which only transformers' files speak.
"""

import json
import pathlib
from typing import Any

from fps_jax.config import DiTConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig, WanConfig

_DIFFUSERS = "0.33.0"  # the first release with every part that these files name


def official_dit(config: DiTConfig, dtype: str) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.mlp_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": config.task,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }


def diffusers_dit(config: DiTConfig, dtype: str) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": _DIFFUSERS,
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": config.cross_attn_norm,
        "eps": config.eps,
        "ffn_dim": config.mlp_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": config.image_positions,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
        # diffusers has it as an argument of its pipelines, 512; where it isn't that, no file of theirs would say so
        **({} if config.text_len == 512 else {"text_len": config.text_len}),
    }


def diffusers_vae(config: VAEConfig, dtype: str) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": _DIFFUSERS,
        "attn_scales": [],
        "base_dim": config.base_dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


def diffusers_text_encoder(config: TextEncoderConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": config.mlp_dim,
        "d_kv": config.head_dim,
        "d_model": config.dim,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "umt5",
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "scalable_attention": True,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }


def diffusers_image_encoder(config: ImageEncoderConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": config.dim,
        "image_size": config.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers,
        "patch_size": config.patch_size,
        "projection_dim": config.projection_dim or 1024,
        "torch_dtype": dtype,
    }


def diffusers_image_processor(config: ImageEncoderConfig) -> dict[str, Any]:
    size = config.image_size
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size},
    }


def diffusers_scheduler(flow_shift: float) -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": _DIFFUSERS,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "disable_corrector": [],
        "dynamic_thresholding_ratio": 0.995,
        "final_sigmas_type": "zero",
        "flow_shift": flow_shift,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_p": None,
        "solver_type": "bh2",
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "trained_betas": None,
        "use_beta_sigmas": False,
        "use_exponential_sigmas": False,
        "use_flow_sigmas": True,
        "use_karras_sigmas": False,
    }


def _pipeline(config: WanConfig) -> str:
    """The pipeline's class. FastVideo's is a way of sampling, which `infer.preset` reads back."""
    if config.preset == "dmd":
        return "WanDMDPipeline"
    return "WanPipeline" if config.task == "t2v" else "WanImageToVideoPipeline"


def diffusers_index(config: WanConfig, tokenizer_class: str) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": _pipeline(config),
        "_diffusers_version": _DIFFUSERS,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer_class],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if config.task != "t2v":
        tower = config.image_encoder is not None
        index["image_encoder"] = ["transformers", "CLIPVisionModel"] if tower else [None, None]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if tower else [None, None]
    return index


def tokenizer_class(tokenizer_dir: pathlib.Path) -> str:
    """The class that diffusers should load: the one that the tokenizer's own files name, in its fast form."""
    try:
        named = json.loads((tokenizer_dir / "tokenizer_config.json").read_bytes()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        named = None
    return named if named == "TokenizersBackend" else "T5TokenizerFast"
