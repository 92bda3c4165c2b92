"""Opens a Wan2.1 directory, official or diffusers: detected by content, checked in full, loaded a tensor at a time."""

import difflib
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fps_convert import infer, mapping
from fps_convert.formats import array_files
from fps_convert.formats.arrays import contiguous, copy, in_threads
from fps_convert.formats.pth import PthFile
from fps_convert.formats.readers import FLOATS, Reader, Renamed, open_safetensors, read_json
from fps_convert.mapping import Layout, Row, SourceTensor
from fps_jax.checkpoints.format import empty_aligned, is_checkpoint
from fps_jax.config import COMPONENTS, Component, WanConfig
from fps_jax.models.params import Params, unflatten

DIT_STEM = "diffusion_pytorch_model"
OFFICIAL_TOKENIZER = "google/umt5-xxl"
# Parts of source files that Wan never uses: listed in the audit, left out.
UNUSED: dict[Component, tuple[str, ...]] = {
    "dit": (),
    "vae": (),
    "text_encoder": ("decoder.", "lm_head."),
    "image_encoder": (
        "textual.", "log_scale", "text_model.", "text_projection.", "visual_projection.", "logit_scale",
        "vision_model.embeddings.position_ids",
    ),
}  # fmt: skip
SUBFOLDERS: dict[Component, tuple[str, str]] = {
    "dit": ("transformer", DIT_STEM),
    "vae": ("vae", DIT_STEM),
    "text_encoder": ("text_encoder", "model"),
    "image_encoder": ("image_encoder", "model"),
}
OFFICIAL_PTH: dict[Component, str] = {
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
# What tells a .pth of another name.
_PTH_PREFIXES: dict[Component, tuple[str, ...]] = {
    "vae": ("encoder.downsamples.", "decoder.upsamples."),
    "text_encoder": ("token_embedding.", "blocks."),
    "image_encoder": ("visual.",),
}
Progress = Callable[[int], Any]  # called with bytes done


@dataclass
class Part:
    """One component of a source, checked: every row of the table has its tensor and the other way round."""

    reader: Reader
    table: list[Row]
    tensors: list[SourceTensor]
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        infos = (self.reader.tensors[tensor.key] for tensor in self.tensors)
        return sum(int(np.prod(info.shape, dtype=np.int64)) * info.check_dtype().itemsize for info in infos)

    def row_dtypes(self) -> dict[str, list[str]]:
        """Source dtypes of each of our parameters, by layer."""
        dtypes: dict[str, list[str]] = {}
        for tensor in self.tensors:
            for row in tensor.rows:
                dtypes.setdefault(row.path, []).append(self.reader.tensors[tensor.key].dtype)
        return dtypes


@dataclass
class Source:
    """A checkpoint to convert from.

    Attributes:
      layout: "official" or "diffusers".
      config: what it is.
      parts: its components; `components` are their names.
      tokenizer_dir: the directory that holds tokenizer.json or spiece.model.
      spelling: how this source spells what its layout spells in two ways, for the way back.
      audit: a report, JSON-ready: per component every source tensor with file, dtype, shape and parameter,
        and what was left out.
    """

    path: pathlib.Path
    layout: Layout
    config: WanConfig
    parts: dict[Component, Part]
    tokenizer_dir: pathlib.Path
    spelling: dict[str, Any]
    audit: dict[str, Any]

    @property
    def components(self) -> tuple[Component, ...]:
        return tuple(self.parts)

    def stored_dtypes(self, component: Component, dtype: Any = None) -> dict[str, np.dtype]:
        """The dtype of every parameter as `load` returns it: `dtype` (never for the VAE), else the source's own.

        A stacked parameter whose layers differ gets float32, which holds F16 and BF16 exactly.
        """
        if dtype is not None and component != "vae":
            return dict.fromkeys(self.parts[component].row_dtypes(), np.dtype(dtype))
        return {
            path: FLOATS[names[0]] if len(set(names)) == 1 else np.dtype(np.float32)
            for path, names in self.parts[component].row_dtypes().items()
        }

    def load(self, component: Component, dtype: Any = None, progress: Progress | None = None) -> Params:
        """Parameters of one component as NumPy arrays, each tensor copied once, from the mapped file to its place.

        Args:
          component: one of `components`.
          dtype: cast (round to nearest even) to this type; None keeps each tensor's. The VAE is never cast.
          progress: called with a number of source bytes whenever so many more are done.
        """
        dtypes = self.stored_dtypes(component, dtype)
        shapes = mapping.leaves(self.parts[component].table)
        buffers = {path: empty_aligned(shape, dtypes[path]) for path, shape in shapes.items()}

        def place(row: Row, values: np.ndarray) -> None:
            copy(buffers[row.path] if row.layer is None else buffers[row.path][row.layer], values)

        self.each(component, place, progress)
        return unflatten(buffers)

    def each(self, component: Component, take: Callable[[Row, np.ndarray], None], progress: Progress | None) -> None:
        """Calls `take(row, values)` for every parameter of every layer, on several threads; `values` is a view in our shape."""
        part = self.parts[component]

        def fill(tensor: SourceTensor) -> int:
            whole = part.reader.read(tensor.key)
            pieces = np.split(whole, len(tensor.rows)) if len(tensor.rows) > 1 else [whole]
            for row, piece in zip(tensor.rows, pieces, strict=True):
                take(row, mapping.to_ours(piece, row))
            return whole.nbytes

        for nbytes in in_threads(fill, part.tensors):
            if progress is not None:
                progress(nbytes)

    def save(self, component: Component, directory: pathlib.Path, dtype: Any, progress: Progress | None = None) -> None:
        """What `save_component(directory, load(component, dtype))` writes, with one tensor a thread in memory."""
        files = array_files.create(
            directory, mapping.leaves(self.parts[component].table), self.stored_dtypes(component, dtype)
        )

        def write(row: Row, values: np.ndarray) -> None:
            values = contiguous([values], files.dtypes[row.path])
            if row.layer is None:
                files.write(row.path, 0, values)
            else:
                files.write(row.path, row.layer, values[None])

        self.each(component, write, progress)


def _check(component: Component, layout: Layout, reader: Reader, config: WanConfig, where: pathlib.Path) -> Part:
    """Raises ValueError for the first tensor that is missing, extra or of another shape, and names it and its file."""
    table = mapping.rows(component, config)
    part = Part(reader, table, list(mapping.tensors(table, layout)))
    wanted = {tensor.key: tensor for tensor in part.tensors}
    part.unused = sorted(key for key in reader.tensors if key not in wanted and key.startswith(UNUSED[component]))
    extra = [key for key in reader.tensors if key not in wanted and key not in set(part.unused)]
    missing = [key for key in wanted if key not in reader.tensors]
    files = {info.file for info in reader.tensors.values()}
    where = files.pop() if len(files) == 1 else where
    if missing:
        near = difflib.get_close_matches(missing[0], extra, 1)
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        hint = f"; it has {near[0]!r}, which no Wan2.1 {component} has" if near else ""
        raise ValueError(f"{where} lacks tensor {missing[0]!r}{more}{hint}; copy or download it again")
    if extra:
        info = reader.tensors[extra[0]]
        near = difflib.get_close_matches(extra[0], wanted, 1)
        more = f" and {len(extra) - 1} more" if extra[1:] else ""
        hint = f" (the nearest known name is {near[0]!r})" if near else ""
        raise ValueError(
            f"{info.file} has tensor {extra[0]!r}{more}, which this {component} doesn't use{hint}; remove it"
        )
    for tensor in part.tensors:
        info = reader.tensors[tensor.key]
        if info.shape != tensor.shape:
            raise ValueError(
                f"{info.file}: tensor {tensor.key!r} has shape {list(info.shape)}, this model needs "
                f"{list(tensor.shape)}"
            )
        info.check_dtype()
    filled = {(row.path, row.layer) for tensor in part.tensors for row in tensor.rows}
    unfilled = [row for row in table if (row.path, row.layer) not in filled]
    if unfilled:
        raise ValueError(f"{where}: no tensor fills {unfilled[0].path} of layer {unfilled[0].layer}")
    return part


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit equality, a slice at a time: the embedding is 2 GB."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        x.tobytes() == y.tobytes() for x, y in zip(np.array_split(a, 64), np.array_split(b, 64), strict=True)
    )


