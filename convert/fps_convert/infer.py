"""A checkpoint's config: from its JSON files where they say it, from tensor shapes where no file does."""

import collections
import math
import pathlib
import re
from typing import Any, Literal, cast

from fps_convert.formats.readers import Reader
from fps_convert.mapping import Layout
from fps_jax.config import LATENTS_MEAN, DiTConfig, ImageEncoderConfig, Task, TextEncoderConfig, VAEConfig


class _Shapes:
    """Sizes read off the shapes of many tensors, so that one wrong tensor is reported and not believed."""

    def __init__(self, reader: Reader, what: str, where: pathlib.Path):
        self.shapes = {key: info.shape for key, info in reader.tensors.items()}
        self.what, self.where = what, where

    def size(self, pattern: str, axis: int) -> int:
        """The most common size along `axis` of the tensors whose whole key matches."""
        found = collections.Counter(
            shape[axis]
            for key, shape in self.shapes.items()
            if re.fullmatch(pattern, key) and -len(shape) <= axis < len(shape)
        )
        if not found:
            example = pattern.replace("\\", "").replace("d+", "0")
            raise ValueError(f"{self.where} is not {self.what}: it has no tensor {example!r}; it may be another model")
        return found.most_common(1)[0][0]

    def layers(self, pattern: str) -> int:
        """1 + the largest number that the pattern's group matches."""
        numbers = [int(match[1]) for key in self.shapes if (match := re.match(pattern, key))]
        return max(numbers, default=0) + 1

    def any(self, pattern: str) -> bool:
        return any(re.search(pattern, key) for key in self.shapes)


def _file(where: pathlib.Path) -> pathlib.Path:
    return where / "config.json" if where.is_dir() else where


def _stated(config: dict[str, Any], name: str, kind: type, where: pathlib.Path, default: Any = None) -> Any:
    """A field of a JSON config, checked to be of its kind. Without `default` it must be there."""
    value = config.get(name, default)
    good = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if value is None or isinstance(value, bool) != (kind is bool) or not good or (kind is int and value <= 0):
        raise ValueError(
            f"{_file(where)}: {name}={value!r} should be of type {kind.__name__}; restore the original file"
        )
    return kind(value)


def _listed(config: dict[str, Any], name: str, default: tuple, where: pathlib.Path) -> tuple:
    """A list of numbers in a JSON config."""
    value = config.get(name, default)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(n, int | float) for n in value):
        raise ValueError(f"{_file(where)}: {name}={value!r} should be a list of numbers; restore the original file")
    return tuple(value)


