"""The tiny checkpoints of tests/data, as parameters of ours."""

import dataclasses
import functools
import json
import pathlib
import shutil

import numpy as np
from safetensors.numpy import load_file

from convert import mapping
from fps_jax.config import DiTConfig, WanConfig
from fps_jax.params import Params, unflatten
from tests.reference import DATA

T2V = DATA / "Wan2.1-T2V-tiny-Diffusers"
TINY = DiTConfig(task="t2v", dim=64, mlp_dim=128, num_heads=2, num_layers=3, text_dim=32)
TINY_I2V = DiTConfig(
    task="i2v", dim=64, mlp_dim=128, num_heads=2, num_layers=3, text_dim=32, in_channels=36, image_dim=80
)


def params_from(component: mapping.Component, config: WanConfig, tensors: dict[str, np.ndarray], layout) -> Params:
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


TINY_FLF2V = dataclasses.replace(TINY_I2V, task="flf2v", num_layers=2, image_positions=514)
TRANSFORMERS = {
    "t2v": (T2V / "transformer", TINY),
    "i2v": (DATA / "Wan2.1-I2V-tiny-transformer", TINY_I2V),
    "flf2v": (DATA / "Wan2.1-FLF2V-tiny-transformer", TINY_FLF2V),
}


@functools.cache
def tiny_dit(task: str = "t2v") -> Params:
    """The DiT's parameters of a tiny model."""
    file, config = TRANSFORMERS[task]
    tensors = load_file(file / "diffusion_pytorch_model.safetensors")
    return params_from("dit", WanConfig(dit=config), tensors, "diffusers")


def assemble(directory: pathlib.Path, task: str) -> pathlib.Path:
    """A diffusers checkpoint of `task`: the tiny T2V one with another transformer, and no image tower."""
    shutil.copytree(T2V, directory)
    if task != "t2v":
        shutil.rmtree(directory / "transformer")
        shutil.copytree(TRANSFORMERS[task][0], directory / "transformer")
        index = json.loads((directory / "model_index.json").read_text())
        index["_class_name"] = "WanImageToVideoPipeline"
        (directory / "model_index.json").write_text(json.dumps(index))
    return directory
