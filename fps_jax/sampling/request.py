"""What a call of the pipeline asks for: checked as far as no checkpoint is needed, then held against a model's config."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fps_jax.attention.schedule import FPSSchedule
from fps_jax.choices import OutputType, Preset, Setting, check_choice
from fps_jax.config import NEGATIVE_PROMPTS, SamplingDefaults, WanConfig
from fps_jax.media.images import area_size, image_count, image_size, load_image
from fps_jax.sampling.denoise import Segments
from fps_jax.sampling.flow import check_levels
from fps_jax.sampling.presets import Settings, fill
from fps_jax.sampling.request_fields import RequestFields
from fps_jax.sampling.solvers import SolverTable, coefficients
from fps_jax.sizes import Shape3, check_frame, check_integer_up_to, latent_grid, token_grid


class Resolved(NamedTuple):
    """A request on a model: nothing left to fill in.

    Attributes:
      prompts, negatives: B texts each.
      latent_shape: `(B, 16, F, H/8, W/8)`.
      grid: tokens (F, Y, X).
      preset: the request's, or the checkpoint's own.
      settings: solver, steps and guidance by that preset, with what the request says.
      flow_shift: the request's, the preset's, or the checkpoint's own.
      table: the solver's coefficients.
      attention: the request's, or what the model was trained with.
      schedule: with tile and windows filled in; None for dense.
      segments: the self-attention of consecutive steps by that schedule; None for dense.
    """

    prompts: list[str]
    negatives: list[str]
    latent_shape: tuple[int, ...]
    grid: Shape3
    preset: Preset
    settings: Settings
    flow_shift: float
    table: SolverTable
    attention: Setting
    schedule: FPSSchedule | None
    segments: Segments | None


@dataclass(frozen=True, kw_only=True, eq=False)  # by identity: arrays have no one answer to ==
class Request(RequestFields):
    """The arguments of `WanPipeline.__call__`, which says what each means. A schedule's file is read once, here.

    Raises: ValueError for whatever is wrong on every Wan2.1 model; FileNotFoundError for a schedule that isn't there.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = RequestFields.negative_prompt
    seed: int | Sequence[int] = RequestFields.seed
    schedule: FPSSchedule | str | os.PathLike | None = RequestFields.schedule
    output_type: OutputType = "np"

    def __post_init__(self):
        self._take_numpy()
        self.check_fields()
        check_choice("output_type", self.output_type, OutputType)
        self._check_walk()
        object.__setattr__(self, "schedule", _read_schedule(self.schedule))

    def _take_numpy(self) -> None:
        """Whole numbers and truth values of NumPy become Python's: its small ones would overflow in products."""
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, np.integer | np.bool_):
                object.__setattr__(self, name, value.item())
        if isinstance(self.seed, np.ndarray):
            object.__setattr__(self, "seed", self.seed.tolist())

    def filled(self, config: WanConfig) -> "Request":
        """The same, with what this model has where the request says nothing: sizes, negative prompt, steps and guidance."""
        own = config.sampling
        names = ["negative_prompt"]
        if self.preset is None and config.preset == "wan":  # the other presets' steps and guidance are their point
            names += ["guidance_scale"] + ["num_inference_steps"] * (self.sigmas is None and self.timesteps is None)
        mine = {name: getattr(own, name) for name in names if getattr(self, name) is None}
        height, width, num_frames = self._size(own)
        return dataclasses.replace(self, height=height, width=width, num_frames=num_frames, size="exact", **mine)

    def _size(self, own: SamplingDefaults) -> Shape3:
        """(height, width, num_frames) of the video. Raises as `load_image`, where the size is the image's."""
        height, width, num_frames = self._asked(own)
        if self.size == "area":
            height, width = area_size(*image_size(self.image), height * width)
        return height, width, num_frames

    def resolve(self, config: WanConfig, trained: FPSSchedule | None = None) -> Resolved:
        """The request on a model of this config, trained with a schedule. Raises ValueError for what this model can't do."""
        if config.causal is not None:
            raise ValueError(
                "this checkpoint makes video block after block (block diffusion), and for a whole video at once it wasn't trained; "
                "use fps-stream (CausalPipeline)"
            )
        given, (height, width, num_frames) = self.filled(config), self._size(config.sampling)
        prompts, negatives = given._texts(NEGATIVE_PROMPTS[config.task])
        shape = latent_shape(len(prompts), height, width, num_frames, config)
        grid = token_grid(shape[2:], config.dit.patch_size)
        preset = self.preset or config.preset
        settings = given._settings(preset)
        shift = settings.flow_shift
        if shift is None:
            shift = default_flow_shift(config, *self._asked(config.sampling)[:2])
        table = coefficients(settings.solver, settings.levels(shift))
        attention, schedule = self._attention(trained, grid)
        segments = None
        if schedule is not None:
            segments = schedule.segments(table.sigma, shift, grid, config.dit.num_layers)
        self._check_latents(shape)
        self._check_images(config, len(prompts))
        return Resolved(prompts, negatives, shape, grid, preset, settings, shift, table, attention, schedule, segments)

    def setting(self, trained: FPSSchedule | None) -> Setting:
        """The attention that was asked for, or what a schedule means: the request's, or that of a model trained with one."""
        return self.attention or ("dense" if trained is None and self.schedule is None else "fps")

    def noise(self, shape: tuple[int, ...]) -> Float[Array, "B 16 F H W"]:
        """The initial noise: the caller's, or a normal draw with one key per sample. shape: `Resolved.latent_shape`."""
        if self.latents is not None:
            return jnp.array(np.asarray(self.latents), jnp.float32)  # a copy: the caller's array stays the caller's
        return jnp.stack([_normal(seed, None, shape[1:]) for seed in self._seeds()])

    def step_noise(self, shape: tuple[int, ...], num_steps: int) -> Float[Array, "n B 16 F H W"]:
        """What a solver that adds noise adds after each step: of a sample's seed and the step alone.

        shape: `Resolved.latent_shape`. The last step adds nothing: zeros.
        """
        steps = [jnp.stack([_normal(seed, i, shape[1:]) for seed in self._seeds()]) for i in range(num_steps - 1)]
        return jnp.stack([*steps, jnp.zeros(shape, jnp.float32)])

    def check_tower(self, config: WanConfig, has_tower: bool) -> None:
        """Raises ValueError where image-tower tokens are needed, and there is neither a tower nor the tokens."""
        if config.task != "t2v" and self.image_embeds is None and not has_tower:
            raise ValueError("this checkpoint has no image tower; pass image_embeds=[B, tokens, width] beside image")

    def frames(self, config: WanConfig, *, tell_crop: bool = False) -> list[np.ndarray]:
        """The given frames, float32 [1 or B, H, W, 3] in [0, 1]: none for t2v, the first for i2v, first and last for flf2v.

        Raises: as `fps_jax.media.images.load_image`.
        """
        height, width, _ = self._size(config.sampling)
        return [
            load_image(getattr(self, name), height, width, name=name, tell_crop=tell_crop)
            for name in _IMAGES[config.task]
        ]

    def _check_walk(self) -> None:
        """The noise levels, as far as no checkpoint is needed: its preset and its shift aren't known yet."""
        for name in ("sigmas", "timesteps"):
            if getattr(self, name) is not None:
                levels = check_levels(name, getattr(self, name))
                object.__setattr__(self, name, tuple(float(level) for level in levels))
        settings = self._settings(self.preset or "wan")
        if settings.flow_shift is not None or settings.timesteps is None:
            settings.levels(5.0 if settings.flow_shift is None else settings.flow_shift)

    def _settings(self, preset: Preset) -> Settings:
        return fill(
            preset,
            solver=self.solver,
            sigma_grid=self.sigma_grid,
            num_inference_steps=self.num_inference_steps,
            sigmas=None if self.sigmas is None else tuple(self.sigmas),
            timesteps=None if self.timesteps is None else tuple(self.timesteps),
            flow_shift=self.flow_shift,
            guidance_scale=self.guidance_scale,
        )

    def _attention(self, trained: FPSSchedule | None, grid: Shape3) -> tuple[Setting, FPSSchedule | None]:
        """The attention setting and its schedule on a token grid, nothing left to propose; ('dense', None) without one."""
        setting = self.setting(trained)
        if setting == "dense":
            return setting, None
        given: Any = trained if self.schedule is None else self.schedule
        if given is None:
            given = FPSSchedule.default(grid)
        return setting, given.setting(setting).resolve(grid)

    def _check_latents(self, shape: tuple[int, ...]) -> None:
        if self.latents is None:
            return
        given = np.asarray(self.latents)
        if given.shape != shape:
            raise ValueError(f"latents has shape {given.shape}; this prompt, size and num_frames need {shape}")
        if not jnp.issubdtype(given.dtype, jnp.floating):
            raise ValueError(f"latents has dtype {given.dtype}; pass floating point noise")
        if not np.isfinite(given.astype(np.float32)).all():
            raise ValueError("latents holds NaN or inf; pass finite noise")

    def _check_images(self, config: WanConfig, batch: int) -> None:
        """Images and image-tower tokens: those that the task needs, no others, tokens of the model's shape."""
        wanted = _IMAGES[config.task]
        for name in ("image", "last_image"):
            value = getattr(self, name)
            if value is not None and name not in wanted:
                model = f"{'an' if config.task == 'i2v' else 'a'} {config.task} model"
                raise ValueError(f"{name} was given, but this is {model}; leave {name} out or use another model")
            if value is None and name in wanted:
                raise ValueError(
                    f"{name} is missing, and a {config.task} model needs it; pass a path, a PIL image or an array"
                )
            count = 1 if value is None else image_count(value, name)
            if count not in (1, batch):
                raise ValueError(f"{name} has {count} images for {batch} prompts; pass one, or as many")
        if self.image_embeds is None:
            return
        if config.task == "t2v":
            raise ValueError("image_embeds was given, but this is a t2v model; leave it out or use an i2v model")
        shape = np.shape(self.image_embeds)
        count = config.dit.image_positions or (config.image_encoder.num_tokens if config.image_encoder else 257)
        want = (batch, count, config.dit.image_dim)
        if shape != want:
            raise ValueError(f"image_embeds has shape {shape}; this model and these prompts need {want}")
        given = np.asarray(self.image_embeds)
        if not jnp.issubdtype(given.dtype, jnp.floating) or not np.isfinite(given.astype(np.float32)).all():
            raise ValueError(f"image_embeds has dtype {given.dtype} or NaN or inf; pass finite floats")


