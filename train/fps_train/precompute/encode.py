"""Frames and captions through a checkpoint's encoders, and the keys under which the results are kept."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from fps_jax.checkpoints.open import Model
from fps_jax.checkpoints.placement import visiting
from fps_jax.choices import Dtype
from fps_jax.config import Component, WanConfig
from fps_jax.files import write_json
from fps_jax.models.params import Params
from fps_jax.models.tokenizer import Tokenizer
from fps_jax.models.vae import encode
from fps_jax.sampling.encoding import GIVEN_FRAMES, condition_video, image_tokens, text_states
from fps_train.fingerprint import encoder_fingerprint
from fps_train.precompute.buckets import Size
from fps_train.precompute.shards import Tensors

FRAME_RULE = 1  # raise it when frames.py gives other pixels for the same clip
_TEXTS_AT_ONCE = 8


class Encoders:
    """A checkpoint's encoders, each loaded when it is needed and given back when its phase is over.

    Args:
      model: opened.
      dtype: of the text encoder; the VAE and the image tower are float32 always.
      notes: a JSON file that keeps fingerprints, so that a run with nothing to encode reads no weights. It knows the checkpoint
        by its files' sizes and times.
    """

    def __init__(self, model: Model, dtype: Dtype, notes: pathlib.Path):
        self.model, self.dtype, self._notes = model, jnp.dtype(dtype), notes
        self._params: dict[Component, Params] = {}
        self._stamp = _stamp(model.directory, dtype)

    def params(self, name: Component) -> Params:
        if name not in self._params:
            self._params[name] = self.model.load(name, self.dtype)
        return self._params[name]

    def release(self) -> None:
        """Give back what is loaded."""
        self._params.clear()

    def fingerprint(self, name: Component) -> str:
        """See `encoder_fingerprint`; without loading where it is noted."""
        known = self._read_notes()
        mine = known.get(self._stamp, {})
        if name not in mine:
            mine = {**mine, name: encoder_fingerprint(name, self.params(name))}
            write_json({**known, self._stamp: mine}, self._notes)
        return mine[name]

    def _read_notes(self) -> dict[str, Any]:
        try:
            return json.loads(self._notes.read_bytes())
        except (OSError, ValueError):  # they only save time
            return {}


def _stamp(directory: pathlib.Path, dtype: str) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(directory)), path.stat()) for path in files]
    lines = [dtype, *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsMaker:
    """What encodes clips: the VAE and, for i2v and flf2v, the image tower."""

    config: WanConfig
    vae: Params
    tower: Params | None
    tiling: bool

    def clip(self, pixels: UInt8[np.ndarray, "F H W 3"]) -> Tensors:
        """'latents' `[Z, F, h, w]` of the frames; for i2v and flf2v what `given` returns of its first (and last) one. bf16."""
        video = pixels.astype(np.float32)
        video *= 2 / 255
        video -= 1
        frames = [pixels[place][None].astype(np.float32) / 255 for place in GIVEN_FRAMES[self.config.task]]
        return {"latents": self._latents(video)} | (self.given(frames, len(pixels)) if frames else {})

    def given(self, frames: Sequence[Float[np.ndarray, "1 H W 3"]], num_frames: int) -> Tensors:
        """'condition' `[Z, F, h, w]`, without the mask, and 'image' `[I, G]` of the frames that a video is to follow. bf16."""
        assert self.tower is not None
        image = np.asarray(image_tokens(self.config, self.tower, frames, 1)[0])
        return {
            "condition": self._latents(condition_video(frames, num_frames)[0]),
            "image": image.astype(jnp.bfloat16),
        }

    def _latents(self, video: Float[np.ndarray, "F H W 3"]) -> np.ndarray:
        latents = encode(self.config.vae, self.vae, video[None], tiling=self.tiling)[0]
        if not np.isfinite(latents).all():
            raise FloatingPointError("the VAE gives NaN or inf for it")
        return latents.astype(jnp.bfloat16)


def encode_texts(
    config: WanConfig, params: Params, tokens: dict[str, list[int]], *, dtype: Any
) -> Iterator[tuple[str, Tensors]]:
    """(key, 'text' `[t, E]` in bf16) of every text, in batches of one shape.

    Args:
      params: the text encoder's, in host memory; they visit the device for as long as this runs.
      tokens: ids by key.
    """
    keys = list(tokens)
    with visiting(params) as on_device:
        for start in range(0, len(keys), _TEXTS_AT_ONCE):
            batch = keys[start : start + _TEXTS_AT_ONCE]
            ids = np.zeros((_TEXTS_AT_ONCE, config.dit.text_len), np.int32)
            mask = np.zeros_like(ids)
            for row in range(_TEXTS_AT_ONCE):  # the last batch is filled up: one shape, one program
                mine = tokens[batch[min(row, len(batch) - 1)]]
                ids[row, : len(mine)], mask[row, : len(mine)] = mine, 1
            states = np.asarray(text_states(config, on_device, ids, mask, dtype=dtype))
            for key, row in zip(batch, states, strict=False):
                trimmed = row[: len(tokens[key])]
                if not np.isfinite(trimmed.astype(np.float32)).all():
                    raise FloatingPointError("the text encoder gives NaN or inf; its weights may be damaged")
                yield key, {"text": trimmed.astype(jnp.bfloat16)}


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], text_len: int) -> tuple[list[list[int]], int]:
    """Ids of each text, cut to text_len with the end token kept; and how many had more. The empty text has the end token alone."""
    found, cut = [], 0
    for start in range(0, len(texts), 1024):
        ids, mask = tokenizer(texts[start : start + 1024], max_length=text_len + 1)
        lengths = mask.sum(1)
        cut += int((lengths > text_len).sum())
        for row, length in zip(ids, lengths, strict=True):
            mine = row[: min(length, text_len)].tolist()
            found.append(mine if length <= text_len else [*mine[:-1], int(row[length - 1])])
    return found, cut


def clip_key(
    content: Sequence[str], size: Size, *, fps: int, config: WanConfig, vae: str, tower: str | None, tiling: bool
) -> str:
    """Of the record of a clip: changes with anything that changes a number in it.

    Args:
      content: hash of the clip's file; or, for given images without a clip, of theirs.
      vae, tower: fingerprints.
    """
    parts = [FRAME_RULE, list(content), size.name, fps, config.task, vae, tower, tiling]
    return _hash("clip", parts)


def text_key(ids: Sequence[int], *, encoder: str, dtype: str) -> str:
    """Of the record of a text: what its tokens are, the encoder's fingerprint and compute dtype."""
    return _hash("text", [list(ids), encoder, dtype])


def _hash(kind: str, parts: Any) -> str:
    return hashlib.sha256(json.dumps([kind, parts]).encode()).hexdigest()[:32]
