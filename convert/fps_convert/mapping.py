"""Key tables: for every parameter of ours, its official and its diffusers key, its shape and how the array is turned.

A table is a list of rows, made from the config alone. Rows that name one key share it, concatenated along its first axis in
the order of the table (official CLIP's fused qkv). Three forms turn an array, each a view both ways:

  same    ours is the source reshaped (vectors, tables, modulation)
  linear  ours [in, out], source [out, in, 1...] (a patch embedding's kernel counts as in)
  conv    ours [spatial..., in, out], source [out, in, spatial...]
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from fps_jax.config import Component, DiTConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig, WanConfig

Naming = Literal["official", "diffusers"]  # whose names tensors have: a column of the tables
Form = Literal["same", "linear", "conv"]
Shape = tuple[int, ...]
NAMINGS: tuple[Naming, ...] = get_args(Naming)
# Parts of source files that Wan never uses: listed in the audit, left out.
UNUSED: dict[Component, tuple[str, ...]] = {
    "dit": (),
    "vae": (),
    "text_encoder": ("decoder.", "lm_head.", "logit_scale"),
    "image_encoder": (
        "textual.", "log_scale", "text_model.", "text_projection.", "visual_projection.", "logit_scale",
        "vision_model.embeddings.position_ids",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One parameter of ours (of one layer, where `layer` is set) and where it comes from."""

    path: str
    layer: int | None
    form: Form
    shape: Shape  # ours, without the layer axis
    keys: dict[Naming, str]  # a naming that has no such tensor isn't there
    shapes: dict[Naming, Shape]  # of the source tensor, or of this row's part of a shared one


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a source, with the rows that are cut from it along its first axis."""

    key: str
    shape: Shape
    rows: tuple[Row, ...]


def to_ours(tensor: np.ndarray, row: Row) -> np.ndarray:
    """A view of a source tensor (or its part) in our shape."""
    if row.form == "linear":
        return tensor.reshape(tensor.shape[0], -1).T
    if row.form == "conv":
        return tensor.transpose(*range(2, tensor.ndim), 1, 0)
    return tensor.reshape(row.shape)


def from_ours(leaf: np.ndarray, row: Row, naming: Naming) -> np.ndarray:
    """A view of a parameter in the source's shape; exact inverse of `to_ours`. A linear one stays 2-D: [out, in]."""
    if row.form == "linear":
        return leaf.T
    if row.form == "conv":
        return leaf.transpose(-1, -2, *range(leaf.ndim - 2))
    return leaf.reshape(row.shapes[naming])


class _Table:
    """Collects rows; `layer` numbers them while a stacked block is written."""

    def __init__(self):
        self.rows: list[Row] = []
        self.layer: int | None = None

    def add(
        self,
        path: str,
        official: str | None,
        diffusers: str | None,
        source: Shape,
        form: Form = "same",
        *,
        ours: Shape | None = None,
        diffusers_shape: Shape | None = None,
    ) -> None:
        """`source`: the source tensor's shape; `ours`: for form `same`, if it differs."""
        if form == "linear":
            ours = (math.prod(source[1:]), source[0])
        elif form == "conv":
            ours = (*source[2:], source[1], source[0])
        keys = {"official": official, "diffusers": diffusers}
        self.rows.append(
            Row(
                path,
                self.layer,
                form,
                source if ours is None else ours,
                {cast(Naming, naming): key.format(i=self.layer) for naming, key in keys.items() if key is not None},
                {"official": source, "diffusers": source if diffusers_shape is None else diffusers_shape},
            )
        )

    def linear(self, path: str, official: str, diffusers: str, outs: int, ins: int, *, bias: bool = True) -> None:
        self.add(f"{path}/kernel", f"{official}.weight", f"{diffusers}.weight", (outs, ins), "linear")
        if bias:
            self.add(f"{path}/bias", f"{official}.bias", f"{diffusers}.bias", (outs,))

    def norm(self, path: str, official: str, diffusers: str, dim: int, *, bias: bool = False) -> None:
        self.add(f"{path}/scale", f"{official}.weight", f"{diffusers}.weight", (dim,))
        if bias:
            self.add(f"{path}/bias", f"{official}.bias", f"{diffusers}.bias", (dim,))