def _normal(seed: int, step: int | None, shape: tuple[int, ...]) -> Array:
    """A sample's initial noise (step None), or what a step adds. By one generator, whatever JAX's default is here."""
    with jax.threefry_partitionable(True):
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.normal(key if step is None else jax.random.fold_in(key, step), shape, jnp.float32)


# The frames that a task is given.
_IMAGES: dict[str, tuple[str, ...]] = {"t2v": (), "i2v": ("image",), "flf2v": ("image", "last_image")}


def _read_schedule(given: Any) -> FPSSchedule | None:
    """The schedule of a request, its file read. Raises ValueError for one that is none."""
    if isinstance(given, str | os.PathLike):
        return FPSSchedule.load(given)
    if given is not None and not isinstance(given, FPSSchedule):
        raise ValueError(f"schedule={given!r} is not an FPSSchedule, the path of its JSON file or None")
    return given


def latent_shape(batch: int, height: int, width: int, num_frames: int, config: WanConfig) -> tuple[int, ...]:
    """Shape of the latents `[B, 16, F, H/8, W/8]`. Raises as `check_frame`."""
    check_frame(height, width, num_frames)
    if config.task == "flf2v" and num_frames < 5:
        raise ValueError(f"num_frames={num_frames} leaves nothing between the first and the last frame; use 5 or more")
    return (batch, config.vae.z_dim, *latent_grid(height, width, num_frames))


def default_flow_shift(config: WanConfig, height: int, width: int) -> float:
    """The checkpoint's shift; official I2V has another for frames up to 480 x 832 pixels."""
    if config.flow_shift_480p is not None and height * width <= 480 * 832:
        return config.flow_shift_480p
    return config.flow_shift


def repeated(count: Any, prompt: Any, *others: Any) -> tuple[Any, ...]:
    """A prompt and what goes with it for `count` videos of each (`num_videos_per_prompt`). Raises ValueError for no such count."""
    check_integer_up_to("num_videos_per_prompt", count, 1000, "more than a call is made for")
    if count < 1:
        raise ValueError(f"num_videos_per_prompt={count} is less than 1; use 1 or more")
    if isinstance(prompt, str) and count > 1:
        prompt = [prompt]
    return tuple(_repeated(value, count) for value in (prompt, *others))


def _repeated(value: Any, count: int) -> Any:
    """Each item of a list, or of a batch of images, `count` times; what is one for all stays it."""
    if count == 1:
        return value
    if isinstance(value, list | tuple):
        return [item for item in value for _ in range(count)]
    return np.repeat(np.asarray(value), count, axis=0) if getattr(value, "ndim", 0) == 4 else value
