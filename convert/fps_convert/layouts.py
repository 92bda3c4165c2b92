"""The layouts that torch checkpoints come in, each a record: which file holds what, under whose names, and what lies beside.

A new layout is a record here, and a column in `mapping` and `key_patterns` if its tensors have names of their own. Reading,
writing and reports go by the record; nothing asks which layout it is.
"""

import os
import pathlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from fps_convert import torch_configs
from fps_convert.mapping import Naming
from fps_jax.choices import LayoutName
from fps_jax.config import Component, Task, WanConfig

_MODEL = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a layout keeps one component.

    Attributes:
      file: its file within the checkpoint; the suffix says the format. A .safetensors may be in shards of that stem.
      naming: whose names its tensors have.
      config: what the config.json beside it holds, from our config of the component and the dtype that most of its tensors
        have ('float32'). None: it has no config.json, and sizes go by shapes.
      root, prefix: of a .pt that holds state dicts under names: this one's, and what its keys begin with; those of a checkpoint
        that was read from such a file are its own.
    """

    file: str
    naming: Naming
    config: Callable[[Any, str], dict[str, Any]] | None = None
    root: str | None = None
    prefix: str = ""

    @property
    def folder(self) -> str:
        return str(pathlib.PurePosixPath(self.file).parent)

    @property
    def name(self) -> str:
        return pathlib.PurePosixPath(self.file).name

    @property
    def stem(self) -> str:
        return pathlib.PurePosixPath(self.file).stem

    @property
    def is_pth(self) -> bool:
        return self.file.endswith((".pth", ".pt"))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to lay out a checkpoint.

    Attributes:
      name: what users call it.
      marks: files and (with a slash at the end) folders, any of which tells a directory of this layout; none for the one
        that is taken where no other is told.
      places: of each component, in the order in which they are opened.
      tokenizer: the tokenizer's folder.
      index: the file that lists the components, if there is one.
      scheduler: the file that says the flow shift, if there is one.
      flow_shift: where there is none: by task, the shift that sampling with this layout means, and that up to 480 x 832.
      not_its_dit: prefixes of tensors that tell a DiT of elsewhere, and what such a directory is instead.
      loose: files are told by content, whatever their name and place.
      alone: a t2v DiT in one file, which is the destination itself: no folder, and nothing beside it.
      shards: a large .safetensors is written in shards.
      casts: tensors can be written in another dtype than they are stored in (`comfyui.cast`).
      one_spelling: keys with two spellings are written in the first, not as the source had them.
      tokenizer_within: the component whose file holds the tokenizer's model too.
      beside: the JSON files beside the components, by path, from our config and the tokenizer's folder.
    """

    name: LayoutName
    marks: tuple[str, ...] = ()
    places: dict[Component, Place]
    tokenizer: str = ""
    index: str | None = None
    scheduler: str | None = None
    flow_shift: dict[Task, tuple[float, float | None]] = field(default_factory=dict)
    not_its_dit: dict[str, str] = field(default_factory=dict)
    loose: bool = False
    alone: bool = False
    shards: bool = True
    casts: bool = False
    one_spelling: bool = False
    tokenizer_within: Component | None = None
    beside: Callable[[WanConfig, pathlib.Path], dict[str, dict[str, Any]]] = lambda config, tokenizer: {}

    def marked(self, names: Collection[str]) -> bool:
        """Whether files of these names, as paths within a checkpoint, have one of the marks."""
        return any(
            name.startswith(mark) if mark.endswith("/") else name == mark for name in names for mark in self.marks
        )


def _beside_diffusers(config: WanConfig, tokenizer: pathlib.Path) -> dict[str, dict[str, Any]]:
    files = {"scheduler/scheduler_config.json": torch_configs.diffusers_scheduler(config.flow_shift)}
    if config.image_encoder is not None:
        processor = torch_configs.diffusers_image_processor(config.image_encoder)
        files["image_processor/preprocessor_config.json"] = processor
    files["model_index.json"] = torch_configs.diffusers_index(config, torch_configs.tokenizer_class(tokenizer))
    return files


