"""What ComfyUI's single files have beside tensors under the official names: a tokenizer as a tensor, FP8 with scales."""

import pathlib
import re
from typing import get_args

import numpy as np

from fps_convert.formats.readers import FLOATS, FP8
from fps_convert.formats.writers import Output
from fps_convert.fp8 import MARK, codes, scale_of
from fps_convert.parts import TOKENIZER
from fps_jax.choices import ComfyDtype
from fps_jax.config import Component

COMFY_DTYPES: tuple[ComfyDtype, ...] = get_args(ComfyDtype)
_BLOCKS_MATRIX = re.compile(r"blocks\.\d+\..*\.weight")


def tokenizer_output(tokenizer: pathlib.Path) -> list[Output]:
    """`spiece_model`: the bytes of spiece.model as a tensor; none where the folder has a tokenizer.json alone."""
    file = tokenizer / "spiece.model"
    if not file.is_file():
        return []
    content = np.frombuffer(file.read_bytes(), np.uint8)
    return [Output(TOKENIZER, content.shape, "U8", lambda: content)]


def _all(output: Output) -> np.ndarray:
    made = output.make()
    return np.concatenate(made) if isinstance(made, list) else made


def _as_bf16(output: Output) -> Output:
    def make() -> np.ndarray | list[np.ndarray]:
        made = output.make()
        pieces = made if isinstance(made, list) else [made]
        return [piece.astype(FLOATS["BF16"]) for piece in pieces]

    return output if output.dtype == "BF16" else Output(output.key, output.shape, "BF16", make)


def _scaled(output: Output) -> list[Output]:
    """A matrix as e4m3 codes and its scale, each made where it is written."""
    layer = output.key.removesuffix(".weight")

    def weight() -> np.ndarray:
        values = _all(output)
        return codes(values, scale_of(values))

    return [
        Output(output.key, output.shape, "F8_E4M3", weight),
        Output(f"{layer}.scale_weight", (), "F32", lambda: scale_of(_all(output))),
    ]


def cast(name: Component, outputs: list[Output], dtype: ComfyDtype | None) -> list[Output]:
    """The tensors of a component in another dtype; never the VAE's.

    Args:
      dtype: 'bfloat16', or 'fp8_scaled': the matrices of the DiT's blocks in e4m3 with a scale each, all else bf16; None as stored.
    """
    if dtype is None or name == "vae":
        return outputs
    if dtype == "bfloat16" or name != "dit":
        return [_as_bf16(output) for output in outputs]
    # Two elements: ComfyUI then computes in bf16; none would have it multiply in FP8.
    mark = Output(MARK, (2,), "F8_E4M3", lambda: np.zeros(2, FP8["F8_E4M3"]))
    made = [mark]
    for output in outputs:
        matrix = len(output.shape) == 2 and _BLOCKS_MATRIX.fullmatch(output.key)
        made += _scaled(output) if matrix else [_as_bf16(output)]
    return made