def _dit(config: DiTConfig) -> list[Row]:
    table, dim, mlp = _Table(), config.dim, config.mlp_dim
    cond, image, block = "condition_embedder", "condition_embedder.image_embedder", "blocks.{i}"
    patches = (dim, config.in_channels, *config.patch_size)
    table.add("patch_embedding/kernel", "patch_embedding.weight", "patch_embedding.weight", patches, "linear")
    table.add("patch_embedding/bias", "patch_embedding.bias", "patch_embedding.bias", (dim,))
    table.linear("text_embedding/up", "text_embedding.0", f"{cond}.text_embedder.linear_1", dim, config.text_dim)
    table.linear("text_embedding/down", "text_embedding.2", f"{cond}.text_embedder.linear_2", dim, dim)
    table.linear("time_embedding/up", "time_embedding.0", f"{cond}.time_embedder.linear_1", dim, config.freq_dim)
    table.linear("time_embedding/down", "time_embedding.2", f"{cond}.time_embedder.linear_2", dim, dim)
    table.linear("time_projection", "time_projection.1", f"{cond}.time_proj", 6 * dim, dim)
    if config.image_dim is not None:
        wide = config.image_dim
        table.norm("image_embedding/norm_in", "img_emb.proj.0", f"{image}.norm1", wide, bias=True)
        table.linear("image_embedding/up", "img_emb.proj.1", f"{image}.ff.net.0.proj", wide, wide)
        table.linear("image_embedding/down", "img_emb.proj.3", f"{image}.ff.net.2", dim, wide)
        table.norm("image_embedding/norm_out", "img_emb.proj.4", f"{image}.norm2", dim, bias=True)
        if config.image_positions is not None:
            positions = (config.image_positions, wide)
            table.add(
                "image_embedding/positions", "img_emb.emb_pos", f"{image}.pos_embed", (1, *positions), ours=positions
            )
    for table.layer in range(config.num_layers):
        table.add("blocks/modulation", f"{block}.modulation", f"{block}.scale_shift_table", (1, 6, dim), ours=(6, dim))
        for ours, official, diffusers in (
            ("self_attn", f"{block}.self_attn", f"{block}.attn1"),
            ("cross_attn", f"{block}.cross_attn", f"{block}.attn2"),
        ):
            for name, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                table.linear(f"blocks/{ours}/{name}", f"{official}.{name}", f"{diffusers}.{theirs}", dim, dim)
            for name in ("norm_q", "norm_k"):
                table.norm(f"blocks/{ours}/{name}", f"{official}.{name}", f"{diffusers}.{name}", dim)
            if ours == "cross_attn" and config.image_dim is not None:
                for name, theirs in (("k_img", "add_k_proj"), ("v_img", "add_v_proj")):
                    table.linear(f"blocks/{ours}/{name}", f"{official}.{name}", f"{diffusers}.{theirs}", dim, dim)
                table.norm(f"blocks/{ours}/norm_k_img", f"{official}.norm_k_img", f"{diffusers}.norm_added_k", dim)
        if config.cross_attn_norm:
            table.norm("blocks/norm_cross", f"{block}.norm3", f"{block}.norm2", dim, bias=True)
        table.linear("blocks/mlp/up", f"{block}.ffn.0", f"{block}.ffn.net.0.proj", mlp, dim)
        table.linear("blocks/mlp/down", f"{block}.ffn.2", f"{block}.ffn.net.2", dim, mlp)
    table.layer = None
    table.add("head/modulation", "head.modulation", "scale_shift_table", (1, 2, dim), ours=(2, dim))
    table.linear("head/proj", "head.head", "proj_out", config.out_channels * math.prod(config.patch_size), dim)
    return table.rows


def _text_encoder(config: TextEncoderConfig) -> list[Row]:
    table, dim, inner = _Table(), config.dim, config.num_heads * config.head_dim
    table.add("token_embedding/embedding", "token_embedding.weight", "shared.weight", (config.vocab_size, dim))
    attn, mlp = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
    for table.layer in range(config.num_layers):
        table.norm("blocks/norm1", "blocks.{i}.norm1", f"{attn}.layer_norm", dim)
        for name in "qkv":
            official, diffusers = f"blocks.{{i}}.attn.{name}", f"{attn}.SelfAttention.{name}"
            table.linear(f"blocks/attn/{name}", official, diffusers, inner, dim, bias=False)
        table.linear("blocks/attn/o", "blocks.{i}.attn.o", f"{attn}.SelfAttention.o", dim, inner, bias=False)
        table.norm("blocks/norm2", "blocks.{i}.norm2", f"{mlp}.layer_norm", dim)
        dense = f"{mlp}.DenseReluDense"
        table.linear("blocks/mlp/gate", "blocks.{i}.ffn.gate.0", f"{dense}.wi_0", config.mlp_dim, dim, bias=False)
        table.linear("blocks/mlp/up", "blocks.{i}.ffn.fc1", f"{dense}.wi_1", config.mlp_dim, dim, bias=False)
        table.linear("blocks/mlp/down", "blocks.{i}.ffn.fc2", f"{dense}.wo", dim, config.mlp_dim, bias=False)
        table.add(
            "blocks/rel_bias/embedding",
            "blocks.{i}.pos_embedding.embedding.weight",
            f"{attn}.SelfAttention.relative_attention_bias.weight",
            (config.num_buckets, config.num_heads),
        )
    table.layer = None
    table.norm("norm", "norm", "encoder.final_layer_norm", dim)
    return table.rows


