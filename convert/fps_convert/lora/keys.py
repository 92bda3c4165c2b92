"""Whose key is it? Spellings of LoRA keys to rows of the key tables.

A key is a prefix, a module's name in either naming, and what the tensor is to that module:

  diffusion_model.blocks.0.self_attn.q.lora_A.weight      this project, diffusion-pipe, ai-toolkit, ComfyUI
  diffusion_model.blocks.0.self_attn.q.lora_down.weight   extracted LoRAs, with .alpha, .diff, .diff_b and .diff_m
  transformer.blocks.0.attn1.to_q.lora_A.weight           diffusers
  lora_unet_blocks_0_self_attn_q.lora_down.weight         kohya, musubi-tuner
  base_model.model.blocks.0.self_attn.q.lora_A.default.weight   peft; without prefix: DiffSynth-Studio
"""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from fps_convert.mapping import NAMINGS, Row

# What a tensor is: a half of the low-rank pair, its alpha, the pair's bias, or a difference to a parameter.
Role = Literal["a", "b", "alpha", "pair_bias", "diff"]

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "model.")
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
_ROLES: tuple[
    tuple[str, Role, str], ...
] = (  # what a key ends in; its role; the parameter of the module that it is for
    (r"\.(lora_A|lora_down|lora\.down)(\.[\w-]+)?\.weight", "a", "weight"),
    (r"\.(lora_B|lora_up|lora\.up)(\.[\w-]+)?\.weight", "b", "weight"),
    (r"\.(lora_B|lora_up|lora\.up)(\.[\w-]+)?\.bias", "pair_bias", "bias"),
    (r"\.alpha", "alpha", "weight"),
    (r"\.diff", "diff", "weight"),
    (r"\.diff_b", "diff", "bias"),
    (r"\.diff_m", "diff", "modulation"),
)
# Other kinds of adapters: their numbers mean something else, and leaving them out would give another model.
_OTHERS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"lora_mid": "a LoCon with a middle matrix",
    r"oft_blocks|oft_diag": "OFT",
    r"reshape_weight|set_weight": "a control LoRA",
}


@dataclass(frozen=True)
class Match:
    """What a key is for.

    Attributes:
      row: the parameter of ours (for `alpha`: that of the pair).
      role: what the tensor is to it.
      module: the module's name in the file, without prefix, dots as they were.
    """

    row: Row
    role: Role
    module: str


class Spellings:
    """All names of a DiT's modules and their parameters: `names[module][parameter]` is a row."""

    def __init__(self, table: list[Row]):
        self.names: dict[str, dict[str, Row]] = {}
        for row in table:
            for naming in NAMINGS:
                key = row.keys.get(naming)
                if key is None:
                    continue
                module, _, parameter = key.rpartition(".")
                self.names.setdefault(module, {})[_MODULATION.get(parameter, parameter)] = row
                if parameter not in ("weight", "bias"):  # `.diff` then stands behind the parameter's own name
                    self.names.setdefault(key, {})["weight"] = row
        # No two modules are the same with underscores; a test keeps it.
        self.underscored = {name.replace(".", "_"): name for name in self.names}

    def match(self, key: str) -> Match | None:
        """None for a key that fits no spelling, or no module of this model."""
        for ending, role, parameter in _ROLES:
            if found := re.fullmatch(f"(.*?){ending}", key):
                module = self._module(found[1])
                row = self.names.get(module, {}).get(parameter)
                return None if row is None else Match(row, role, module)
        return None

    def _module(self, name: str) -> str:
        for prefix in _UNDERSCORED:
            if name.startswith(prefix):
                return self.underscored.get(name.removeprefix(prefix), name)
        return without_prefix(name)

    def nearest(self, key: str) -> str | None:
        """A module whose name is nearly that in the key, to say so."""
        name = self._module(key.partition(".lora_")[0])
        near = difflib.get_close_matches(name, self.names, 1, cutoff=0.8)
        return near[0] if near else None


_MODULATION = {"scale_shift_table": "modulation"}


def without_prefix(name: str) -> str:
    """The name behind all prefixes."""
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def other_kind(key: str) -> str | None:
    """What adapter it is that has such a key, if it isn't a LoRA."""
    return next((what for pattern, what in _OTHERS.items() if re.search(rf"\.({pattern})\b", key)), None)


def layer_of(key: str) -> int | None:
    """The number of the block that a key names, in any spelling."""
    found = re.search(r"\bblocks\.(\d+)\.|_blocks_(\d+)_", key)
    return int(found[1] or found[2]) if found else None
