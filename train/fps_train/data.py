"""Precomputed samples, and the microbatches that a run takes of them.

Microbatch i is a function of (data, seed, i) alone: a run that goes on needs no state of a loader but how many it has taken, and
another number of hosts goes on with the same ones. `Data.fingerprint` says whether the data are the same.
"""

import collections
import functools
import hashlib
import os
import pathlib
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fps_jax.config import Task, WanConfig
from fps_jax.sampling.encoding import GIVEN_FRAMES, condition_mask
from fps_train.batch import Batch
from fps_train.precompute.buckets import Size
from fps_train.precompute.manifest import Contents, Manifest, Sample, read_manifest
from fps_train.precompute.shards import Store, Tensors

_DEFAULT_PROMPTS = 2
_AHEAD = 4  # microbatches that are read while the device works, and threads that read them
# What random draws are for, beside the seed: none has the numbers of another.
_ORDER, _SHUFFLE, _DROPOUT = 1, 2, 3


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
        for sample in sorted(manifest.samples, key=_held_out_order)[:_DEFAULT_PROMPTS]
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


def _held_out_order(sample: Sample) -> Any:
    """By the hash of the clip's file: the same clips whatever they are cut to and encoded with, and whatever others there are."""
    return sample.content, sample


class Batches:
    """The microbatches of a run.

    Every sample of a bucket comes once an epoch, in an order of that epoch. Where a bucket's samples don't fill a microbatch, the
    next epoch's follow, so a sample may be twice in one. In as many microbatches as there are training samples each bucket comes
    exactly as often as it has samples, in a random order: not in step with a sequence of regimes, whatever that is.

    Args:
      data: opened.
      batch_size: of a microbatch over all hosts.
      seed: in [0, 2**32).
      text_dropout: share of samples that come with the empty prompt instead of their own; decided for sample n by (seed, n).
      validation_samples: so many are held out, those of the clips with the lowest hashes. Their clips are not trained on with
        other captions either.
      host, hosts: this host's rows of each microbatch are taken, the host-th part of batch_size / hosts.
    Raises: ValueError where one of these is wrong, or a bucket would have no sample left.
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int,
        seed: int,
        text_dropout: float = 0.1,
        validation_samples: int = 0,
        host: int = 0,
        hosts: int = 1,
    ):
        if batch_size < 1 or hosts < 1 or batch_size % hosts:
            raise ValueError(f"batch_size={batch_size} is not a positive multiple of the {hosts} hosts that share it")
        if not 0 <= host < hosts:
            raise ValueError(f"host={host} is not in 0 to {hosts - 1}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} is not in 0 to 2**32 - 1")
        if not 0 <= text_dropout <= 1:
            raise ValueError(f"text_dropout={text_dropout} is not a share in 0 to 1; Wan's is 0.1")
        total = sum(bucket.num_samples for bucket in data.buckets)
        if not 0 <= validation_samples < total:
            raise ValueError(
                f"validation_samples={validation_samples} leaves none of {total} samples to train on; use fewer"
            )
        self.data, self.batch_size, self.seed, self.text_dropout = data, batch_size, seed, text_dropout
        self.host, self.hosts = host, hosts
        everything = [sample for samples in data.samples for sample in samples]
        held_out = sorted(everything, key=_held_out_order)[:validation_samples]
        clips = {sample.content for sample in held_out}
        kept_out = set(held_out)
        self._validation = [[s for s in samples if s in kept_out] for samples in data.samples]
        self._training = [[s for s in samples if s.content not in clips] for samples in data.samples]
        for bucket, samples in zip(data.buckets, self._training, strict=True):
            if not samples:
                raise ValueError(
                    f"validation_samples={validation_samples} leaves no sample of bucket {bucket.name} to train on; use fewer"
                )
        self._round = functools.lru_cache(maxsize=2)(self._make_round)
        self._epoch = functools.lru_cache(maxsize=2 * len(self._training))(self._make_epoch)

    @property
    def num_samples(self) -> int:
        """Training samples of all buckets: so many make an epoch."""
        return sum(map(len, self._training))

    def bucket(self, i: int) -> int:
        """Which of `data.buckets` microbatch i is of."""
        return self._bucket_and_rank(i)[0]

    def at(self, i: int) -> Batch:
        """Microbatch i of the run, counted from 0: this host's rows of it."""
        bucket, rank = self._bucket_and_rank(i)
        rows = self.batch_size // self.hosts
        places = range(self.host * rows, (self.host + 1) * rows)
        samples = [self._sample(bucket, rank * self.batch_size + r) for r in places]
        numbers = [i * self.batch_size + r for r in places]
        return self._batch(samples, numbers, [self._drops(n) for n in numbers])

    def iterate(self, start: int = 0) -> Generator[tuple[int, Batch]]:
        """(i, microbatch i) from `start` on, without end. Read ahead in threads, which end with the iterator."""
        pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="fps_train_data")
        ahead: collections.deque[Future[Batch]] = collections.deque()
        try:
            ahead.extend(pool.submit(self.at, start + k) for k in range(_AHEAD))
            i = start
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.at, i + _AHEAD))
                yield i, batch
                i += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def validation(self, batch_size: int) -> list[Batch]:
        """The held-out samples in fixed microbatches, bucket by bucket, each with its own text.

        A bucket's last one is smaller where batch_size doesn't divide their number. `Batch.sample` counts them from 0. A host gets
        its rows; of the last one as many as all hosts can have alike, and the rest, fewer than there are hosts, is left out.
        """
        if batch_size < 1 or batch_size % self.hosts:
            raise ValueError(
                f"batch_size={batch_size} is not a positive multiple of the {self.hosts} hosts that share it"
            )
        found, first = [], 0
        for samples in self._validation:
            for start in range(0, len(samples), batch_size):
                rows = min(batch_size, len(samples) - start) // self.hosts
                mine = range(start + self.host * rows, start + (self.host + 1) * rows)
                if rows:
                    found.append(self._batch([samples[k] for k in mine], [first + k for k in mine], [False] * rows))
            first += len(samples)
        return found

    def _batch(self, samples: Sequence[Sample], numbers: Sequence[int], drops: Sequence[bool]) -> Batch:
        read = [self.data.read(sample) for sample in samples]
        texts = [self.data.empty_text if drop else text for (_, text), drop in zip(read, drops, strict=True)]
        given = self.data.task != "t2v"
        return Batch(
            latents=np.stack([tensors["latents"] for tensors, _ in read]),
            text=np.stack(texts),
            sample=np.array(numbers, np.int64),
            condition=np.stack([tensors["condition"] for tensors, _ in read]) if given else None,
            image=np.stack([tensors["image"] for tensors, _ in read]) if given else None,
        )

    def _drops(self, n: int) -> bool:
        return _draw(self.seed, _DROPOUT, n, count=1)[0] < self.text_dropout * 2**64

    def _sample(self, bucket: int, position: int) -> Sample:
        """A bucket's samples without end, each epoch in an order of its own."""
        epoch, place = divmod(position, len(self._training[bucket]))
        return self._training[bucket][self._epoch(bucket, epoch)[place]]

    def _make_epoch(self, bucket: int, epoch: int) -> np.ndarray:
        # Not grain's shuffle, which needs no memory: below a thousand samples it walks a cycle of 2**16 for each, 8 ms
        return np.argsort(_draw(self.seed, _SHUFFLE, bucket, epoch, count=len(self._training[bucket])), kind="stable")

    def _bucket_and_rank(self, i: int) -> tuple[int, int]:
        """Microbatch i's bucket, and how many of that bucket came before it."""
        if i < 0:
            raise ValueError(f"microbatch {i} is before the first, 0")
        number, place = divmod(i, self.num_samples)
        order, ranks = self._round(number)
        bucket = int(order[place])
        return bucket, number * len(self._training[bucket]) + int(ranks[place])

    def _make_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The buckets of as many microbatches as there are samples, and the rank of each among those of its bucket."""
        counts = [len(samples) for samples in self._training]
        order = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        if len(counts) > 1:
            order = order[np.argsort(_draw(self.seed, _ORDER, number, count=len(order)), kind="stable")]
        ranks = np.empty(len(order), np.int64)
        for bucket, count in enumerate(counts):
            ranks[order == bucket] = np.arange(count)
        return order, ranks


def _draw(*what: int, count: int) -> np.ndarray:
    """`count` uniform uint64. Raw bits of a named generator: NumPy promises these, not what it makes of them, for all versions."""
    return np.random.PCG64(np.random.SeedSequence(what)).random_raw(count)