OFFICIAL = Layout(
    name="official",
    places={
        "dit": Place(file=_MODEL, naming="official", config=torch_configs.official_dit),
        "vae": Place(file="Wan2.1_VAE.pth", naming="official"),
        "text_encoder": Place(file="models_t5_umt5-xxl-enc-bf16.pth", naming="official"),
        "image_encoder": Place(file="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", naming="official"),
    },
    tokenizer="google/umt5-xxl",
    # What the official code takes for a task; its files don't say.
    flow_shift={"t2v": (5.0, None), "i2v": (5.0, 3.0), "flf2v": (16.0, None)},
    not_its_dit={"condition_embedder.": "the transformer/ folder of a diffusers checkpoint; give the folder above it"},
)
DIFFUSERS = Layout(
    name="diffusers",
    marks=("model_index.json", "transformer/"),
    places={
        "dit": Place(file=f"transformer/{_MODEL}", naming="diffusers", config=torch_configs.diffusers_dit),
        "vae": Place(file=f"vae/{_MODEL}", naming="diffusers", config=torch_configs.diffusers_vae),
        "text_encoder": Place(
            file="text_encoder/model.safetensors", naming="diffusers", config=torch_configs.diffusers_text_encoder
        ),
        "image_encoder": Place(
            file="image_encoder/model.safetensors", naming="diffusers", config=torch_configs.diffusers_image_encoder
        ),
    },
    tokenizer="tokenizer",
    index="model_index.json",
    scheduler="scheduler/scheduler_config.json",
    beside=_beside_diffusers,
)
# Files of these names are written; what is read may have any name, lie anywhere, and have the names of either naming.
COMFYUI = Layout(
    name="comfyui",
    places={
        "dit": Place(file="diffusion_models/wan2.1_dit.safetensors", naming="official"),
        "vae": Place(file="vae/wan_2.1_vae.safetensors", naming="official"),
        "text_encoder": Place(file="text_encoders/umt5_xxl.safetensors", naming="diffusers"),
        "image_encoder": Place(file="clip_vision/clip_vision_h.safetensors", naming="diffusers"),
    },
    tokenizer="tokenizer",
    # The same models as the official ones; a workflow's shift is in the workflow.
    flow_shift=OFFICIAL.flow_shift,
    loose=True,
    shards=False,
    casts=True,
    one_spelling=True,
    tokenizer_within="text_encoder",
)
# What Self-Forcing's and CausVid's training writes (trainer/distillation.py): {"generator": {"model.blocks...": tensor}, ...}. Read
# as a single file, whatever its roots.
SELF_FORCING = Layout(
    name="self-forcing",
    places={"dit": Place(file="model.pt", naming="official", root="generator", prefix="model.")},
    flow_shift=OFFICIAL.flow_shift,
    alone=True,
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (OFFICIAL, DIFFUSERS, COMFYUI, SELF_FORCING)}
_WEIGHTS = (".safetensors", ".gguf")


def layout_by_names(names: Collection[str]) -> Layout | None:
    """The layout of files of these names, as paths within a checkpoint, by its marks; the official one has none but its DiT's name.

    None: whatever weights there are lie loose.
    """
    dit = re.compile(re.escape(OFFICIAL.places["dit"].stem) + r"[^/]*\.safetensors[^/]*")
    marked = next((layout for layout in LAYOUTS.values() if layout.marked(names)), None)
    return marked or (OFFICIAL if any(dit.fullmatch(name) for name in names) else None)


def top_names(path: pathlib.Path) -> list[str]:
    """What lies in a directory, folders with a slash at the end."""
    return [f"{entry.name}/" if entry.is_dir() else entry.name for entry in path.iterdir()]


def layout_of(path: pathlib.Path) -> Layout:
    """The layout of a directory, as `layout_by_names`; of one without a checkpoint or weights, the official one."""
    names = top_names(path)
    told = layout_by_names(names)
    if told is not None and (told.marks or any(name.endswith(".pth") for name in names)):
        return told
    # Told by its DiT's name alone, which a loose file may have too: other weights beside it say that.
    stem = OFFICIAL.places["dit"].stem
    others = (file for file in tree(path) if file.suffix in _WEIGHTS and not (told and file.name.startswith(stem)))
    return COMFYUI if any(others) else OFFICIAL


MAX_ENTRIES = 50_000


def tree(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files and folders below a folder, sorted. Links to folders are followed, as people link their models; never twice.

    Hidden folders (.git, .cache) and Python's virtual environments are passed by: ComfyUI's own folder has tens of thousands of
    files in these, and no model.

    Raises: ValueError for more than `MAX_ENTRIES`: no folder of models, or a link to the whole disk.
    """
    found, seen = [], set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not os.path.exists(f"{where}/{name}/pyvenv.cfg")
        )
        found += [pathlib.Path(where) / name for name in (*folders, *files)]
        if len(found) > MAX_ENTRIES:
            raise ValueError(
                f"{folder} has more than {MAX_ENTRIES:,} files; give the folder that holds the models alone"
            )
    return sorted(found)
