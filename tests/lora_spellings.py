"""LoRA files in the spellings that people have, from one set of numbers. NumPy alone: tests/make_golden_lora.py uses it too.

The model is the tiny T2V one of tests/data: width 64, MLP 128, 3 layers; of "image", the FLF2V one. Module names are written out
here by hand, apart from the converter's own tables, so that a wrong row there can't hide.
"""

import json
import zlib

import numpy as np

Tensors = dict[str, np.ndarray]
RANK, LAYERS = 4, 3
# Of a block: official name, diffusers' name, outs, ins.
LINEAR = [
    (f"{ours}.{name}", f"{theirs}.{their}", 64, 64)
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for name, their in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
] + [("ffn.0", "ffn.net.0.proj", 128, 64), ("ffn.2", "ffn.net.2", 64, 128)]
DIFFUSERS = {official: diffusers for official, diffusers, _, _ in LINEAR}
# Outside the blocks: official name, diffusers' name, outs, ins.
OUTSIDE = [
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1", 64, 32),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2", 64, 64),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1", 64, 256),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2", 64, 64),
    ("time_projection.1", "condition_embedder.time_proj", 384, 64),
    ("head.head", "proj_out", 64, 64),
]


def draw(key: str, *shape: int) -> np.ndarray:
    """Numbers that depend on the key alone."""
    return np.random.default_rng(zlib.crc32(key.encode())).normal(0, 0.3, shape).astype(np.float32)


def blocks(*, only: tuple[str, ...] = (), layers: range = range(LAYERS)) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """`(official module, A [r, in], B [out, r])` of the blocks' linear layers, or of some."""
    return [
        (module, draw(f"{module}.A", RANK, ins), draw(f"{module}.B", outs, RANK))
        for i in layers
        for name, _, outs, ins in LINEAR
        if not only or name in only
        for module in [f"blocks.{i}.{name}"]
    ]


def spelled(pairs, *, prefix: str, down: str, up: str, alpha: float | None = None, module=lambda name: name) -> Tensors:
    """A file's tensors: keys of `prefix`, the module's name as `module` spells it, and the halves' endings."""
    tensors: Tensors = {}
    for name, a, b in pairs:
        key = prefix + module(name)
        tensors |= {f"{key}.{down}": a, f"{key}.{up}": b}
        if alpha is not None:
            tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
    return tensors


def diffusers_name(name: str) -> str:
    _, number, module = name.split(".", 2)
    return f"blocks.{number}.{DIFFUSERS[module]}"


PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}


def biases() -> Tensors:
    return {
        f"diffusion_model.blocks.{i}.{name}.diff_b": draw(f"{i}.{name}.diff_b", outs)
        for i in range(LAYERS)
        for name, _, outs, _ in LINEAR
    }


def outside() -> Tensors:
    pairs = [(name, draw(f"{name}.A", RANK, ins), draw(f"{name}.B", outs, RANK)) for name, _, outs, ins in OUTSIDE]
    return spelled(pairs, prefix="diffusion_model.", **PEFT)


def image_pairs() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Of the tiny FLF2V model, two layers: what an image model has beyond a T2V one."""
    sizes = {f"blocks.{i}.cross_attn.{name}": (64, 64) for i in range(2) for name in ("k", "k_img", "v_img")}
    sizes |= {"img_emb.proj.1": (80, 80), "img_emb.proj.3": (64, 80)}
    return [(name, draw(f"{name}.A", RANK, ins), draw(f"{name}.B", outs, RANK)) for name, (outs, ins) in sizes.items()]


def metadata(**fields) -> dict[str, str]:
    """What diffusers saves beside a LoRA of peft."""
    names = [diffusers_name(name) for name, _, _ in blocks()]
    content = {"r": RANK, "lora_alpha": 6, "target_modules": names, **fields}
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in content.items()}),
    }


def underscored(name: str) -> str:
    return name.replace(".", "_")


# Files that diffusers 0.42.1 reads, by name: tensors, metadata, and the name of the case whose numbers they have.
CASES: dict[str, tuple[Tensors, dict[str, str] | None]] = {
    "ours": (spelled(blocks(), prefix="diffusion_model.", alpha=6, **PEFT), None),
    "no_alpha": (spelled(blocks(), prefix="diffusion_model.", **PEFT), None),
    "down_up": (spelled(blocks(), prefix="diffusion_model.", alpha=6, **KOHYA) | biases(), None),
    "kohya": (spelled(blocks(), prefix="lora_unet_", alpha=1, module=underscored, **KOHYA), None),
    "diffusers": (spelled(blocks(), prefix="transformer.", module=diffusers_name, **PEFT), None),
    "diffusers_metadata": (spelled(blocks(), prefix="transformer.", module=diffusers_name, **PEFT), metadata()),
    "diffusers_patterns": (
        spelled(blocks(), prefix="transformer.", module=diffusers_name, **PEFT),
        metadata(alpha_pattern={"blocks.1.attn1.to_q": 12, "attn2.to_v": 2}),
    ),
    "partial": (
        spelled(blocks(only=("self_attn.q", "cross_attn.v", "ffn.2"), layers=range(1, 3)), prefix="diffusion_model.", **PEFT),
        None,
    ),
    "outside": (
        spelled(blocks(only=("ffn.0",)), prefix="diffusion_model.", **PEFT) | outside(),
        None,
    ),
    "image": (spelled(image_pairs(), prefix="diffusion_model.", **PEFT), None),
}  # fmt: skip
