"""Where a name has two spellings: both are read as the first, and written back as the source had them; and what trainers leave
in names, which is not.
"""

from typing import Any

import numpy as np

from fps_convert.formats.readers import Reader, Renamed
from fps_convert.formats.writers import Output
from fps_jax.config import Component


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit equality, a slice at a time: the embedding is 2 GB."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        x.tobytes() == y.tobytes() for x, y in zip(np.array_split(a, 64), np.array_split(b, 64), strict=True)
    )


def text_embedding(reader: Reader, spelling: dict[str, Any]) -> tuple[Reader, list[str]]:
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


# What FSDP, activation checkpointing and torch.compile put before the names of what they wrap, anywhere in a key.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def unwrapped(reader: Reader) -> tuple[Reader, list[str]]:
    """The tensors under the names that they have without a trainer's wrappers. Raises ValueError where two then have one."""
    names: dict[str, str] = {}
    for key in reader.tensors:
        bare = key
        for wrapper in _WRAPPERS:
            bare = bare.replace(wrapper, "")
        if bare != key:
            names[key] = bare
    if not names:
        return reader, []
    kept = set(reader.tensors) - set(names)
    twice = next((bare for bare in names.values() if bare in kept), None)
    if twice is not None or len(set(names.values())) < len(names):
        twice = twice or next(bare for bare in names.values() if list(names.values()).count(bare) > 1)
        raise ValueError(
            f"{next(iter(reader.tensors.values())).file} has tensor {twice!r} twice, with and without a trainer's wrappers "
            "(_fsdp_wrapped_module.); save it again without them"
        )
    return Renamed(reader, names), [
        f"{len(names)} keys have a trainer's wrappers (such as {min(names)!r}), which are left out"
    ]


def vision_prefix(reader: Reader, spelling: dict[str, Any]) -> Reader:
    """transformers 5 saves CLIPVisionModel without the prefix that transformers 4 wrote."""
    bare = [
        key for key in reader.tensors if key.startswith(("embeddings.", "encoder.layers.", "pre_layrnorm.", "post_"))
    ]
    if not bare or any(key.startswith("vision_model.") for key in reader.tensors):
        return reader
    spelling["vision_prefix"] = ""
    return Renamed(reader, {key: f"vision_model.{key}" for key in bare})


def spelled(component: Component, outputs: list[Output], spelling: dict[str, Any]) -> list[Output]:
    """The tensors under the keys that the source had; `spelling` is what the two above noted."""

    def renamed(output: Output, key: str) -> Output:
        return Output(key, output.shape, output.dtype, output.make)

    if component == "text_encoder" and "text_embedding" in spelling:
        tied = [output for output in outputs if output.key == "shared.weight"]
        rest = [output for output in outputs if output.key != "shared.weight"]
        return [renamed(output, key) for key in spelling["text_embedding"] for output in tied] + rest
    if component == "image_encoder" and "vision_prefix" in spelling:
        prefix = spelling["vision_prefix"]
        return [renamed(output, prefix + output.key.removeprefix("vision_model.")) for output in outputs]
    return outputs
