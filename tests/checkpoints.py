"""The tiny checkpoints of tests/data, as parameters of ours."""

import atexit
import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

from fps_convert import mapping
from fps_convert.small import write_small_checkpoint
from fps_jax.config import Component, DiTConfig, WanConfig
from fps_jax.models.params import Params, flatten, unflatten
from tests.reference import DATA

T2V = DATA / "Wan2.1-T2V-tiny-Diffusers"
TINY = DiTConfig(task="t2v", dim=64, mlp_dim=128, num_heads=2, num_layers=3, text_dim=32)
TINY_FLF2V = DiTConfig(
    task="flf2v", dim=64, mlp_dim=128, num_heads=2, num_layers=2, text_dim=32, in_channels=36, image_dim=80, image_positions=514
)  # fmt: skip
TINY_I2V = dataclasses.replace(TINY_FLF2V, task="i2v", image_positions=None)
FLF2V_TRANSFORMER = DATA / "Wan2.1-FLF2V-tiny-transformer"


@functools.cache
def small_checkpoint() -> pathlib.Path:
    """Our small checkpoint with random weights (`fps_convert.small`), written once a process."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fps_jax_small_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_small_checkpoint(folder / "small")
    return folder / "small"


def params_from(component: Component, config: WanConfig, tensors: dict[str, np.ndarray], layout) -> Params:
    """Parameters from tensors under a layout's keys; every tensor has to be used."""
    leaves: dict[str, list[np.ndarray]] = {}
    unused = set(tensors)
    for tensor in mapping.tensors(mapping.rows(component, config), layout):
        unused.remove(tensor.key)
        cut = 0
        for row in tensor.rows:
            part = (
                tensors[tensor.key][cut : cut + row.shapes[layout][0]] if len(tensor.rows) > 1 else tensors[tensor.key]
            )
            cut += row.shapes[layout][0]
            leaves.setdefault(row.path, []).append(mapping.to_ours(part, row).reshape(row.shape))
    assert not unused, unused
    stacked = {r.path for r in mapping.rows(component, config) if r.layer is not None}
    return unflatten({p: np.stack(parts) if p in stacked else parts[0] for p, parts in leaves.items()})


@functools.cache
def transformer_tensors(task: str) -> dict[str, np.ndarray]:
    """A tiny DiT under diffusers' keys. The i2v model is the flf2v one without its learned positions."""
    directory = T2V / "transformer" if task == "t2v" else FLF2V_TRANSFORMER
    tensors = load_file(directory / "diffusion_pytorch_model.safetensors")
    return {k: v for k, v in tensors.items() if task != "i2v" or not k.endswith("pos_embed")}


@functools.cache
def tiny_dit(task: str = "t2v") -> Params:
    """The DiT's parameters of a tiny model, float32."""
    config = {"t2v": TINY, "i2v": TINY_I2V, "flf2v": TINY_FLF2V}[task]
    params = params_from("dit", WanConfig(dit=config), transformer_tensors(task), "diffusers")
    return unflatten({path: leaf.astype(np.float32) for path, leaf in flatten(params)})


def assemble(directory: pathlib.Path, task: str) -> pathlib.Path:
    """A diffusers checkpoint of `task`: the tiny T2V one with another transformer, and no image tower."""
    shutil.copytree(T2V, directory)
    if task != "t2v":
        config = json.loads((FLF2V_TRANSFORMER / "config.json").read_text())
        config["pos_embed_seq_len"] = 514 if task == "flf2v" else None
        (directory / "transformer" / "config.json").write_text(json.dumps(config))
        save_file(transformer_tensors(task), directory / "transformer" / "diffusion_pytorch_model.safetensors")
        index = json.loads((directory / "model_index.json").read_text())
        index["_class_name"] = "WanImageToVideoPipeline"
        (directory / "model_index.json").write_text(json.dumps(index))
    return directory
