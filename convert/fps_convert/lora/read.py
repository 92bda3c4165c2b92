"""Opens a LoRA file: told by its keys, checked in full against the model that it is for."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fps_convert import mapping
from fps_convert.formats.readers import Reader, SafetensorsFile
from fps_convert.lora.keys import Match, Spellings, layer_of, other_kind, without_prefix
from fps_convert.mapping import Row
from fps_jax.checkpoints.lora import Difference, LoRA, LowRank, Place
from fps_jax.config import DiTConfig, WanConfig
from fps_jax.files import read_json

OURS = {"made_by": "fps_jax"}  # in the metadata of files of ours, whose `rank` and `alpha` are to be believed
_WIDTHS = {1536: "1.3B", 5120: "14B"}
_SQUARE = re.compile(r"attn/\w+/kernel$")  # matrices from the model's width to the model's width
_FACTOR = re.compile(r"\.(\w*scale\w*|(lora_)?alpha)(\.default)?(\.weight)?$")
_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


@dataclass
class _Module:
    """The tensors of one module in the file: keys by role, and the differences' rows."""

    keys: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class _Stated:
    """What a file says of alpha and rank outside its tensors, in peft's terms; `where` names the place."""

    where: str = ""
    rank: float | None = None
    alpha: float | None = None
    ranks: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    by_root: bool = False  # rsLoRA: alpha / sqrt(rank)
    to_check: bool = False  # tensors hold what counts, and must agree with it


def open_lora(path: str | os.PathLike, config: WanConfig, *, partial: bool = False) -> LoRA:
    """Opens a LoRA for a model of this config.

    Args:
      path: a .safetensors file, or a folder that holds one (peft's, diffusers').
      partial: leave out tensors that this model has no place for, in place of an error.
    Raises:
      FileNotFoundError: there is none.
      ValueError: not a safetensors file (a pickle is never run), a tensor that matches nothing or doesn't fit, half a pair, alpha
        and rank that disagree, NaN or inf.
      NotImplementedError: another kind of adapter (DoRA, LoHa, ...), or a dtype that is no plain float.
    """
    file = _find(pathlib.Path(path).expanduser())
    _refuse_pickles(file)
    reader = SafetensorsFile(file)
    kinds = {kind: key for key in reader.tensors if (kind := other_kind(key))}
    if kinds:
        kind, key = next(iter(kinds.items()))
        raise NotImplementedError(f"{file} is {kind} ({key!r}), which isn't supported; a plain LoRA is")
    spellings = Spellings(mapping.rows("dit", config))
    matches = {key: spellings.match(key) for key in reader.tensors}
    modules, left_out = _modules(file, matches)
    _check_shapes(file, reader, modules, config.dit)
    if not modules:
        raise ValueError(f"{file} has no LoRA for a Wan DiT: no key matches, such as {_first(reader.tensors)}")
    used = [key for module in modules.values() for key in module.keys.values()]
    tied = next((key for key in left_out if _is_tied(key, used)), None)
    if tied is not None:
        raise ValueError(
            f"{file} has {tied!r}, which other tensors are to be multiplied by and which isn't read: without it they would "
            "have other values; save the LoRA in bf16 with lora_A, lora_B and alpha"
        )
    if left_out and not partial:
        raise ValueError(_unmatched(file, left_out, spellings, config.dit))
    return _record(file, reader, modules, left_out)


def _find(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"LoRA {str(path)!r} doesn't exist; give a .safetensors file")
    files = sorted(path.glob("*.safetensors"))
    named = [file for file in files if file.name in _NAMES] or files
    if len(named) != 1:
        raise ValueError(f"{path} has {len(files)} .safetensors files; give the LoRA's own file")
    return named[0]


