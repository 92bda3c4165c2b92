"""What a run is judged by while it goes on: the loss at fixed noise, and videos of fixed prompts beside the dense model's."""

import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from fps_jax.attention.schedule import FPSSchedule
from fps_jax.attention.sharded import on_mesh
from fps_jax.config import WanConfig
from fps_jax.evaluation.quality import psnr
from fps_jax.files import write_bytes
from fps_jax.media.video import contact_sheet, save_video
from fps_jax.models.dit import DENSE, cast_params
from fps_jax.models.params import Params
from fps_jax.models.vae import decode
from fps_jax.sampling.denoise import denoise
from fps_jax.sampling.guidance import Inputs
from fps_jax.sampling.solvers import solver_table
from fps_train.agreement import is_lead
from fps_train.batch import Batch
from fps_train.config import ValidationOptions
from fps_train.data import ValidationPrompt
from fps_train.plan import BucketPlan
from fps_train.step import Interval, StepOptions, evaluate

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly, however many there are


def validation_loss(
    trained: Params,
    frozen: Params,
    batches: list[tuple[BucketPlan, np.ndarray, Batch]],
    *,
    options: StepOptions,
) -> dict[str, float]:
    """Mean unweighted loss of held-out samples, for each regime and over t's distribution ('mean').

    batches: with the numbers of their samples.
    The noise levels of all samples are spread evenly over a regime's quantiles. A sample's level and noise are functions of its
    number: the same at every call, and in batches of any size.
    """
    sums: dict[str, list[tuple[float, float]]] = {}
    for bucket, numbers, batch in batches:
        size = len(numbers)
        uniform = (numbers.astype(np.float64) + 0.5) * _GOLDEN % 1
        for regime in bucket.regimes:
            interval = Interval(jnp.float32(regime.low), jnp.float32(regime.high))
            losses = evaluate(
                trained,
                frozen,
                batch,
                jnp.uint32(0),
                jnp.asarray(uniform, jnp.float32),
                interval,
                options=options,
                attention=regime.attention,
            )
            sums.setdefault(regime.name, []).append((float(losses.sum()), size))
            sums.setdefault("mean", []).append((float(losses.sum()) * regime.probability, size * regime.probability))
    return {name: sum(s for s, _ in parts) / sum(n for _, n in parts) for name, parts in sums.items()}


class Videos:
    """Samples a run's validation prompts by the weights of the moment, as they will be sampled, and holds them against the dense
    model that the run started from: same noise, same prompts. Written to RUN/validation/.

    Attributes:
      prompts: those that are sampled (`fps_train.data.ValidationPrompt`).
    """

    def __init__(
        self,
        directory: pathlib.Path,
        config: WanConfig,
        vae: Callable[[], Params],
        prompts: tuple[ValidationPrompt, ...],
        empty: Any,
        buckets: tuple[BucketPlan, ...],
        schedule: FPSSchedule | None,
        sampling_shift: float,
        options: ValidationOptions,
        *,
        dtype: Any,
        fps: float,
        mesh: Mesh | None = None,
    ):
        usable = [p for p in prompts if config.task == "t2v" or p.condition is not None]
        self.directory, self.config, self.prompts = directory / "validation", config, usable[: options.videos]
        self._vae, self._empty, self._options, self._schedule = vae, empty, options, schedule
        self._buckets, self._shift = {bucket.latent_shape: bucket for bucket in buckets}, sampling_shift
        self._dtype, self._fps, self._mesh = jnp.dtype(dtype), fps, mesh
        self._table = solver_table("unipc", "wan", options.steps, sampling_shift)

    @property
    def has_reference(self) -> bool:
        """Whether the dense model's videos are there, of every prompt."""
        return all(self._reference(i).exists() for i in range(len(self.prompts)))

    def dense(self, params: Params) -> None:
        """The reference: the dense model's videos, to be sampled once and kept. params: what `dit` takes."""
        vae = self._vae()  # by all processes, as orbax waits for all that read
        for i, latents in enumerate(self._sample(params, None)):
            if is_lead():
                self._write(self.directory / "dense", i, self._decode(vae, latents))

    def sample(self, params: Params, step: int) -> dict[str, float]:
        """The videos of this step, written; mean PSNR in dB of frames and prompts against the dense ones, where there are any.

        All processes of a run sample; process 0 decodes, writes and compares.
        """
        values, vae = [], self._vae()
        for i, latents in enumerate(self._sample(params, self._schedule)):
            if not is_lead():
                continue
            video = self._decode(vae, latents)
            self._write(self.directory / f"step_{step:08d}", i, video)
            if self._reference(i).exists():
                reference = np.load(self._reference(i), allow_pickle=False)
                values.append(float(np.mean(np.minimum(psnr(video, reference), 100.0))))  # 100 dB: equal
        return {"psnr": float(np.mean(values))} if values else {}

    def _sample(self, params: Params, schedule: FPSSchedule | None) -> Iterator[Float[np.ndarray, "1 Z F H W"]]:
        layers = self.config.dit.num_layers
        params = cast_params(params, self._dtype)
        for i, prompt in enumerate(self.prompts):
            bucket = self._buckets.get(prompt.latent_shape, next(iter(self._buckets.values())))
            shape = (1, *bucket.latent_shape)
            segments = ((self._options.steps, DENSE),)
            if schedule is not None:
                segments = schedule.segments(self._table.sigma, self._shift, bucket.grid, layers)
            segments = tuple((count, on_mesh(attention, self._mesh)) for count, attention in segments)
            noise = jax.random.normal(jax.random.key(self._options.seed + i), shape, jnp.float32)
            inputs = Inputs(noise, *(jnp.asarray(text)[None] for text in (prompt.text, self._empty)))
            if self.config.task != "t2v":
                inputs = inputs._replace(
                    condition=jnp.asarray(prompt.condition)[None], image=jnp.asarray(prompt.image)[None]
                )
            latents = denoise(
                self.config.dit,
                params,
                inputs,
                self._table,
                guidance_scale=self._options.guidance_scale,
                dtype=self._dtype,
                segments=segments,
            )
            yield np.asarray(latents) if latents.is_fully_addressable else process_allgather(latents, tiled=True)

    def _decode(self, vae: Params, latents: Float[np.ndarray, "1 Z F H W"]) -> UInt8[np.ndarray, "F H W 3"]:
        video = decode(self.config.vae, vae, jnp.asarray(latents))[0]  # the VAE is one device's
        return np.rint(np.clip(video * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)

    def _reference(self, i: int) -> pathlib.Path:
        return self.directory / "dense" / f"{i}.npy"

    def _write(self, folder: pathlib.Path, i: int, video: np.ndarray) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_video(video, folder / f"{i}.mp4", fps=self._fps)
        contact_sheet(video, folder / f"{i}.png")
        if folder.name == "dense":  # exactly, to compare with: an mp4 isn't
            np.save(buffer := io.BytesIO(), video)
            write_bytes(folder / f"{i}.npy", buffer.getvalue())