def dit(layout: Layout, reader: Reader, config: dict[str, Any], where: pathlib.Path) -> DiTConfig:
    """The DiT's config; the task goes by the tensors, never by `_class_name`.

    Raises: NotImplementedError for Wan models other than 2.1's T2V, I2V and FLF2V; ValueError where this is no Wan DiT.
    """
    official = layout == "official"
    shapes = _Shapes(reader, f"a Wan DiT in the {layout} layout", where)
    if config.get("model_type") == "vace" or shapes.any(r"^vace_"):
        raise NotImplementedError(f"{where} is a VACE model; supported are Wan2.1 T2V, I2V and FLF2V")
    if config.get("model_type") in ("s2v", "animate") or shapes.any(r"^(audio|casual_audio|face_|ref_conv|control_)"):
        raise NotImplementedError(f"{where} has parts beyond Wan2.1 T2V, I2V and FLF2V, which are what is supported")
    if official:
        names = {"dim": "dim", "mlp": "ffn_dim", "heads": "num_heads", "ins": "in_dim", "outs": "out_dim"}
        text, time, image = "text_embedding.0.weight", "time_embedding.0.weight", "img_emb.proj.0.(weight|bias)"
        image_keys, positions = r"^(blocks\.\d+\.cross_attn\.(k_img|v_img)|img_emb\.proj)\b", "img_emb.emb_pos"
        norm = r"^blocks\.\d+\.norm3\."
    else:
        names = {
            "dim": "",
            "mlp": "ffn_dim",
            "heads": "num_attention_heads",
            "ins": "in_channels",
            "outs": "out_channels",
        }
        text, time = (f"condition_embedder.{name}_embedder.linear_1.weight" for name in ("text", "time"))
        image = "condition_embedder.image_embedder.norm1.(weight|bias)"
        image_keys = r"^(blocks\.\d+\.attn2\.add_[kv]_proj|condition_embedder\.image_embedder\.(ff|norm))\b"
        positions, norm = "condition_embedder.image_embedder.pos_embed", r"^blocks\.\d+\.norm2\."
        qk_norm = config.get("qk_norm", "rms_norm_across_heads")
        if qk_norm != "rms_norm_across_heads":
            raise NotImplementedError(f"{where}: qk_norm={qk_norm!r}; Wan2.1 models have 'rms_norm_across_heads'")
    text_dim = shapes.size(re.escape(text), 1)  # first: it tells a DiT of this layout from anything else
    heads = _stated(config, names["heads"], int, where)
    dim = _stated(config, "dim", int, where) if official else heads * _stated(config, "attention_head_dim", int, where)
    patch_size = tuple(shapes.size(r"patch_embedding\.weight", axis) for axis in (2, 3, 4))
    if not official:
        patch_size = _listed(config, "patch_size", patch_size, where)
    ins, outs = (_stated(config, names[name], int, where) for name in ("ins", "outs"))
    has_image, has_positions = shapes.any(image_keys), positions in shapes.shapes
    task: Task = "flf2v" if has_image and has_positions else "i2v" if has_image else "t2v"
    if ins != (2 * outs + 4 if has_image else outs):
        raise NotImplementedError(
            f"{where}: {ins} input and {outs} output channels {'with' if has_image else 'without'} image attention is "
            "no Wan2.1 T2V (as many in as out), I2V or FLF2V model (2 x out + 4 in, with image attention)"
        )
    return DiTConfig(
        task=task,
        dim=dim,
        mlp_dim=_stated(config, names["mlp"], int, where),
        num_heads=heads,
        num_layers=_stated(config, "num_layers", int, where),
        in_channels=ins,
        out_channels=outs,
        patch_size=cast(tuple[int, int, int], patch_size),
        freq_dim=_stated(config, "freq_dim", int, where, shapes.size(re.escape(time), 1)),
        text_dim=text_dim if official else _stated(config, "text_dim", int, where, text_dim),
        text_len=_stated(config, "text_len", int, where, 512),
        image_dim=shapes.size(image, 0) if has_image else None,
        image_positions=shapes.size(re.escape(positions), -2) if task == "flf2v" else None,
        cross_attn_norm=shapes.any(norm),
        eps=_stated(config, "eps", float, where, 1e-6),
    )