def _refuse_pickles(file: pathlib.Path) -> None:
    """Zip archives (torch.save) and bare pickles, by content: a name says nothing. Nothing of them is ever run."""
    with file.open("rb") as opened:
        begin = opened.read(9)
    # A safetensors file begins with the length of its header, whose bytes may be anything, and the header's brace.
    if begin[8:] != b"{" and (begin.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", begin)):
        raise ValueError(f"{file} is a pickle, which can run code when it's loaded; use the LoRA's .safetensors file")


def _first(keys: Any) -> str:
    return repr(min(keys)) if keys else "(it has none)"


def _modules(
    file: pathlib.Path, matches: dict[str, Match | None]
) -> tuple[dict[tuple[Place, str], _Module], list[str]]:
    """Tensors by the parameter that they change; keys that match nothing. Pairs under a weight's place, `diff` under its own."""
    modules: dict[tuple[Place, str], _Module] = {}
    left_out = []
    for key, match in matches.items():
        if match is None:
            left_out.append(key)
            continue
        kind = "diff" if match.role == "diff" else "pair"
        row = match.row
        path = row.path.removesuffix("/bias") + "/kernel" if match.role == "pair_bias" else row.path
        module = modules.setdefault(((path, row.layer), kind), _Module(name=match.module))
        if match.role in module.keys:
            raise ValueError(
                f"{file} names one tensor twice: {module.keys[match.role]!r} and {key!r}; keep one of them"
            )
        module.keys[match.role], module.rows[match.role] = key, row
    return modules, sorted(left_out)


def _check_shapes(
    file: pathlib.Path, reader: Reader, modules: dict[tuple[Place, str], _Module], config: DiTConfig
) -> None:
    """Every tensor against its parameter. Of several faults that of an attention's matrix is told: its width says which model."""
    faults = []
    for module in modules.values():
        for role, key in module.keys.items():
            shape, row = reader.tensors[key].shape, module.rows[role]
            source = row.shapes["official"]
            if role == "alpha":
                good, needs = math.prod(shape) == 1, "one number"
            elif role in ("a", "b") and row.form != "linear":
                raise ValueError(
                    f"{file}: {key!r} is a low-rank matrix for {row.path}, which is none; the file is damaged"
                )
            elif role == "a":
                fits = len(shape) >= 2 and shape[0] > 0 and math.prod(shape[1:]) == row.shape[0]
                good, needs = fits, ["rank", *source[1:]]
            elif role == "b":
                good = len(shape) >= 2 and shape[0] == source[0] and math.prod(shape[2:]) == 1
                needs = [source[0], "rank"]
            else:
                good, needs = _squeezed(shape) == _squeezed(source), list(source)
            if not good:
                faults.append((row.path, key, shape, needs, role))
    if not faults:
        return
    faults.sort(key=lambda fault: (not _SQUARE.search(fault[0]), fault[1]))
    path, key, shape, needs, role = faults[0]
    hint = ""
    if _SQUARE.search(path) and role in ("a", "b") and len(shape) > 1:
        theirs = shape[1] if role == "a" else shape[0]
        if theirs != config.dim:
            hint = f": it's a LoRA for Wan {_size(theirs)}, this model is {_size(config.dim)}"
    elif path == "patch_embedding/kernel":
        hint = ": it's a LoRA for another task (T2V models read 16 channels, I2V and FLF2V models 36)"
    more = f" (and {len(faults) - 1} more)" if faults[1:] else ""
    raise ValueError(f"{file}: {key!r} has shape {list(shape)}, this model needs {_said(needs)}{more}{hint}")


def _said(needs: Any) -> str:
    return needs if isinstance(needs, str) else f"[{', '.join(map(str, needs))}]"


def _size(width: int) -> str:
    return _WIDTHS.get(width, f"of width {width}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _is_tied(key: str, used: list[str]) -> bool:
    """Whether a tensor is a factor of others that are used, in a spelling that isn't read."""
    module, is_factor = _FACTOR.subn("", key)
    return bool(is_factor) and any(other.startswith(f"{module}.") for other in used)


def _unmatched(file: pathlib.Path, left_out: list[str], spellings: Spellings, config: DiTConfig) -> str:
    key = left_out[0]
    more = f" and {len(left_out) - 1} more" if left_out[1:] else ""
    layers = [layer for name in left_out if (layer := layer_of(name)) is not None]
    near = spellings.nearest(key)
    hint = ""
    if layers and max(layers) >= config.num_layers:
        hint = f" (it names block {max(layers)}, this model has {config.num_layers})"
    elif config.task == "t2v" and any(
        re.search(r"k_img|v_img|add_[kv]_proj|img_emb|image_embedder", k) for k in left_out
    ):
        hint = " (it's a LoRA for an image model, this is a t2v model)"
    elif near:
        hint = f" (the nearest module is {near!r})"
    return f"{file} has {key!r}{more}, which matches nothing in this model{hint}; --lora-partial (partial=True) leaves it out"


def _record(
    file: pathlib.Path, reader: SafetensorsFile, modules: dict[tuple[Place, str], _Module], left_out: list[str]
) -> LoRA:
    stated = _stated(file, reader)
    changes: dict[Place, list[LowRank | Difference]] = {}
    ranks: collections.Counter[int] = collections.Counter()
    scales: collections.Counter[float] = collections.Counter()
    sources: collections.Counter[str] = collections.Counter()

    def values(key: str) -> np.ndarray:
        array = reader.read(key)
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{file}: {key!r} holds NaN or inf; the training went wrong, or the file is damaged")
        return array

    for (place, kind), module in sorted(modules.items(), key=lambda item: str(item[0])):
        if kind == "diff":
            key, row = module.keys["diff"], module.rows["diff"]
            change = Difference(mapping.to_ours(values(key).reshape(row.shapes["official"]), row).reshape(row.shape))
            changes.setdefault(place, []).append(change)
            continue
        for role, name in (("a", "lora_A (lora_down)"), ("b", "lora_B (lora_up)")):
            if role not in module.keys:
                there = next(iter(module.keys.values()))
                raise ValueError(f"{file} has {there!r} but no {name} for it; copy or download it again")
        a, b = values(module.keys["a"]), values(module.keys["b"])
        rank = a.shape[0]
        if b.shape[1] != rank:
            raise ValueError(
                f"{file}: {module.keys['a']!r} has rank {rank} and {module.keys['b']!r} has rank {b.shape[1]}; they belong "
                "together and must agree: copy or download it again"
            )
        scale, source = _scale(file, reader, module, rank, stated)
        ranks[rank] += 1
        scales[scale] += 1
        sources[source] += 1
        pair = LowRank(a.reshape(rank, -1).T, b.reshape(-1, rank).T, scale)
        changes.setdefault(place, []).append(pair)
        if "pair_bias" in module.keys:
            row = module.rows["pair_bias"]
            bias = Difference(values(module.keys["pair_bias"]).reshape(row.shape), scale)
            changes.setdefault((row.path, row.layer), []).append(bias)
    report = {
        "file": str(file),
        "tensors": len(reader.tensors),
        "used": len(reader.tensors) - len(left_out),
        "parameters": len(changes),
        "ranks": sorted(ranks),
        "alpha_over_rank": sorted(scales),
        "alpha_from": " and ".join(sorted(sources)) or "differences, which have none",
        "changed": sorted({path for path, _ in changes}),
        "left_out": left_out,
    }
    return LoRA(file, changes, report)


def _scale(
    file: pathlib.Path, reader: SafetensorsFile, module: _Module, rank: int, stated: _Stated
) -> tuple[float, str]:
    """alpha / rank of a pair, and where alpha was found: its own tensor, what the file states, else the rank itself."""
    key = module.keys["a"]
    said_rank = _pattern(stated.ranks, module.name, stated.rank)
    if said_rank is not None and said_rank != rank:
        raise ValueError(f"{stated.where} says rank {said_rank:g}, {key!r} has rank {rank}; they must agree")
    said = _pattern(stated.alphas, module.name, stated.alpha)
    alpha, source = float(rank), "none given, taken as 1"
    if said is not None and not stated.to_check:
        alpha, source = said, f"alpha in {stated.where}"
    if "alpha" in module.keys:
        alpha, source = reader.number(module.keys["alpha"]), "alpha in its tensors"
        if said is not None and not math.isclose(said, alpha, rel_tol=1e-5):
            raise ValueError(
                f"{stated.where} says alpha {said:g}, {module.keys['alpha']!r} is {alpha:g}; they must agree"
            )
    if not math.isfinite(alpha) or alpha <= 0:
        where = repr(module.keys["alpha"]) if "alpha" in module.keys else f"alpha in {stated.where}"
        raise ValueError(f"{file}: {where} is {alpha:g}; a LoRA's alpha is a positive number, often its rank")
    return alpha / (math.sqrt(rank) if stated.by_root else rank), source


def _pattern(patterns: dict[str, float], module: str, default: float | None) -> float | None:
    """peft's rule: the first pattern that is the whole name or, after a dot, its end."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", module):
            return value
    return default


def _stated(file: pathlib.Path, reader: SafetensorsFile) -> _Stated:
    """From the metadata (ours, diffusers'), or from peft's adapter_config.json beside the file."""
    metadata, beside = reader.metadata, file.parent / "adapter_config.json"
    if all(metadata.get(name) == value for name, value in OURS.items()):
        where = f"{file}: its metadata"
        content = {"r": _number(metadata.get("rank")), "lora_alpha": _number(metadata.get("alpha"))}
        return dataclasses.replace(_checked(where, content), to_check=True)
    if "lora_adapter_metadata" in metadata:
        where = f"{file}: lora_adapter_metadata"
        try:
            content = json.loads(metadata["lora_adapter_metadata"])
        except (ValueError, RecursionError, TypeError) as error:
            raise ValueError(f"{where} is not valid JSON ({error}); copy or download it again") from None
        if not isinstance(content, dict):
            raise ValueError(f"{where} holds a JSON {type(content).__name__}, not an object; copy or download it again")
        return _checked(where, {name.removeprefix("transformer."): value for name, value in content.items()})
    if file.name == "adapter_model.safetensors" and beside.is_file():
        return _checked(str(beside), read_json(beside))
    return _Stated()


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _checked(where: str, content: dict[str, Any]) -> _Stated:
    def number(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{where}: {name}={value!r} is not a positive number; copy or download it again")
        return float(value)

    def patterns(name: str) -> dict[str, float]:
        given = content.get(name) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{where}: {name}={given!r} is not an object; copy or download it again")
        return {without_prefix(pattern): number(f"{name}[{pattern!r}]", value) for pattern, value in given.items()}

    if content.get("use_dora"):
        raise NotImplementedError(f"{where} says use_dora: DoRA isn't supported; a plain LoRA is")
    rank, alpha = (None if content.get(n) is None else number(n, content[n]) for n in ("r", "lora_alpha"))
    return _Stated(
        where, rank, alpha, patterns("rank_pattern"), patterns("alpha_pattern"), bool(content.get("use_rslora"))
    )