def _text_embedding(reader: Reader, spelling: dict[str, Any]) -> tuple[Reader, list[str]]:
    """UMT5 ties two names to one embedding, and a file holds either or both: a reader with `shared.weight` alone."""
    tied = "encoder.embed_tokens.weight"
    if tied not in reader.tensors:
        return reader, []
    if "shared.weight" not in reader.tensors:
        spelling["text_embedding"] = [tied]
        return Renamed(reader, {tied: "shared.weight"}), [f"{tied} stands for shared.weight"]
    if not _same(reader.read("shared.weight"), reader.read(tied)):
        file = reader.tensors[tied].file
        raise ValueError(
            f"{file}: {tied!r} differs from 'shared.weight', which UMT5 ties to it; download the file again"
        )
    spelling["text_embedding"] = ["shared.weight", tied]
    del reader.tensors[tied]
    return reader, [f"{tied} is the same as shared.weight, bit for bit, and is kept once"]


def _vision_prefix(reader: Reader, spelling: dict[str, Any]) -> Reader:
    """transformers 5 saves CLIPVisionModel without the prefix that transformers 4 wrote."""
    bare = [
        key for key in reader.tensors if key.startswith(("embeddings.", "encoder.layers.", "pre_layrnorm.", "post_"))
    ]
    if not bare or any(key.startswith("vision_model.") for key in reader.tensors):
        return reader
    spelling["vision_prefix"] = ""
    return Renamed(reader, {key: f"vision_model.{key}" for key in bare})


