"""The prompts that are sampled during training, and for i2v and flf2v the images that their videos start (and end) with."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fps_jax.config import Task
from fps_jax.media.images import load_image
from fps_jax.sampling.encoding import GIVEN_FRAMES
from fps_train.precompute.buckets import Size


class Wanted(NamedTuple):
    """A prompt and its images' files: none for t2v, one for i2v, two for flf2v."""

    prompt: str
    images: tuple[pathlib.Path, ...]


def read_prompts(path: pathlib.Path | None, task: Task) -> list[Wanted]:
    """A prompt a line; for i2v and flf2v its image, or first and last image, after tabs, relative to the file.

    Raises: FileNotFoundError, OSError or ValueError that names the file and the line.
    """
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"validation_prompts={str(path)!r} doesn't exist; it is a text file with one prompt a line"
        ) from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ValueError(f"validation_prompts={str(path)!r} is not a text file with one prompt a line") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        prompt, *names = line.split("\t")
        images, count = tuple(path.parent / name.strip() for name in names), len(GIVEN_FRAMES[task])
        if len(images) != count:
            raise ValueError(
                f"validation_prompts={str(path)!r}, line {number}: {len(images)} images after the prompt;"
                f" a {task} model takes {count}, each after a tab"
            )
        for image in images:
            load_image(image, 16, 16, name=f"line {number} of validation_prompts")
        found.append(Wanted(prompt.strip(), images))
    if not found:
        raise ValueError(f"validation_prompts={str(path)!r} holds no prompt; write one a line")
    return found


def read_images(paths: Sequence[pathlib.Path], size: Size) -> list[Float[np.ndarray, "1 H W 3"]]:
    """Each image covering the size, float32 in [0, 1]."""
    return [load_image(path, size.height, size.width) for path in paths]
