"""What a config is read from, in each naming: tensors whose shapes say a size, and fields of config.json.

Patterns are regular expressions for a whole key, but for those that say otherwise. `fields` is our name of a size to theirs; a
size that isn't there goes by the shapes alone.
"""

from dataclasses import dataclass, field

from fps_convert.mapping import Naming


@dataclass(frozen=True, kw_only=True)
class DiTPatterns:
    """`text`, `time`, `positions`: keys. `has_image`, `has_norm`: for the beginning of keys of a model that has such a part."""

    fields: dict[str, str]
    q: str
    up: str
    head: str
    text: str
    time: str
    image: str
    has_image: str
    positions: str
    has_norm: str


@dataclass(frozen=True, kw_only=True)
class VAEPatterns:
    base: str
    z_dim: str
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextEncoderPatterns:
    """`embedding`: a key. `layers`: for the beginning of a key; its group is the layer's number."""

    embedding: str
    norm: str
    bias: str
    q: str
    up: str
    layers: str


@dataclass(frozen=True, kw_only=True)
class ImageEncoderPatterns:
    """`layers`: for the beginning of a key; its group is the layer's number."""

    patch: str
    positions: str
    norm: str
    up: str
    layers: str


DIT: dict[Naming, DiTPatterns] = {
    "official": DiTPatterns(
        fields={
            "dim": "dim",
            "mlp_dim": "ffn_dim",
            "num_heads": "num_heads",
            "num_layers": "num_layers",
            "in_channels": "in_dim",
            "out_channels": "out_dim",
            "freq_dim": "freq_dim",
            "text_len": "text_len",
            "eps": "eps",
        },
        q=r"blocks\.\d+\.self_attn\.q\.weight",
        up=r"blocks\.\d+\.ffn\.0\.weight",
        head=r"head\.head\.(weight|bias)",
        text="text_embedding.0.weight",
        time="time_embedding.0.weight",
        image="img_emb.proj.0.(weight|bias)",
        has_image=r"^(blocks\.\d+\.cross_attn\.(k_img|v_img)|img_emb\.proj)\b",
        positions="img_emb.emb_pos",
        has_norm=r"^blocks\.\d+\.norm3\.",
    ),
    "diffusers": DiTPatterns(
        fields={
            "head_dim": "attention_head_dim",
            "mlp_dim": "ffn_dim",
            "num_heads": "num_attention_heads",
            "num_layers": "num_layers",
            "in_channels": "in_channels",
            "out_channels": "out_channels",
            "patch_size": "patch_size",
            "freq_dim": "freq_dim",
            "text_dim": "text_dim",
            "text_len": "text_len",
            "eps": "eps",
            "qk_norm": "qk_norm",
        },
        q=r"blocks\.\d+\.attn1\.to_q\.weight",
        up=r"blocks\.\d+\.ffn\.net\.0\.proj\.weight",
        head=r"proj_out\.(weight|bias)",
        text="condition_embedder.text_embedder.linear_1.weight",
        time="condition_embedder.time_embedder.linear_1.weight",
        image="condition_embedder.image_embedder.norm1.(weight|bias)",
        has_image=r"^(blocks\.\d+\.attn2\.add_[kv]_proj|condition_embedder\.image_embedder\.(ff|norm))\b",
        positions="condition_embedder.image_embedder.pos_embed",
        has_norm=r"^blocks\.\d+\.norm2\.",
    ),
}
VAE: dict[Naming, VAEPatterns] = {
    "official": VAEPatterns(
        base=r"encoder\.(conv1\.(weight|bias)|downsamples\.[01]\.residual\.[26]\.bias)", z_dim=r"conv2\.(weight|bias)"
    ),
    "diffusers": VAEPatterns(
        base=r"encoder\.(conv_in\.(weight|bias)|down_blocks\.[01]\.conv[12]\.bias)",
        z_dim=r"post_quant_conv\.(weight|bias)",
        fields={
            "base_dim": "base_dim",
            "z_dim": "z_dim",
            "dim_mult": "dim_mult",
            "num_res_blocks": "num_res_blocks",
            "temporal_downsample": "temperal_downsample",
            "latents_mean": "latents_mean",
            "latents_std": "latents_std",
        },
    ),
}
_T5_LAYER, _HF_T5_LAYER = r"blocks\.\d+\.", r"encoder\.block\.\d+\.layer\.\d+\."
TEXT_ENCODER: dict[Naming, TextEncoderPatterns] = {
    "official": TextEncoderPatterns(
        embedding="token_embedding.weight",
        norm=_T5_LAYER + r"norm[12]\.weight",
        bias=_T5_LAYER + r"pos_embedding\.embedding\.weight",
        q=_T5_LAYER + r"attn\.[qkv]\.weight",
        up=_T5_LAYER + r"ffn\.(gate\.0|fc1)\.weight",
        layers=r"blocks\.(\d+)\.",
    ),
    "diffusers": TextEncoderPatterns(
        embedding="shared.weight",
        norm=_HF_T5_LAYER + r"layer_norm\.weight",
        bias=_HF_T5_LAYER + r"SelfAttention\.relative_attention_bias\.weight",
        q=_HF_T5_LAYER + r"SelfAttention\.[qkv]\.weight",
        up=_HF_T5_LAYER + r"DenseReluDense\.wi_[01]\.weight",
        layers=r"encoder\.block\.(\d+)\.",
    ),
}
_VIT_LAYER, _HF_VIT_LAYER = r"visual\.transformer\.\d+\.", r"vision_model\.encoder\.layers\.\d+\."
IMAGE_ENCODER: dict[Naming, ImageEncoderPatterns] = {
    "official": ImageEncoderPatterns(
        patch=r"visual\.patch_embedding\.weight",
        positions=r"visual\.pos_embedding",
        norm=_VIT_LAYER + r"norm[12]\.(weight|bias)",
        up=_VIT_LAYER + r"mlp\.0\.(weight|bias)",
        layers=r"visual\.transformer\.(\d+)\.",
    ),
    "diffusers": ImageEncoderPatterns(
        patch=r"vision_model\.embeddings\.patch_embedding\.weight",
        positions=r"vision_model\.embeddings\.position_embedding\.weight",
        norm=_HF_VIT_LAYER + r"layer_norm[12]\.(weight|bias)",
        up=_HF_VIT_LAYER + r"mlp\.fc1\.(weight|bias)",
        layers=r"vision_model\.encoder\.layers\.(\d+)\.",
    ),
}
