"""A checkpoint's config: from its JSON files where they say it, from tensor shapes where no file does."""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from fps_convert import key_patterns, unsupported
from fps_convert.formats.readers import Reader
from fps_convert.layouts import Layout
from fps_convert.mapping import Naming
from fps_jax.checkpoints.format import SAMPLING, is_checkpoint, read_config
from fps_jax.choices import Preset
from fps_jax.config import (
    LATENTS_MEAN,
    MAX_SHIFT,
    DiTConfig,
    ImageEncoderConfig,
    SamplingDefaults,
    Task,
    TextEncoderConfig,
    VAEConfig,
)
from fps_jax.files import read_json

_HEAD_DIM = 128
_QK_NORM = "rms_norm_across_heads"


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
            raise ValueError(
                f"{self.where} is not {self.what}: it has no tensor {_example(pattern)!r}; it may be another model"
            )
        return found.most_common(1)[0][0]

    def layers(self, pattern: str) -> int:
        """1 + the largest number that the pattern's group matches."""
        numbers = [int(match[1]) for key in self.shapes if (match := re.match(pattern, key))]
        return max(numbers, default=0) + 1

    def any(self, pattern: str) -> bool:
        return any(re.search(pattern, key) for key in self.shapes)


def _example(pattern: str) -> str:
    """A key that a pattern of `key_patterns` matches, for people: the first of every choice."""
    pattern = re.sub(r"\[(.)[^]]*\]", r"\1", pattern.replace(r"\d+", "0"))
    while "(" in pattern:
        pattern = re.sub(r"\(([^()|]*)[^()]*\)", r"\1", pattern)
    return pattern.replace("\\", "")


def _file(where: pathlib.Path) -> pathlib.Path:
    return where / "config.json" if where.is_dir() else where


def _stated(config: dict[str, Any], name: str, kind: type, where: pathlib.Path, default: Any = None) -> Any:
    """A field of a JSON config, checked to be of its kind. Without `default` it must be there."""
    value = config.get(name, default)
    good = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if value is None or isinstance(value, bool) != (kind is bool) or not good or (kind is int and value <= 0):
        raise ValueError(
            f"{_file(where)}: {name}={repr(value)[:80]} should be of type {kind.__name__}; restore the original file"
        )
    if kind is float and not -1e6 <= value <= 1e6:  # NaN is neither
        raise ValueError(f"{_file(where)}: {name}={repr(value)[:80]} is not a finite number; restore the original file")
    return kind(value)


def _listed(config: dict[str, Any], name: str, default: tuple, where: pathlib.Path) -> tuple:
    """A list of numbers in a JSON config."""
    value = config.get(name, default)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(n, int | float) for n in value):
        raise ValueError(
            f"{_file(where)}: {name}={repr(value)[:80]} should be a list of numbers; restore the original file"
        )
    return tuple(value)


def _built[C](kind: type[C], where: pathlib.Path, **fields: Any) -> C:
    """A config that says where it is from, if it's wrong."""
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{_file(where)}: {error}; restore the original file") from None


class _Stated(NamedTuple):
    """A config.json under our names. What this naming's file doesn't state is the default, unchecked."""

    config: dict[str, Any]
    fields: dict[str, str]
    where: pathlib.Path

    def number(self, name: str, kind: type, default: Any = None) -> Any:
        field = self.fields.get(name)
        return default if field is None else _stated(self.config, field, kind, self.where, default)

    def list(self, name: str, default: tuple) -> tuple:
        field = self.fields.get(name)
        return default if field is None else _listed(self.config, field, default, self.where)