def _open_official(path: pathlib.Path) -> tuple[dict[Component, Reader], list[str]]:
    dit = open_safetensors(path, DIT_STEM)
    if dit is None:
        raise ValueError(f"{path} is not a Wan checkpoint: it has neither model_index.json nor {DIT_STEM}*.safetensors")
    if any(key.startswith("condition_embedder.") for key in dit.tensors):
        raise ValueError(f"{path} is the transformer/ folder of a diffusers checkpoint; give the folder above it")
    readers: dict[Component, Reader] = {"dit": dit}
    notes = []
    for file in sorted(path.glob("*.pth")):
        reader = PthFile(file)
        kinds: list[Component] = [
            component
            for component, prefixes in _PTH_PREFIXES.items()
            if file.name == OFFICIAL_PTH[component] or any(key.startswith(prefixes) for key in reader.tensors)
        ]
        if not kinds:
            notes.append(f"{file.name} is no part of a Wan2.1 model and is left out")
        elif kinds[0] in readers:
            raise ValueError(f"{file} is a second {kinds[0]}; keep the one that belongs to this model")
        else:
            readers[kinds[0]] = reader
    return readers, notes


def _open_diffusers(path: pathlib.Path) -> dict[Component, Reader]:
    index = read_json(path / "model_index.json") if (path / "model_index.json").exists() else {}
    second = index.get("transformer_2") or [None]
    if second[0] is not None or (path / "transformer_2").is_dir():
        raise NotImplementedError(f"{path} has a transformer_2: it is a Wan2.2 checkpoint, supported is Wan2.1")
    opened: dict[Component, Reader | None] = {
        name: open_safetensors(path / folder, stem) for name, (folder, stem) in SUBFOLDERS.items()
    }
    named = index.get("image_encoder") or [None]
    if opened["image_encoder"] is None and named[0] is not None and (path / "image_encoder").is_dir():
        raise FileNotFoundError(f"{path / 'image_encoder'} has no model*.safetensors; copy or download it again")
    return {name: reader for name, reader in opened.items() if reader is not None}


