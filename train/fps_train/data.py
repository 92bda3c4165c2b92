"""Precomputed samples. `Data.fingerprint` says whether they are the same; `batches` makes microbatches of them."""

import hashlib
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fps_jax.config import Task, WanConfig
from fps_jax.sampling.encoding import GIVEN_FRAMES, condition_mask
from fps_train.precompute.buckets import Size
from fps_train.precompute.manifest import Contents, Manifest, Sample, read_manifest
from fps_train.precompute.shards import Store, Tensors

_DEFAULT_PROMPTS = 2


class Bucket(NamedTuple):
    """Samples of one shape. latent_shape: (Z, F, H, W)."""

    name: str
    latent_shape: tuple[int, int, int, int]
    num_samples: int


class ValidationPrompt(NamedTuple):
    """What to sample during training.

    Attributes:
      text: `[T, E]` bf16, zero beyond the prompt's own tokens.
      latent_shape: (Z, F, H, W) of the video.
      condition: `[4 + Z, F, H, W]` bf16, and `image`: `[I, G]` bf16, for i2v and flf2v.
    """

    prompt: str
    text: Float[np.ndarray, "T E"]
    latent_shape: tuple[int, int, int, int]
    condition: Float[np.ndarray, "C F H W"] | None = None
    image: Float[np.ndarray, "I G"] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A folder that fps-precompute wrote, opened by `open_data`.

    Attributes:
      fingerprint: of which clip and text records the samples are; neither the order of shards nor who wrote them changes it.
      fps: frames a second.
      buckets: largest first.
      samples: those of each bucket, in an order of their own.
      empty_text: `[T, E]` bf16, the empty prompt's states.
      vae, text_encoder, image_encoder: fingerprints (`fps_train.fingerprint.encoder_fingerprint`) of what encoded them;
        image_encoder is None for t2v.
    """

    path: pathlib.Path
    contents: Contents
    fingerprint: str
    buckets: tuple[Bucket, ...]
    samples: tuple[tuple[Sample, ...], ...]
    empty_text: Float[np.ndarray, "T E"]
    validation_prompts: tuple[ValidationPrompt, ...]
    latents_store: Store
    text_store: Store

    @property
    def task(self) -> Task:
        return self.contents.task

    @property
    def z_dim(self) -> int:
        return self.contents.z_dim

    @property
    def text_len(self) -> int:
        return self.contents.text_len

    @property
    def text_dim(self) -> int:
        return self.contents.text_dim

    @property
    def fps(self) -> int:
        return self.contents.fps

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the encoders, by component."""
        c = self.contents
        found = {"vae": c.vae, "text_encoder": c.text_encoder, "image_encoder": c.image_encoder}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def prompts_fingerprint(self) -> str:
        """Of the validation prompts: their words, and every number that their videos are sampled with."""
        seen = hashlib.sha256()
        for prompt in self.validation_prompts:
            seen.update(repr((prompt.prompt, prompt.latent_shape)).encode())
            for array in (prompt.text, prompt.condition, prompt.image):
                seen.update(b"-" if array is None else array.tobytes())
        return seen.hexdigest()[:16]

    def check(self, config: WanConfig) -> None:
        """Raises ValueError where a model can't train on these data."""
        if config.task != self.task:
            raise ValueError(
                f"data {str(self.path)!r} are for {self.task}, the model is {config.task}; run fps-precompute with this model"
            )
        image_dim = None if self.contents.image_shape is None else self.contents.image_shape[1]
        image_len = None if self.contents.image_shape is None else self.contents.image_shape[0]
        pairs = [
            ("latent channels", self.z_dim, config.dit.out_channels),
            ("text states of width", self.text_dim, config.dit.text_dim),
            ("text states of length", self.text_len, config.dit.text_len),
            ("image tokens of width", image_dim, config.dit.image_dim),
        ]
        if config.dit.image_positions is not None:
            pairs.append(("image tokens numbering", image_len, config.dit.image_positions))
        for name, ours, theirs in pairs:
            if ours != theirs:
                raise ValueError(
                    f"data {str(self.path)!r} have {name} {ours}, the model takes {theirs}; run fps-precompute with this model"
                )

    def read(self, sample: Sample) -> tuple[Tensors, Float[np.ndarray, "T E"]]:
        """A sample's tensors ('latents'; 'condition' with its mask and 'image' for i2v and flf2v) and padded text states, bf16.

        Raises: ValueError for a damaged shard.
        """
        tensors, _ = self.latents_store.read(sample.clip)
        return _with_mask(tensors, self.task), _padded(self.text_store.read(sample.text)[0]["text"], self.text_len)


def open_data(path: str | os.PathLike) -> Data:
    """Open what fps-precompute wrote; every sample's records are known to be there, none but a few texts is read.

    Raises: FileNotFoundError where there are none, or where a run that makes them isn't finished; ValueError for damaged or empty
      data. In one line.
    """
    folder = pathlib.Path(path)
    manifest = read_manifest(folder)
    contents, what = manifest.contents, f"data {str(folder)!r}"
    latents, text = Store(folder / "latents"), Store(folder / "text")
    if not manifest.samples:
        raise ValueError(f"{what} hold no sample; run fps-precompute with clips that it can use")
    if manifest.empty_text not in text:
        raise ValueError(
            f"{what} lack the empty prompt's text states, which text dropout needs; run fps-precompute again"
        )
    for sample in manifest.samples:
        _check_records(sample, contents, latents, text, what)
    by_size: dict[str, list[Sample]] = {name: [] for name in contents.sizes} if contents.exact else {}
    for sample in manifest.samples:
        by_size.setdefault(sample.size, []).append(sample)
    names = sorted(by_size, key=lambda name: (np.prod(Size.parse(name)), name), reverse=True)
    for name in names:
        if not by_size[name]:
            raise ValueError(
                f"{what} have no sample in bucket {name}; run fps-precompute without it, or with clips for it"
            )
    return Data(
        path=folder,
        contents=contents,
        fingerprint=_fingerprint(manifest),
        buckets=tuple(Bucket(name, _latent_shape(name, contents), len(by_size[name])) for name in names),
        samples=tuple(tuple(by_size[name]) for name in names),
        empty_text=_padded(text.read(manifest.empty_text)[0]["text"], contents.text_len),
        validation_prompts=_prompts(manifest, names[0], latents, text, what),
        latents_store=latents,
        text_store=text,
    )