def dit(layout: Layout, reader: Reader, config: dict[str, Any], where: pathlib.Path) -> DiTConfig:
    """The DiT's config; the task goes by the tensors, never by `_class_name`.

    Raises: NotImplementedError for Wan models other than 2.1's T2V, I2V and FLF2V; ValueError where this is no Wan DiT.
    """
    names = key_patterns.DIT[layout.places["dit"].naming]
    shapes = _Shapes(reader, f"a Wan DiT in the {layout.name} layout", where)
    unsupported.check_dit(reader.tensors, config, where)
    if "qk_norm" in names.fields and config.get("qk_norm", _QK_NORM) != _QK_NORM:
        raise NotImplementedError(f"{where}: qk_norm={config['qk_norm']!r}; Wan2.1 models have {_QK_NORM!r}")
    text_dim = shapes.size(re.escape(names.text), 1)  # first: it tells a DiT of this layout from anything else
    stated = _Stated(config, names.fields, where)
    heads = stated.number("num_heads", int)
    dim = stated.number("dim", int) if "dim" in names.fields else heads * stated.number("head_dim", int)
    patch_size = stated.list("patch_size", tuple(shapes.size(r"patch_embedding\.weight", axis) for axis in (2, 3, 4)))
    ins, outs = (stated.number(name, int) for name in ("in_channels", "out_channels"))
    has_image, has_positions = shapes.any(names.has_image), names.positions in shapes.shapes
    task: Task = "flf2v" if has_image and has_positions else "i2v" if has_image else "t2v"
    unsupported.check_channels(ins, outs, has_image, where)
    return _built(
        DiTConfig,
        where,
        task=task,
        dim=dim,
        mlp_dim=stated.number("mlp_dim", int),
        num_heads=heads,
        num_layers=stated.number("num_layers", int),
        in_channels=ins,
        out_channels=outs,
        patch_size=cast(tuple[int, int, int], patch_size),
        freq_dim=stated.number("freq_dim", int, shapes.size(re.escape(names.time), 1)),
        text_dim=stated.number("text_dim", int, text_dim),
        text_len=stated.number("text_len", int, 512),
        image_dim=shapes.size(names.image, 0) if has_image else None,
        image_positions=shapes.size(re.escape(names.positions), -2) if task == "flf2v" else None,
        cross_attn_norm=shapes.any(names.has_norm),
        eps=stated.number("eps", float, 1e-6),
    )


def dit_sizes(directory: pathlib.Path, layout: Layout) -> dict[str, int]:
    """What the config.json of a directory's own DiT says of its sizes, under our names; empty where there is none to say it.

    layout: of the directory, if it isn't in our format.
    """
    if is_checkpoint(directory):
        return {name: n for name, n in dataclasses.asdict(read_config(directory).dit).items() if type(n) is int}
    place = layout.places["dit"]
    file = directory / place.folder / "config.json"
    if place.config is None or not file.is_file():
        return {}
    config, fields = read_json(file), key_patterns.DIT[place.naming].fields
    stated = {ours: config.get(theirs) for ours, theirs in fields.items()}
    sizes = {ours: value for ours, value in stated.items() if type(value) is int and value > 0}
    if "head_dim" in sizes and "num_heads" in sizes:
        sizes["dim"] = sizes["head_dim"] * sizes["num_heads"]
    return sizes