def vae(layout: Layout, reader: Reader, config: dict[str, Any], where: pathlib.Path) -> VAEConfig:
    """The VAE's config. Official files hold none: width and z_dim go by shapes, the rest is Wan2.1's."""
    shapes = _Shapes(reader, f"a Wan2.1 VAE in the {layout} layout", where)
    wan22 = shapes.any(r"samples\.\d+\.(down|up)samples\.|avg_shortcut|down_blocks\.\d+\.(resnets|downsampler)")
    if wan22 or config.get("is_residual") or config.get("patch_size") is not None:
        raise NotImplementedError(f"{where} is a Wan2.2 VAE (residual, patched); only Wan2.1's VAE is supported")
    if layout == "official":
        base = shapes.size(r"encoder\.(conv1\.(weight|bias)|downsamples\.[01]\.residual\.[26]\.bias)", 0)
        z_dim = shapes.size(r"conv2\.(weight|bias)", 0)
        if z_dim != len(LATENTS_MEAN):
            raise NotImplementedError(
                f"{where}: z_dim={z_dim}, but official files hold no latent statistics and Wan's own are for "
                f"{len(LATENTS_MEAN)} channels; use the diffusers layout, whose config.json holds them"
            )
        return VAEConfig(base_dim=base, z_dim=z_dim)
    base = shapes.size(r"encoder\.(conv_in\.(weight|bias)|down_blocks\.[01]\.conv[12]\.bias)", 0)
    z_dim = _stated(config, "z_dim", int, where, shapes.size(r"post_quant_conv\.(weight|bias)", 0))
    plain = VAEConfig()
    base = _stated(config, "base_dim", int, where, base)
    for name, wanted in (("decoder_base_dim", base), ("in_channels", 3), ("out_channels", 3)):
        if config.get(name) not in (None, wanted):
            raise NotImplementedError(f"{where}: {name}={config[name]!r}; Wan2.1's VAE has {wanted}")
    if config.get("attn_scales"):
        raise NotImplementedError(f"{where}: attn_scales={config['attn_scales']!r}; Wan2.1's VAE has none")
    lists = {
        "dim_mult": _listed(config, "dim_mult", plain.dim_mult, where),
        "temporal_downsample": _listed(config, "temperal_downsample", plain.temporal_downsample, where),
        "latents_mean": _listed(config, "latents_mean", plain.latents_mean, where),
        "latents_std": _listed(config, "latents_std", plain.latents_std, where),
    }
    for name, length in (
        ("latents_mean", z_dim),
        ("latents_std", z_dim),
        ("temporal_downsample", len(lists["dim_mult"]) - 1),
    ):
        if len(lists[name]) != length:
            raise ValueError(f"{where}: {name} has {len(lists[name])} entries, this VAE needs {length}")
    return VAEConfig(
        base_dim=base, z_dim=z_dim, num_res_blocks=_stated(config, "num_res_blocks", int, where, 2), **lists
    )


