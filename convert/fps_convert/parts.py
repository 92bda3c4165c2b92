"""What a file of weights holds, told by its tensors' names: components of Wan, under any prefix, or something else.

blocks.0.self_attn.q.weight                        a DiT (official names), as Kijai and Comfy-Org repackage it
model.diffusion_model.blocks.0.self_attn.q.weight  the same with ComfyUI's prefix
text_encoders.umt5xxl.transformer.shared.weight    a text encoder in a checkpoint that holds everything
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fps_convert.formats.readers import Reader, Renamed
from fps_convert.mapping import Naming
from fps_jax.config import Component

TOKENIZER = "spiece_model"  # ComfyUI's UMT5 files: the bytes of spiece.model, as a tensor


@dataclass(frozen=True)
class _Anchor:
    """A tensor that every such component has, and nothing else.

    Attributes:
      key: of that tensor, in full.
      also: another, that tells it from models of its kin.
      bare: what the key begins with that some files leave out.
    """

    component: Component
    naming: Naming
    key: str
    also: str
    bare: str = ""


_ANCHORS = (
    _Anchor("dit", "official", "blocks.0.self_attn.q.weight", "patch_embedding.weight"),
    _Anchor("dit", "diffusers", "blocks.0.attn1.to_q.weight", "patch_embedding.weight"),
    _Anchor("vae", "official", "decoder.middle.0.residual.0.gamma", "decoder.conv1.weight"),
    _Anchor("vae", "diffusers", "decoder.mid_block.resnets.0.norm1.gamma", "decoder.conv_in.weight"),
    _Anchor("text_encoder", "official", "blocks.0.attn.q.weight", "blocks.0.pos_embedding.embedding.weight"),
    # T5, which other models have, has relative positions in its first block alone.
    _Anchor(
        "text_encoder",
        "diffusers",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    _Anchor("image_encoder", "official", "visual.cls_embedding", "visual.pos_embedding", bare="visual."),
    _Anchor(
        "image_encoder",
        "diffusers",
        "vision_model.embeddings.class_embedding",
        "vision_model.pre_layrnorm.weight",
        bare="vision_model.",
    ),
)
_LORA = re.compile(r"\.(lora_(A|B|down|up)|lora\.(down|up))\b|\.(diff|diff_b|diff_m|hada_w1_a|lokr_w1)$")
_NOT_WHOLE = ((_LORA, "a LoRA"), (re.compile(r"(^|\.)vace_blocks\."), "a VACE module"))


@dataclass(frozen=True)
class Found:
    """A component in a file, under its naming's own keys."""

    component: Component
    naming: Naming
    reader: Reader
    prefix: str


def _prefix(anchor: _Anchor, keys: dict) -> str | None:
    """What stands before the anchor's keys, of which a `bare` file lacks the beginning; None where they aren't there."""
    for bare in dict.fromkeys(("", anchor.bare)):
        key, also = anchor.key.removeprefix(bare), anchor.also.removeprefix(bare)
        for name in keys:
            if (name == key or name.endswith(f".{key}")) and name.removesuffix(key) + also in keys:
                return name.removesuffix(key)
    return None


def tell(reader: Reader) -> list[Found]:
    """The components in a file. What belongs to none goes to the one whose prefix begins as it does, without what they share."""
    prefixes: dict[_Anchor, str] = {}
    for anchor in _ANCHORS:
        prefix = _prefix(anchor, reader.tensors)
        if prefix is not None and all(anchor.component != other.component for other in prefixes):
            prefixes[anchor] = prefix
    if not prefixes:
        return []
    names: dict[_Anchor, dict[str, str]] = {anchor: {} for anchor in prefixes}
    by_length = sorted(prefixes, key=lambda anchor: -len(prefixes[anchor]))
    for key in reader.tensors:
        if key.rpartition(".")[2] == TOKENIZER:
            continue
        owner = next((anchor for anchor in by_length if key.startswith(prefixes[anchor])), None)
        if owner is None:
            first = key.split(".")[0]
            owner = next((anchor for anchor in by_length if prefixes[anchor].split(".")[0] == first), by_length[-1])
            # Without the dotted parts that both begin with.
            pairs = zip(key.split("."), prefixes[owner].split("."), strict=False)
            shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            names[owner][key] = ".".join(key.split(".")[shared:])
            continue
        rest = key.removeprefix(prefixes[owner])
        bare = owner.bare if prefixes[owner] + owner.key not in reader.tensors else ""
        names[owner][key] = bare + rest
    return [
        Found(anchor.component, anchor.naming, Renamed(reader, names[anchor], only=True), prefix)
        for anchor, prefix in prefixes.items()
    ]


def told_apart(keys: Iterable[str]) -> str | None:
    """What a file with these tensors is that is no component: 'a LoRA'; None for what isn't known."""
    keys = list(keys)
    return next((what for pattern, what in _NOT_WHOLE if any(pattern.search(key) for key in keys)), None)


def tokenizer_bytes(reader: Reader) -> bytes | None:
    """A sentencepiece model that lies in the file as a tensor of bytes."""
    for key, info in reader.tensors.items():
        if key.rpartition(".")[2] == TOKENIZER and info.dtype == "U8":
            return reader.read(key).tobytes()
    return None