def stated_by_shapes(
    naming: Naming, reader: Reader, where: pathlib.Path, beside: Mapping[str, int] = MappingProxyType({})
) -> tuple[dict[str, Any], list[str]]:
    """What a DiT's config.json states, for a file that comes without one; and notes.

    All but the number of heads is in the shapes. Wan's heads are 128 wide; `num_heads` in the file's metadata says otherwise, and
    so does `beside`, `dit_sizes` of the directory whose DiT it takes the place of, where that one is as wide. Of a DiT that is
    narrower than one such head two are taken, which is a guess.
    """
    names = key_patterns.DIT[naming]
    shapes = _Shapes(reader, "a Wan DiT", where)
    dim, up = shapes.size(names.q, 0), shapes.size(names.up, 0)
    sizes = [shapes.size(r"patch_embedding\.weight", axis) for axis in (1, 2, 3, 4)]
    noted, notes = reader.metadata.get("num_heads", ""), []
    if noted.isascii() and noted.isdecimal() and len(noted) < 7 and int(noted) > 0:
        heads = int(noted)
    elif beside.get("dim") == dim and dim % beside.get("num_heads", dim + 1) == 0:
        heads = beside["num_heads"]
    elif dim % _HEAD_DIM == 0:
        heads = dim // _HEAD_DIM
    elif dim < _HEAD_DIM and dim % 4 == 0:
        heads = 2
        notes.append(
            f"{where.name} is {dim} wide, less than one of Wan's heads, and doesn't say how many it has: 2 are taken"
        )
    else:
        raise NotImplementedError(
            f"{where} is {dim} wide, no multiple of Wan's heads of {_HEAD_DIM}; put its config.json beside it"
        )
    known = {
        "dim": dim,
        "head_dim": dim // heads,
        "num_heads": heads,
        "mlp_dim": up,
        "num_layers": shapes.layers(r"blocks\.(\d+)\."),
        "in_channels": sizes[0],
        "out_channels": shapes.size(names.head, 0) // math.prod(sizes[1:]),
        "patch_size": sizes[1:],
    }
    return {theirs: known[ours] for ours, theirs in names.fields.items() if ours in known}, notes


def vae(layout: Layout, reader: Reader, config: dict[str, Any], where: pathlib.Path) -> VAEConfig:
    """The VAE's config. Official files hold none: width and z_dim go by shapes, the rest is Wan2.1's."""
    names = key_patterns.VAE[layout.places["vae"].naming]
    shapes = _Shapes(reader, f"a Wan2.1 VAE in the {layout.name} layout", where)
    unsupported.check_vae(reader.tensors, config, where)
    stated = _Stated(config, names.fields, where)
    base = shapes.size(names.base, 0)
    z_dim = stated.number("z_dim", int, shapes.size(names.z_dim, 0))
    if "latents_mean" not in names.fields and z_dim != len(LATENTS_MEAN):
        raise NotImplementedError(
            f"{where}: z_dim={z_dim}, but {layout.name} files hold no latent statistics and Wan's own are for "
            f"{len(LATENTS_MEAN)} channels; use the diffusers layout, whose config.json holds them"
        )
    plain = VAEConfig()
    base = stated.number("base_dim", int, base)
    for name, wanted in (("decoder_base_dim", base), ("in_channels", 3), ("out_channels", 3)):
        if config.get(name) not in (None, wanted):
            raise NotImplementedError(f"{where}: {name}={config[name]!r}; Wan2.1's VAE has {wanted}")
    if config.get("attn_scales"):
        raise NotImplementedError(f"{where}: attn_scales={config['attn_scales']!r}; Wan2.1's VAE has none")
    lists = {
        name: stated.list(name, getattr(plain, name))
        for name in ("dim_mult", "temporal_downsample", "latents_mean", "latents_std")
    }
    for name, length in (
        ("latents_mean", z_dim),
        ("latents_std", z_dim),
        ("temporal_downsample", len(lists["dim_mult"]) - 1),
    ):
        if len(lists[name]) != length:
            raise ValueError(f"{where}: {name} has {len(lists[name])} entries, this VAE needs {length}")
    blocks = stated.number("num_res_blocks", int, plain.num_res_blocks)
    return _built(VAEConfig, where, base_dim=base, z_dim=z_dim, num_res_blocks=blocks, **lists)