def text_encoder(layout: Layout, reader: Reader, config: dict[str, Any], where: pathlib.Path) -> TextEncoderConfig:
    """UMT5's config; every size is in the shapes, and a config.json that says otherwise is an error at the tensor."""
    shapes = _Shapes(reader, f"a UMT5 encoder in the {layout} layout", where)
    if config.get("dense_act_fn", "gelu_new") != "gelu_new" or not config.get("is_gated_act", True):
        raise NotImplementedError(f"{where}: dense_act_fn={config.get('dense_act_fn')!r}; UMT5 has a gated 'gelu_new'")
    if layout == "official":
        block = r"blocks\.\d+\."
        embedding, norm, bias = (
            "token_embedding.weight",
            block + r"norm[12]\.weight",
            r"pos_embedding\.embedding\.weight",
        )
        q, up, count = block + r"attn\.[qkv]\.weight", block + r"ffn\.(gate\.0|fc1)\.weight", r"blocks\.(\d+)\."
    else:
        block = r"encoder\.block\.\d+\.layer\.\d+\."
        embedding, norm = "shared.weight", block + r"layer_norm\.weight"
        bias, q = r"SelfAttention\.relative_attention_bias\.weight", block + r"SelfAttention\.[qkv]\.weight"
        up, count = block + r"DenseReluDense\.wi_[01]\.weight", r"encoder\.block\.(\d+)\."
    num_heads = _stated(config, "num_heads", int, where, shapes.size(block + bias, 1))
    return TextEncoderConfig(
        vocab_size=_stated(config, "vocab_size", int, where, shapes.size(re.escape(embedding), 0)),
        dim=_stated(config, "d_model", int, where, shapes.size(norm, 0)),
        mlp_dim=_stated(config, "d_ff", int, where, shapes.size(up, 0)),
        num_heads=num_heads,
        head_dim=_stated(config, "d_kv", int, where, shapes.size(q, 0) // num_heads),
        num_layers=_stated(config, "num_layers", int, where, shapes.layers(count)),
        num_buckets=_stated(config, "relative_attention_num_buckets", int, where, shapes.size(block + bias, 0)),
        max_distance=_stated(config, "relative_attention_max_distance", int, where, 128),
        eps=_stated(config, "layer_norm_epsilon", float, where, 1e-6),
    )


def _vit_heads(dim: int, where: pathlib.Path) -> int:
    """Heads of an official tower, which no official file holds: ViT-H's head width 80, else ViT-H's 16 heads."""
    if dim % 80 == 0:
        return dim // 80
    if dim % 16 == 0:
        return 16
    raise NotImplementedError(f"{where}: width {dim} has neither heads of width 80 nor 16 heads, as CLIP ViT-H has")


def image_encoder(
    layout: Layout, reader: Reader, config: dict[str, Any], where: pathlib.Path, num_heads: int | None = None
) -> ImageEncoderConfig:
    """The image tower's config. `num_heads`: what a previous conversion noted for an official directory."""
    shapes = _Shapes(reader, f"a CLIP image tower in the {layout} layout", where)
    vision = config.get("vision_config", config)
    if vision.get("hidden_act", "gelu") != "gelu":
        raise NotImplementedError(f"{where}: hidden_act={vision['hidden_act']!r}; Wan's CLIP tower has 'gelu'")
    if layout == "official":
        block, mlp = r"visual\.transformer\.\d+\.", r"mlp\.0\.(weight|bias)"
        patch, positions = r"visual\.patch_embedding\.weight", r"visual\.pos_embedding"
        norm, count = block + r"norm[12]\.(weight|bias)", r"visual\.transformer\.(\d+)\."
    else:
        block, mlp = r"vision_model\.encoder\.layers\.\d+\.", r"mlp\.fc1\.(weight|bias)"
        patch, positions = (
            r"vision_model\.embeddings\.patch_embedding\.weight",
            r"vision_model\.embeddings\.position_embedding\.weight",
        )
        norm, count = block + r"layer_norm[12]\.(weight|bias)", r"vision_model\.encoder\.layers\.(\d+)\."
    dim = _stated(vision, "hidden_size", int, where, shapes.size(norm, 0))
    patch_size = _stated(vision, "patch_size", int, where, shapes.size(patch, -1))
    side = math.isqrt(max(shapes.size(positions, -2) - 1, 0))
    heads = (
        _stated(vision, "num_attention_heads", int, where, num_heads) if vision or num_heads else _vit_heads(dim, where)
    )
    head = "visual.head"
    return ImageEncoderConfig(
        image_size=_stated(vision, "image_size", int, where, side * patch_size),
        patch_size=patch_size,
        dim=dim,
        mlp_dim=_stated(vision, "intermediate_size", int, where, shapes.size(block + mlp, 0)),
        num_heads=heads,
        num_layers=_stated(vision, "num_hidden_layers", int, where, shapes.layers(count)),
        projection_dim=shapes.size(re.escape(head), -1) if head in shapes.shapes else None,
        eps=_stated(vision, "layer_norm_eps", float, where, 1e-5),
    )


# What the official code takes for a task; its files don't say. The second one: up to 480 x 832 pixels.
OFFICIAL_FLOW_SHIFT: dict[Task, tuple[float, float | None]] = {
    "t2v": (5.0, None),
    "i2v": (5.0, 3.0),
    "flf2v": (16.0, None),
}


def flow_shift(
    layout: Layout, task: Task, scheduler: dict[str, Any], where: pathlib.Path
) -> tuple[float, float | None]:
    """`(flow_shift, flow_shift_480p)`: the scheduler's in diffusers; official: 5, I2V up to 480x832 3, FLF2V 16."""
    if layout == "official":
        return OFFICIAL_FLOW_SHIFT[task]
    name: Literal["flow_shift", "shift"] = "flow_shift" if "flow_shift" in scheduler else "shift"
    shift = _stated(scheduler, name, float, where)
    if shift <= 0:
        raise ValueError(f"{where}: {name}={shift} must be positive")
    return shift, None
