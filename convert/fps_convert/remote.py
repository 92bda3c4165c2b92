"""A repository judged by its listing and its JSON files, before any of its weights are fetched."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fps_convert import key_patterns, unsupported
from fps_convert.files import TOKENIZER_FILES, check_parts
from fps_convert.infer import flow_shift, preset, sampling
from fps_convert.layouts import Layout, layout_by_names
from fps_convert.parts import told_apart
from fps_jax.config import (
    COMPONENTS,
    Component,
    DiTConfig,
    ImageEncoderConfig,
    Task,
    TextEncoderConfig,
    VAEConfig,
    WanConfig,
)
from fps_jax.files import read_json

_WEIGHTS = (".safetensors", ".gguf", ".pth")


@dataclass(frozen=True)
class Repository:
    """What a repository holds.

    Attributes:
      files: those to fetch, of all that are listed.
      config: by JSON files alone: sizes that none states are Wan2.1's own.
    """

    layout: Layout
    files: list[str]
    config: WanConfig


def judge(
    folder: pathlib.Path, names: Sequence[str], repo: str, keys: Callable[[str], Iterable[str]] = lambda name: ()
) -> Repository:
    """Which files of a repository are a torch checkpoint.

    Args:
      folder: where its JSON files lie.
      names: of all its files.
      repo: 'owner/name', for messages.
      keys: of a safetensors file's tensors, by its name; none where they can't be had.
    Raises: NotImplementedError or ValueError in one line where there is none: another model, or a collection of single files;
      FileNotFoundError for one that lacks a part.
    """
    try:
        return _judge(folder, names, repo, keys)
    except (NotImplementedError, ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace(str(folder), repo)) from None


def _judge(folder: pathlib.Path, names: Sequence[str], repo: str, keys: Callable[[str], Iterable[str]]) -> Repository:
    unsupported.check_name(repo, pathlib.Path(repo))
    unsupported.check_jsons(folder, names)
    _check_class(folder, repo)
    layout = layout_by_names(names)
    if layout is None or not _of_stem(names, layout, "dit"):
        raise _no_checkpoint(names, repo, keys)
    chosen: dict[Component, list[str]] = {name: _of_stem(names, layout, name) for name in COMPONENTS}
    pths = [name for name in names if name.endswith(".pth") and "/" not in name]
    # Any .pth may be any part: two or more may be what is wanted.
    there = {name for name in COMPONENTS if chosen[name] or (layout.places[name].is_pth and len(pths) > 1)}
    has_tokenizer = any(f"{layout.tokenizer}/{file}" in names for file in TOKENIZER_FILES)
    check_parts(repo, layout, there, has_tokenizer, layout.scheduler in names)
    config = _config(folder, layout, bool(chosen["image_encoder"]))
    indices = [name for name in chosen["dit"] if name.endswith(".json")]
    for name in indices or chosen["dit"]:
        found = read_json(folder / name).get("weight_map", {}) if indices else keys(name)
        unsupported.check_dit(found, {}, pathlib.Path(repo) / name)
    files = [name for some in chosen.values() for name in some]
    files += [name for name in names if name.endswith((".json", ".model", ".txt")) and name not in files]
    if any(place.is_pth for place in layout.places.values()):  # a .pth may have any name
        files += [name for name in pths if name not in files]
    return Repository(layout, files, config)


def _check_class(folder: pathlib.Path, repo: str) -> None:
    for name in ("model_index.json", "config.json", "transformer/config.json"):
        kind = read_json(folder / name).get("_class_name", "Wan") if (folder / name).is_file() else "Wan"
        if "Wan" not in str(kind):
            raise NotImplementedError(f"{repo} is no Wan model: its {name} says {kind!r}; {unsupported.SUPPORTED}")


def _of_stem(names: Sequence[str], layout: Layout, component: Component) -> list[str]:
    """The files of a component: those of a variant (`.fp16.`) only where there are none without."""
    place = layout.places[component]
    folder = "" if place.folder == "." else f"{place.folder}/"
    if place.is_pth:
        return [name for name in names if name == place.file]
    whole = re.compile(re.escape(folder + place.stem) + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    variant = re.compile(re.escape(folder + place.stem) + r"[-.\w]*\.safetensors(\.index(\.\w+)?\.json)?")
    return [name for name in names if whole.fullmatch(name)] or [name for name in names if variant.fullmatch(name)]


def _no_checkpoint(names: Sequence[str], repo: str, keys: Callable[[str], Iterable[str]]) -> Exception:
    """What a repository is that is no checkpoint, and how its files can be had all the same."""
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    if weights and all(name.endswith(".gguf") for name in weights):
        return unsupported.gguf(repo)
    below = _checkpoints_below(names)
    if below:
        return ValueError(
            f"{repo} has its checkpoints in folders ({_few(below)}), and nothing was downloaded; "
            f"hf download {repo} --include '{below[0]}/*' --local-dir DIR, and give DIR/{below[0]}"
        )
    files = [name for name in weights if name.endswith(".safetensors")]
    if files and len(files) <= _HEADERS and all(told_apart(keys(name)) == "a LoRA" for name in files):
        return ValueError(
            f"{repo} holds LoRAs and no model ({_few(files)}), and nothing was downloaded; hf download {repo} '{files[0]}', and "
            "give the file with --lora (pipe.load_lora) beside the model that it was made for"
        )
    if files:
        return ValueError(
            f"{repo} is a collection of {len(weights)} single files ({_few(files)}), of which nothing was downloaded; "
            f"hf download {repo} FILE those that you want and give them with fps-convert to-flax --dit, --vae and --text-encoder "
            "(WanPipeline.from_files)"
        )
    return ValueError(
        f"{repo} is not a Wan checkpoint: it has neither model_index.json nor diffusion_pytorch_model*.safetensors"
    )


_HEADERS = 8  # of files that are asked for what they hold, a request each


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _checkpoints_below(names: Sequence[str]) -> list[str]:
    """Folders at the top of a repository that are checkpoints by the names in them."""
    tops: dict[str, list[str]] = {}
    for name in names:
        top, slash, rest = name.partition("/")
        if slash:
            tops.setdefault(top, []).append(rest)

    def is_whole(inside: Sequence[str]) -> bool:
        layout = layout_by_names(inside)
        if layout is None or not _of_stem(inside, layout, "dit"):
            return False
        # Told by its DiT's name alone, which any part in the diffusers layout has too.
        return bool(layout.marks) or any(name.endswith(".pth") for name in inside)

    return sorted(top for top, inside in tops.items() if is_whole(inside))


def _config(folder: pathlib.Path, layout: Layout, has_tower: bool) -> WanConfig:
    """The config by JSON files alone. Raises ValueError for one that is no Wan's."""

    def json_of(name: Component) -> dict[str, Any]:
        place = layout.places[name]
        file = folder / place.folder / "config.json"
        return read_json(file) if place.config is not None and file.is_file() else {}

    dit = _dit(json_of("dit"), layout, folder)
    shift, shift_480p = flow_shift(
        layout,
        dit.task,
        read_json(folder / layout.scheduler) if layout.scheduler else {},
        folder / (layout.scheduler or ""),
    )
    vae = _given(json_of("vae"), key_patterns.VAE[layout.places["vae"].naming].fields)
    index = folder / (layout.index or "")
    unsupported.check_vae_fits(dit.out_channels, vae.get("z_dim", VAEConfig().z_dim), folder)
    return WanConfig(
        dit=dit,
        vae=VAEConfig(**vae),
        text_encoder=TextEncoderConfig(**_given(json_of("text_encoder"), _TEXT_ENCODER)),
        image_encoder=ImageEncoderConfig(**_given(json_of("image_encoder"), _IMAGE_ENCODER))
        if has_tower and dit.task != "t2v"
        else None,
        flow_shift=shift,
        flow_shift_480p=shift_480p,
        preset=preset(read_json(index) if layout.index and index.is_file() else {}),
        sampling=sampling(folder),
    )