def open_checkpoint(path: str | os.PathLike) -> Source:
    """Opens and checks a Wan2.1 directory in the official or the diffusers layout; no weights are read yet.

    Raises:
      FileNotFoundError: `path` or a part of it is missing.
      ValueError: not a Wan checkpoint, a damaged file, or a tensor that is missing, extra or of the wrong shape.
      NotImplementedError: another Wan model (2.2, VACE) or a dtype that is no plain float.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist; give a Wan2.1 directory, official or diffusers")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give the directory that holds the whole checkpoint")
    if is_checkpoint(path):
        raise ValueError(f"{path} is already in this project's format; give an official or a diffusers directory")
    diffusers = (path / "model_index.json").exists() or (path / "transformer").is_dir()
    layout: Layout = "diffusers" if diffusers else "official"
    notes: list[str] = []
    if diffusers:
        readers = _open_diffusers(path)
        names = {name: f"{folder}/{stem}.safetensors" for name, (folder, stem) in SUBFOLDERS.items()}
        tokenizer = path / "tokenizer"
        places = {name: path / folder for name, (folder, _) in SUBFOLDERS.items()}
    else:
        readers, notes = _open_official(path)
        names = {"dit": f"{DIT_STEM}.safetensors", **OFFICIAL_PTH}
        tokenizer = path / OFFICIAL_TOKENIZER
        places = {name: next(iter(reader.tensors.values())).file for name, reader in readers.items()}
        places["dit"] = path
    missing = [names[name] for name in COMPONENTS[:3] if name not in readers]
    if not any((tokenizer / file).is_file() for file in ("tokenizer.json", "spiece.model")):
        missing.append(f"{tokenizer.relative_to(path)}/tokenizer.json (or spiece.model)")
    scheduler = path / "scheduler" / "scheduler_config.json"
    if diffusers and not scheduler.is_file():
        missing.append("scheduler/scheduler_config.json")
    if missing:
        raise FileNotFoundError(
            f"{path} is not a whole Wan2.1 checkpoint ({layout} layout): missing {', '.join(missing)}"
        )

    spelling: dict[str, Any] = {}
    jsons: dict[Component, dict[str, Any]] = {}
    for name in COMPONENTS:
        file = places[name] / "config.json" if diffusers or name == "dit" else None
        if name in readers and file is not None and not file.is_file():
            raise FileNotFoundError(f"{file} is missing; copy or download it again")
        jsons[name] = read_json(file) if name in readers and file is not None else {}
    component_notes: dict[Component, list[str]] = {}
    if diffusers:
        readers["text_encoder"], component_notes["text_encoder"] = _text_embedding(readers["text_encoder"], spelling)
        if "image_encoder" in readers:
            readers["image_encoder"] = _vision_prefix(readers["image_encoder"], spelling)

    dit = infer.dit(layout, readers["dit"], jsons["dit"], places["dit"])
    if dit.task == "t2v" and readers.pop("image_encoder", None) is not None:
        notes.append("the image tower is left out: a T2V model doesn't use it")
    image_encoder = None
    if "image_encoder" in readers:
        noted = readers["dit"].metadata.get("image_encoder_num_heads", "")
        heads = int(noted) if layout == "official" and noted.isdecimal() else None
        image_encoder = infer.image_encoder(
            layout, readers["image_encoder"], jsons["image_encoder"], places["image_encoder"], heads
        )
    flow_shift, flow_shift_480p = infer.flow_shift(
        layout, dit.task, read_json(scheduler) if diffusers else {}, scheduler
    )
    config = WanConfig(
        dit=dit,
        vae=infer.vae(layout, readers["vae"], jsons["vae"], places["vae"]),
        text_encoder=infer.text_encoder(layout, readers["text_encoder"], jsons["text_encoder"], places["text_encoder"]),
        image_encoder=image_encoder,
        flow_shift=flow_shift,
        flow_shift_480p=flow_shift_480p,
    )
    parts: dict[Component, Part] = {
        name: _check(name, layout, readers[name], config, places[name]) for name in COMPONENTS if name in readers
    }
    for name, lines in component_notes.items():
        parts[name].notes.extend(lines)
    for name, theirs in (("text_encoder", dit.text_dim), ("image_encoder", dit.image_dim)):
        own = getattr(config, name)
        if own is not None and own.dim != theirs:
            raise ValueError(
                f"{path}: the {name} is {own.dim} wide, the DiT reads {theirs}; they are of different models"
            )
    if dit.task != "t2v" and image_encoder is None:
        notes.append("there is no image tower: sampling needs image_embeds")
    return Source(path, layout, config, parts, tokenizer, spelling, _audit(path, layout, config, parts, notes))


def _audit(
    path: pathlib.Path, layout: Layout, config: WanConfig, parts: dict[Component, Part], notes: list[str]
) -> dict[str, Any]:
    components = {}
    for name, part in parts.items():
        infos = part.reader.tensors
        components[name] = {
            "source_tensors": len(infos),
            "used": len(part.tensors),
            "left_out": part.unused,
            "parameters_filled": len(mapping.leaves(part.table)),
            "missing": [],
            "extra": [],
            "bytes": part.nbytes,
            "notes": part.notes,
            "tensors": {
                tensor.key: {
                    "file": infos[tensor.key].file.relative_to(path).as_posix(),
                    "dtype": infos[tensor.key].dtype,
                    "shape": list(tensor.shape),
                    "to": [row.path if row.layer is None else f"{row.path}[{row.layer}]" for row in tensor.rows],
                }
                for tensor in part.tensors
            },
        }
    return {"source": str(path), "layout": layout, "task": config.task, "notes": notes, "components": components}