def described_data(config: WanConfig, sizes: Sequence[str], held_out: int = 0) -> Data:
    """Data of these sizes that nobody has, for planning: shapes as fps-precompute would write them for a model; nothing to read.

    Raises: ValueError for a size that Wan can't make.
    """
    dit, image, tower = config.dit, None, config.image_encoder
    if dit.image_dim is not None and tower is not None:
        image = (len(GIVEN_FRAMES[config.task]) * tower.num_tokens, dit.image_dim)
    contents = Contents(
        task=config.task, z_dim=dit.out_channels, text_len=dit.text_len, text_dim=dit.text_dim, image_shape=image, fps=16,
        sizes=tuple(sizes), exact=True, min_frames=1, dtype="bfloat16", tiling=False, vae="", text_encoder="",
        image_encoder=None if image is None else "",
    )  # fmt: skip
    # As many of each as may be held out, and one to train on
    samples = tuple(
        tuple(Sample(f"{size}-{i}", "", f"{size}-{i}", size, "", "") for i in range(held_out + 1)) for size in sizes
    )
    return Data(
        path=pathlib.Path("described"),
        contents=contents,
        fingerprint="",
        buckets=tuple(
            Bucket(size, _latent_shape(size, contents), len(own)) for size, own in zip(sizes, samples, strict=True)
        ),
        samples=samples,
        empty_text=np.zeros((dit.text_len, dit.text_dim), jnp.bfloat16),
        validation_prompts=(),
        latents_store=None,  # pyright: ignore[reportArgumentType]
        text_store=None,  # pyright: ignore[reportArgumentType]
    )


def _fingerprint(manifest: Manifest) -> str:
    lines = sorted(f"{sample.clip} {sample.text}" for sample in manifest.samples)
    return hashlib.sha256("\n".join([manifest.empty_text, *lines]).encode()).hexdigest()[:32]


def _latent_shape(size: str, contents: Contents) -> tuple[int, int, int, int]:
    return (contents.z_dim, *Size.parse(size).latent_grid)


def _check_records(sample: Sample, contents: Contents, latents: Store, text: Store, what: str) -> None:
    for key, store in ((sample.clip, latents), (sample.text, text)):
        if key not in store:
            raise ValueError(f"{what} lack the {store.folder.name} of {sample.source!r}; run fps-precompute again")
    shape = _latent_shape(sample.size, contents)
    want = {"latents": shape}
    if contents.image_shape is not None:
        want |= {"condition": shape, "image": contents.image_shape}
    shapes, (length, width) = latents.places[sample.clip].shapes, text.places[sample.text].shapes["text"]
    if shapes != want or not 1 <= length <= contents.text_len or width != contents.text_dim:
        raise ValueError(f"{what}: {sample.source!r} has {shapes}, its bucket {want}; run fps-precompute again")


def _padded(text: Float[np.ndarray, "t E"], text_len: int) -> Float[np.ndarray, "T E"]:
    out = np.zeros((text_len, text.shape[1]), jnp.bfloat16)
    out[: len(text)] = text
    return out


def _with_mask(tensors: Tensors, task: Task) -> Tensors:
    if task == "t2v":
        return tensors
    condition = tensors["condition"]
    mask = condition_mask(len(GIVEN_FRAMES[task]), condition.shape[1:]).astype(condition.dtype)
    return {**tensors, "condition": np.concatenate([mask, condition])}


def _prompts(manifest: Manifest, largest: str, latents: Store, text: Store, what: str) -> tuple[ValidationPrompt, ...]:
    contents = manifest.contents
    # Without prompts of the user's: captions of the samples that are held out first.
    chosen = [(p.prompt, p.text, p.clip, p.size if p.clip else largest) for p in manifest.prompts] or [
        (sample.caption, sample.text, sample.clip, sample.size)
        for sample in sorted(manifest.samples, key=held_out_order)[:_DEFAULT_PROMPTS]
    ]
    found = []
    for prompt, text_key, clip, size in chosen:
        given = clip if contents.task != "t2v" else None
        if text_key not in text or (given is not None and given not in latents):
            raise ValueError(f"{what} lack what validation prompt {prompt!r} needs; run fps-precompute again")
        tensors = {} if given is None else _with_mask(latents.read(given)[0], contents.task)
        states = _padded(text.read(text_key)[0]["text"], contents.text_len)
        shape = _latent_shape(size, contents)
        found.append(ValidationPrompt(prompt, states, shape, tensors.get("condition"), tensors.get("image")))
    return tuple(found)


def held_out_order(sample: Sample) -> Any:
    """By the hash of the clip's file: the same clips whatever they are cut to and encoded with, and whatever others there are."""
    return sample.content, sample