_TEXT_ENCODER = {
    "vocab_size": "vocab_size", "dim": "d_model", "mlp_dim": "d_ff", "num_heads": "num_heads", "head_dim": "d_kv",
    "num_layers": "num_layers",
}  # fmt: skip
_IMAGE_ENCODER = {
    "image_size": "image_size", "patch_size": "patch_size", "dim": "hidden_size", "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers",
}  # fmt: skip


def _given(config: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """Our names of what a JSON states; lists as tuples."""
    found = {ours: config.get(theirs) for ours, theirs in fields.items()}
    return {ours: tuple(v) if isinstance(v, list) else v for ours, v in found.items() if v is not None}


def _dit(config: dict[str, Any], layout: Layout, folder: pathlib.Path) -> DiTConfig:
    known = {field.name for field in dataclasses.fields(DiTConfig)}
    fields = key_patterns.DIT[layout.places["dit"].naming].fields
    stated = _given(config, fields)
    if "dim" not in fields:  # such a config states the heads, and the kind of model by its image sizes
        stated["dim"] = stated.get("num_heads", 0) * stated.get("head_dim", 0)
        positions, image_dim = config.get("pos_embed_seq_len"), config.get("image_dim")
        task = "t2v" if image_dim is None else "i2v" if positions is None else "flf2v"
    else:
        task = config.get("model_type", "t2v")
        image_dim = None if task == "t2v" else ImageEncoderConfig().dim
        positions = 2 * ImageEncoderConfig().num_tokens if task == "flf2v" else None
    try:
        sizes = {name: value for name, value in stated.items() if name in known}
        made = DiTConfig(task=cast(Task, task), image_dim=image_dim, image_positions=positions, **sizes)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{folder}: the DiT's config.json is no Wan DiT's ({error}); restore the original file"
        ) from None
    unsupported.check_channels(made.in_channels, made.out_channels, image_dim is not None, folder)
    return made