def text_encoder(layout: Layout, reader: Reader, config: dict[str, Any], where: pathlib.Path) -> TextEncoderConfig:
    """UMT5's config; every size is in the shapes, and a config.json that says otherwise is an error at the tensor."""
    names = key_patterns.TEXT_ENCODER[layout.places["text_encoder"].naming]
    shapes = _Shapes(reader, f"a UMT5 encoder in the {layout.name} layout", where)
    if config.get("dense_act_fn", "gelu_new") != "gelu_new" or not config.get("is_gated_act", True):
        raise NotImplementedError(f"{where}: dense_act_fn={config.get('dense_act_fn')!r}; UMT5 has a gated 'gelu_new'")
    num_heads = _stated(config, "num_heads", int, where, shapes.size(names.bias, 1))
    return _built(
        TextEncoderConfig,
        where,
        vocab_size=_stated(config, "vocab_size", int, where, shapes.size(re.escape(names.embedding), 0)),
        dim=_stated(config, "d_model", int, where, shapes.size(names.norm, 0)),
        mlp_dim=_stated(config, "d_ff", int, where, shapes.size(names.up, 0)),
        num_heads=num_heads,
        head_dim=_stated(config, "d_kv", int, where, shapes.size(names.q, 0) // num_heads),
        num_layers=_stated(config, "num_layers", int, where, shapes.layers(names.layers)),
        num_buckets=_stated(config, "relative_attention_num_buckets", int, where, shapes.size(names.bias, 0)),
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
    names = key_patterns.IMAGE_ENCODER[layout.places["image_encoder"].naming]
    shapes = _Shapes(reader, f"a CLIP image tower in the {layout.name} layout", where)
    vision = config.get("vision_config", config)
    if not isinstance(vision, dict):
        raise ValueError(
            f"{_file(where)}: vision_config={repr(vision)[:80]} is not an object; restore the original file"
        )
    if vision.get("hidden_act", "gelu") != "gelu":
        raise NotImplementedError(f"{where}: hidden_act={vision['hidden_act']!r}; Wan's CLIP tower has 'gelu'")
    dim = _stated(vision, "hidden_size", int, where, shapes.size(names.norm, 0))
    patch_size = _stated(vision, "patch_size", int, where, shapes.size(names.patch, -1))
    side = math.isqrt(max(shapes.size(names.positions, -2) - 1, 0))
    heads = (
        _stated(vision, "num_attention_heads", int, where, num_heads) if vision or num_heads else _vit_heads(dim, where)
    )
    head = "visual.head"
    return _built(
        ImageEncoderConfig,
        where,
        image_size=_stated(vision, "image_size", int, where, side * patch_size),
        patch_size=patch_size,
        dim=dim,
        mlp_dim=_stated(vision, "intermediate_size", int, where, shapes.size(names.up, 0)),
        num_heads=heads,
        num_layers=_stated(vision, "num_hidden_layers", int, where, shapes.layers(names.layers)),
        projection_dim=shapes.size(re.escape(head), -1) if head in shapes.shapes else None,
        eps=_stated(vision, "layer_norm_eps", float, where, 1e-5),
    )


# The pipeline classes that mean another way of sampling: FastVideo's, of its FastWan checkpoints.
_PRESETS: dict[str, Preset] = {"WanDMDPipeline": "dmd"}


def preset(index: dict[str, Any]) -> Preset:
    """How a checkpoint is sampled by default, from model_index.json."""
    return _PRESETS.get(str(index.get("_class_name")), "wan")


def sampling(directory: pathlib.Path) -> SamplingDefaults:
    """What a checkpoint is sampled with where a call says nothing: its fps_sampling.json, or Wan's own.

    Raises: ValueError for a file that isn't one.
    """
    file = directory / SAMPLING
    if not file.is_file():
        return SamplingDefaults()
    given = read_json(file)
    try:
        return SamplingDefaults(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); take it out, or write it anew") from None


def flow_shift(
    layout: Layout, task: Task, scheduler: dict[str, Any], where: pathlib.Path
) -> tuple[float, float | None]:
    """`(flow_shift, flow_shift_480p)`: what the scheduler's file says or, without one, what the layout means."""
    if layout.scheduler is None:
        return layout.flow_shift[task]
    name = "flow_shift" if "flow_shift" in scheduler else "shift"
    shift = _stated(scheduler, name, float, where)
    if not 0 < shift <= MAX_SHIFT:
        raise ValueError(
            f"{where}: {name}={shift} must be positive and at most {MAX_SHIFT:g}; restore the original file"
        )
    return shift, None