def _image_encoder(config: ImageEncoderConfig) -> list[Row]:
    table, dim = _Table(), config.dim
    ours, theirs = "visual.transformer.{i}", "vision_model.encoder.layers.{i}"
    embeddings = "vision_model.embeddings"
    table.add(
        "class_embedding",
        "visual.cls_embedding",
        f"{embeddings}.class_embedding",
        (1, 1, dim),
        ours=(dim,),
        diffusers_shape=(dim,),
    )
    patches = (dim, 3, config.patch_size, config.patch_size)
    table.add(
        "patch_embedding/kernel",
        "visual.patch_embedding.weight",
        f"{embeddings}.patch_embedding.weight",
        patches,
        "conv",
    )
    positions = (config.num_tokens, dim)
    table.add(
        "positions",
        "visual.pos_embedding",
        f"{embeddings}.position_embedding.weight",
        (1, *positions),
        ours=positions,
        diffusers_shape=positions,
    )
    table.norm("norm_pre", "visual.pre_norm", "vision_model.pre_layrnorm", dim, bias=True)
    for table.layer in range(config.num_layers):
        table.norm("blocks/norm1", f"{ours}.norm1", f"{theirs}.layer_norm1", dim, bias=True)
        for name in "qkv":
            table.linear(f"blocks/attn/{name}", f"{ours}.attn.to_qkv", f"{theirs}.self_attn.{name}_proj", dim, dim)
        table.linear("blocks/attn/o", f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj", dim, dim)
        table.norm("blocks/norm2", f"{ours}.norm2", f"{theirs}.layer_norm2", dim, bias=True)
        table.linear("blocks/mlp/up", f"{ours}.mlp.0", f"{theirs}.mlp.fc1", config.mlp_dim, dim)
        table.linear("blocks/mlp/down", f"{ours}.mlp.2", f"{theirs}.mlp.fc2", dim, config.mlp_dim)
    table.layer = None
    table.norm("norm_post", "visual.post_norm", "vision_model.post_layernorm", dim, bias=True)
    if config.projection_dim is not None:
        table.add("projection", "visual.head", None, (dim, config.projection_dim))  # already [in, out] there
    return table.rows


def _vae(config: VAEConfig) -> list[Row]:
    table, z = _Table(), config.z_dim

    def conv(path: str, official: str, diffusers: str, outs: int, ins: int, *kernel: int) -> None:
        table.add(f"{path}/kernel", f"{official}.weight", f"{diffusers}.weight", (outs, ins, *kernel), "conv")
        table.add(f"{path}/bias", f"{official}.bias", f"{diffusers}.bias", (outs,))

    def gamma(path: str, official: str, diffusers: str, dim: int, axes: int = 3) -> None:
        shape = (dim, *(1,) * axes)
        table.add(f"{path}/scale", f"{official}.gamma", f"{diffusers}.gamma", shape, ours=(dim,))

    def residual(path: str, official: str, diffusers: str, ins: int, outs: int) -> None:
        gamma(f"{path}/norm1", f"{official}.residual.0", f"{diffusers}.norm1", ins)
        conv(f"{path}/conv1", f"{official}.residual.2", f"{diffusers}.conv1", outs, ins, 3, 3, 3)
        gamma(f"{path}/norm2", f"{official}.residual.3", f"{diffusers}.norm2", outs)
        conv(f"{path}/conv2", f"{official}.residual.6", f"{diffusers}.conv2", outs, outs, 3, 3, 3)
        if ins != outs:
            conv(f"{path}/shortcut", f"{official}.shortcut", f"{diffusers}.conv_shortcut", outs, ins, 1, 1, 1)

    def middle(room: str, dim: int) -> None:
        for i, theirs in ((0, "resnets.0"), (2, "resnets.1")):
            residual(f"{room}/mid_{i}", f"{room}.middle.{i}", f"{room}.mid_block.{theirs}", dim, dim)
        path, official, diffusers = f"{room}/mid_1", f"{room}.middle.1", f"{room}.mid_block.attentions.0"
        gamma(f"{path}/norm", f"{official}.norm", f"{diffusers}.norm", dim, axes=2)
        for name, theirs, outs in (("qkv", "to_qkv", 3 * dim), ("proj", "proj", dim)):
            shape = (outs, dim, 1, 1)
            keys = (f"{official}.{theirs}", f"{diffusers}.{theirs}")
            table.add(f"{path}/{name}/kernel", f"{keys[0]}.weight", f"{keys[1]}.weight", shape, "linear")
            table.add(f"{path}/{name}/bias", f"{keys[0]}.bias", f"{keys[1]}.bias", (outs,))

    stages = len(config.dim_mult)
    dims = [config.base_dim * m for m in (1, *config.dim_mult)]
    conv("encoder/conv_in", "encoder.conv1", "encoder.conv_in", dims[0], 3, 3, 3, 3)
    i = 0
    for stage, (ins, outs) in enumerate(itertools.pairwise(dims)):
        for j in range(config.num_res_blocks):
            names = (f"encoder/down_{i}", f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}")
            residual(*names, outs if j else ins, outs)
            i += 1
        if stage < stages - 1:
            path, official, diffusers = f"encoder/down_{i}", f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}"
            conv(f"{path}/conv", f"{official}.resample.1", f"{diffusers}.resample.1", outs, outs, 3, 3)
            if config.temporal_downsample[stage]:
                conv(f"{path}/time_conv", f"{official}.time_conv", f"{diffusers}.time_conv", outs, outs, 3, 1, 1)
            i += 1
    middle("encoder", dims[-1])
    gamma("encoder/norm_out", "encoder.head.0", "encoder.norm_out", dims[-1])
    conv("encoder/conv_out", "encoder.head.2", "encoder.conv_out", 2 * z, dims[-1], 3, 3, 3)
    conv("quant_conv", "conv1", "quant_conv", 2 * z, 2 * z, 1, 1, 1)
    conv("post_quant_conv", "conv2", "post_quant_conv", z, z, 1, 1, 1)

    dims = [config.base_dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
    temporal = config.temporal_downsample[::-1]
    conv("decoder/conv_in", "decoder.conv1", "decoder.conv_in", dims[0], z, 3, 3, 3)
    middle("decoder", dims[0])
    i = 0
    for stage, (ins, outs) in enumerate(itertools.pairwise(dims)):
        ins = ins // 2 if stage else ins  # the upsampling before it halved the width
        for j in range(config.num_res_blocks + 1):
            diffusers = f"decoder.up_blocks.{stage}.resnets.{j}"
            residual(f"decoder/up_{i}", f"decoder.upsamples.{i}", diffusers, outs if j else ins, outs)
            i += 1
        if stage < stages - 1:
            path, official = f"decoder/up_{i}", f"decoder.upsamples.{i}"
            diffusers = f"decoder.up_blocks.{stage}.upsamplers.0"
            conv(f"{path}/conv", f"{official}.resample.1", f"{diffusers}.resample.1", outs // 2, outs, 3, 3)
            if temporal[stage]:
                conv(f"{path}/time_conv", f"{official}.time_conv", f"{diffusers}.time_conv", 2 * outs, outs, 3, 1, 1)
            i += 1
    gamma("decoder/norm_out", "decoder.head.0", "decoder.norm_out", dims[-1])
    conv("decoder/conv_out", "decoder.head.2", "decoder.conv_out", 3, dims[-1], 3, 3, 3)
    return table.rows


def rows(component: Component, config: WanConfig) -> list[Row]:
    """The table of one component. Raises ValueError if this model has no such component."""
    if component == "dit":
        return _dit(config.dit)
    if component == "vae":
        return _vae(config.vae)
    if component == "text_encoder":
        return _text_encoder(config.text_encoder)
    if config.image_encoder is None:
        raise ValueError(f"component={component!r}: this {config.task} model has no image tower")
    return _image_encoder(config.image_encoder)


def tensors(table: list[Row], naming: Naming) -> Iterator[SourceTensor]:
    """The tensors that `naming` has for these rows, in the table's order."""
    shared: dict[str, list[Row]] = {}
    for row in table:
        if naming in row.keys:
            shared.setdefault(row.keys[naming], []).append(row)
    for key, group in shared.items():
        first = group[0].shapes[naming]
        outs = sum(row.shapes[naming][0] for row in group) if first else 0
        yield SourceTensor(key, (outs, *first[1:]), tuple(group))


def leaves(table: list[Row]) -> dict[str, Shape]:
    """Our parameters with their whole shapes, layer axis included."""
    layers: dict[str, int] = {}
    for row in table:
        if row.layer is not None:
            layers[row.path] = max(layers.get(row.path, 0), row.layer + 1)
    return {row.path: (layers[row.path], *row.shape) if row.layer is not None else row.shape for row in table}
