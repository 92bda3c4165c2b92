"""Opens a Wan2.1 checkpoint in any layout: told by its content, checked in full, nothing read but headers."""

import dataclasses
import os
import pathlib

from fps_convert import infer, spelling, unsupported
from fps_convert.check import check
from fps_convert.files import Files, check_supported, has_tokenizer, open_directory
from fps_convert.fp8 import dequantized
from fps_convert.layouts import OFFICIAL, Layout, layout_of
from fps_convert.report import audit
from fps_convert.single_files import Given, open_dit, open_single_files
from fps_convert.source import Part, Source
from fps_jax.checkpoints.format import is_checkpoint, read_config
from fps_jax.config import COMPONENTS, Component, WanConfig
from fps_jax.files import read_json
from fps_jax.models.tokenizer import check_vocabulary, vocabulary


def open_checkpoint(path: str | os.PathLike | None, given: Given | None = None) -> Source:
    """Opens and checks a Wan2.1 checkpoint; no weights are read yet.

    Args:
      path: a directory in any layout of `layouts.LAYOUTS`, or one that holds single files, in any tree. None: `given` has them all.
      given: single files that are taken for their component, whatever else lies in the directory.
    Raises:
      FileNotFoundError: `path` or a part of it is missing.
      ValueError: not a Wan checkpoint, a damaged file, two files for one part, or a tensor that is missing, extra or of the wrong
        shape.
      NotImplementedError: another Wan model (2.2, VACE) or a dtype that is no float.
    """
    given = given or Given()
    if path is None:
        return _open(pathlib.Path(given.dit or ""), open_single_files(None, given))
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist; give a Wan2.1 directory, official or diffusers")
    if not path.is_dir():
        unsupported.check_file(path)
        raise ValueError(
            f"{path} is a file; give the directory that holds the whole checkpoint, or the files of its parts with --dit, --vae "
            "and --text-encoder (WanPipeline.from_files)"
        )
    if is_checkpoint(path):
        raise ValueError(
            f"{path} is already in this project's format; give an official or a diffusers directory, or --dit FILE alone beside it"
        )
    check_supported(path)
    layout = layout_of(path)
    loose = layout.loose or bool(given.all())
    return _open(path, open_single_files(path, given, layout) if loose else open_directory(path, layout), layout)


def open_dit_on(path: pathlib.Path, given: Given) -> Source:
    """The DiT that was given, as that of a checkpoint in our format; the source has no other part, these stay as they are.

    Raises: as `open_checkpoint`.
    """
    base = read_config(path)
    if not has_tokenizer(path / "tokenizer"):
        raise FileNotFoundError(f"{path / 'tokenizer'} is missing; convert the checkpoint again")
    files = open_dit(given, infer.dit_sizes(path, OFFICIAL))
    layout, where = files.layout, files.where["dit"]
    reader, lines = dequantized(files.readers["dit"])
    dit = infer.dit(layout, reader, files.jsons["dit"], where)
    if (dit.task, dit.text_dim) != (base.task, base.text_encoder.dim):
        raise ValueError(
            f"{where} is a {dit.task} model that reads text of width {dit.text_dim}, and {path} is a {base.task} model of "
            f"{base.text_encoder.dim}; give the directory of the model that it was made from"
        )
    config = dataclasses.replace(base, dit=dit, causal=None)
    if base.causal is not None:
        files.notes.append(
            f"how {path} makes its blocks isn't taken over to another DiT: say it with --preset, or this is a model of whole videos"
        )
    part = check("dit", layout.places["dit"].naming, reader, config, where)
    part.notes.extend(files.notes_on["dit"] + lines)
    report = audit(path, layout.name, config, {"dit": part}, files.notes)
    return Source(path, layout.name, config, {"dit": part}, path / "tokenizer", files.spelling, report)


def _open(path: pathlib.Path, files: Files, stated: Layout | None = None) -> Source:
    """stated: the layout of what lies beside the weights, which single files that were given leave as it is."""
    layout, readers, where, jsons, notes = files.layout, files.readers, files.where, files.jsons, files.notes

    # FP8 as bf16, whatever the layout: the rest of this module sees weights.
    for name, reader in readers.items():
        readers[name], lines = dequantized(reader)
        files.notes_on[name] += lines

    # One spelling of keys that have two.
    spelt = files.spelling
    if layout.places["text_encoder"].naming == "diffusers":
        readers["text_encoder"], lines = spelling.text_embedding(readers["text_encoder"], spelt)
        files.notes_on["text_encoder"] += lines
    if layout.places["image_encoder"].naming == "diffusers" and "image_encoder" in readers:
        readers["image_encoder"] = spelling.vision_prefix(readers["image_encoder"], spelt)

    # The config, the DiT's first: it says the task, and with it whether there is an image tower.
    dit = infer.dit(layout, readers["dit"], jsons["dit"], where["dit"])
    if dit.task == "t2v" and readers.pop("image_encoder", None) is not None:
        notes.append("the image tower is left out: a T2V model doesn't use it")
    image_encoder = None
    if "image_encoder" in readers:
        # Where the tower has no config.json, a conversion of ours noted its heads with the DiT.
        noted = readers["dit"].metadata.get("image_encoder_num_heads", "")
        plain = noted.isascii() and noted.isdecimal() and len(noted) < 7
        heads = int(noted) if layout.places["image_encoder"].config is None and plain else None
        image_encoder = infer.image_encoder(
            layout, readers["image_encoder"], jsons["image_encoder"], where["image_encoder"], heads
        )
    stated = stated or layout
    scheduler = path / (stated.scheduler or "")
    flow_shift, flow_shift_480p = infer.flow_shift(
        stated, dit.task, read_json(scheduler) if stated.scheduler else {}, scheduler
    )
    index = path / (stated.index or "")
    vae = infer.vae(layout, readers["vae"], jsons["vae"], where["vae"])
    text_encoder = infer.text_encoder(layout, readers["text_encoder"], jsons["text_encoder"], where["text_encoder"])
    assert files.tokenizer is not None
    check_vocabulary(files.tokenizer, vocabulary(files.tokenizer), text_encoder.vocab_size)
    unsupported.check_vae_fits(dit.out_channels, vae.z_dim, where["dit"])
    try:
        config = WanConfig(
            dit=dit,
            vae=vae,
            text_encoder=text_encoder,
            image_encoder=image_encoder,
            flow_shift=flow_shift,
            flow_shift_480p=flow_shift_480p,
            preset=infer.preset(read_json(index) if stated.index and index.is_file() else {}),
            sampling=infer.sampling(path),
        )
    except ValueError as error:  # a DiT and a VAE of two models
        raise ValueError(f"{path}: {error}") from None

    # Every tensor against the config, and the components against each other.
    parts: dict[Component, Part] = {
        name: check(name, layout.places[name].naming, readers[name], config, where[name])
        for name in COMPONENTS
        if name in readers
    }
    for name, part in parts.items():
        part.notes.extend(files.notes_on[name])
    for name, theirs in (("text_encoder", dit.text_dim), ("image_encoder", dit.image_dim)):
        own = getattr(config, name)
        if own is not None and own.dim != theirs:
            raise ValueError(
                f"{path}: the {name} is {own.dim} wide, the DiT reads {theirs}; they are of different models"
            )
    if dit.task != "t2v" and image_encoder is None:
        notes.append("there is no image tower: sampling needs image_embeds")
    report = audit(path, layout.name, config, parts, notes)
    return Source(path, layout.name, config, parts, files.tokenizer, spelt, report)
