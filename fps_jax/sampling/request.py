"""What a call of the pipeline asks for: its arguments checked, defaults filled in, outputs shaped."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fps_jax.attention.schedule import FPSSchedule
from fps_jax.choices import Setting, check_choice
from fps_jax.config import WanConfig
from fps_jax.media.images import load_image
from fps_jax.sizes import Shape3, latent_grid

log = logging.getLogger("fps_jax")


def prompts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, default_negative: str
) -> tuple[list[str], list[str]]:
    """Prompts and as many negative prompts."""
    positive = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not positive or not all(isinstance(p, str) for p in positive):
        raise ValueError(f"prompt={prompt!r} is not a text or a non-empty list of texts")
    if negative_prompt is None:
        negative_prompt = default_negative
    if isinstance(negative_prompt, str):
        return positive, [negative_prompt] * len(positive)
    if not isinstance(negative_prompt, Sequence):
        raise ValueError(f"negative_prompt={negative_prompt!r} is not None, a text or a list of texts")
    negative = list(negative_prompt)
    if len(negative) != len(positive) or not all(isinstance(p, str) for p in negative):
        raise ValueError(
            f"negative_prompt has {len(negative)} texts for {len(positive)} prompts; pass one text, or as many"
        )
    return positive, negative


def integer(name: str, value: Any) -> None:
    """Raises ValueError for what is no whole number."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not a whole number; pass an int")


def guidance(scale: Any) -> None:
    """Raises ValueError for a guidance weight that is no finite number."""
    if not isinstance(scale, int | float | np.number) or not np.isfinite(scale):
        raise ValueError(f"guidance_scale={scale!r} is not a finite number; Wan uses 5.0")


def check_frame(height: int, width: int, num_frames: int) -> None:
    """Raises ValueError for a frame size or a number of frames that no Wan2.1 model makes."""
    for name, value in (("height", height), ("width", width), ("num_frames", num_frames)):
        integer(name, value)
    for name, value in (("height", height), ("width", width)):
        if value < 16 or value % 16:
            nearest = max(16, round(value / 16) * 16)
            raise ValueError(f"{name}={value} is not a positive multiple of 16 (VAE 8 x patch 2); use {nearest}")
    if num_frames < 1 or num_frames % 4 != 1:
        nearest = max(1, num_frames // 4 * 4 + 1)
        raise ValueError(f"num_frames={num_frames} is not 4k+1 (Wan's VAE groups frames by 4); use {nearest}")


def latent_shape(batch: int, height: int, width: int, num_frames: int, config: WanConfig) -> tuple[int, ...]:
    """Shape of the latents `[B, 16, F, H/8, W/8]`. Raises as `check_frame`."""
    check_frame(height, width, num_frames)
    if config.task == "flf2v" and num_frames < 5:
        raise ValueError(f"num_frames={num_frames} leaves nothing between the first and the last frame; use 5 or more")
    return (batch, config.vae.z_dim, *latent_grid(height, width, num_frames))


def schedule(attention: Setting, given: Any, grid: Shape3) -> FPSSchedule | None:
    """The schedule of an attention setting on a token grid, nothing left to propose; None for 'dense'. Raises ValueError."""
    check_choice("attention", attention, Setting)
    if attention == "dense":
        if given is not None:
            raise ValueError(
                "schedule was given, but attention='dense' follows none; pass attention='fps', or leave it out"
            )
        return None
    if given is None:
        given = FPSSchedule.default(grid)
    elif isinstance(given, str | os.PathLike):
        given = FPSSchedule.load(given)
    elif not isinstance(given, FPSSchedule):
        raise ValueError(f"schedule={given!r} is not an FPSSchedule, the path of its JSON file or None")
    return given.setting(attention).resolve(grid)


def default_flow_shift(config: WanConfig, height: int, width: int) -> float:
    """The checkpoint's shift; official I2V has another for frames up to 480 x 832 pixels."""
    if config.flow_shift_480p is not None and height * width <= 480 * 832:
        return config.flow_shift_480p
    return config.flow_shift


def noise(latents: Any, seed: int | Sequence[int], shape: tuple[int, ...]) -> Float[Array, "B 16 F H W"]:
    """The initial noise: the caller's, or a normal draw with one key per sample."""
    if latents is not None:
        given = np.asarray(latents)
        if given.shape != shape:
            raise ValueError(f"latents has shape {given.shape}; this prompt, size and num_frames need {shape}")
        if not jnp.issubdtype(given.dtype, jnp.floating):
            raise ValueError(f"latents has dtype {given.dtype}; pass floating point noise")
        return jnp.array(given, jnp.float32)  # a copy: the caller's array stays the caller's
    if isinstance(seed, int | np.integer):
        seeds = [int(seed) + i for i in range(shape[0])]
    elif isinstance(seed, Sequence | np.ndarray):
        seeds = list(seed)
    else:
        raise ValueError(f"seed={seed!r} is not a whole number or a list of them")
    if len(seeds) != shape[0]:
        raise ValueError(f"seed has {len(seeds)} values for {shape[0]} prompts; pass one integer, or as many")
    for value in seeds:
        integer("seed", value)
        if not 0 <= value < 2**32:  # jax would wrap a larger one silently
            raise ValueError(f"seed={value} is not in [0, 2**32); use a smaller or a positive one")
    return jnp.stack([jax.random.normal(jax.random.key(int(s)), shape[1:], jnp.float32) for s in seeds])


def conditioning_frames(
    config: WanConfig, image: Any, last_image: Any, embeds: Any, height: int, width: int, num_frames: int
) -> list[np.ndarray]:
    """The given frames, float32 [1 or B, H, W, 3] in [0, 1]: none for t2v, the first for i2v, first and last for flf2v."""
    given = {"image": image, "last_image": last_image}
    wanted = {"t2v": (), "i2v": ("image",), "flf2v": ("image", "last_image")}[config.task]
    if config.task == "t2v" and embeds is not None:
        given["image_embeds"] = embeds
    for name, value in given.items():
        if value is not None and name not in wanted and name != "image_embeds":
            model = f"{'an' if config.task == 'i2v' else 'a'} {config.task} model"
            raise ValueError(f"{name} was given, but this is {model}; leave {name} out or use another model")
        if value is not None and name == "image_embeds":
            raise ValueError("image_embeds was given, but this is a t2v model; leave it out or use an i2v model")
        if value is None and name in wanted:
            raise ValueError(
                f"{name} is missing, and a {config.task} model needs it; pass a path, a PIL image or an array"
            )
    return [load_image(given[name], height, width, name=name) for name in wanted]


def image_embeds(config: WanConfig, embeds: Any, batch: int) -> Float[Array, "B I E"] | None:
    """Image-tower tokens that the caller brings, checked."""
    if embeds is None:
        return None
    tokens = np.asarray(embeds)
    count = config.dit.image_positions or (config.image_encoder.num_tokens if config.image_encoder else 257)
    want = (batch, count, config.dit.image_dim)
    if tokens.shape != want:
        raise ValueError(f"image_embeds has shape {tokens.shape}; this model and these prompts need {want}")
    return jnp.array(tokens, jnp.float32)


def to_unit_range(video: np.ndarray) -> np.ndarray:
    """[-1, 1] to [0, 1], in place."""
    video *= 0.5
    video += 0.5
    return np.clip(video, 0, 1, out=video)


def to_pil(video: np.ndarray) -> list[list[Any]]:
    """One list of PIL images a sample."""
    from PIL import Image

    return [[Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in sample] for sample in video]


def log_tiling(needed: int, free: int) -> bool:
    """Whether a decode that needs so many bytes has to be tiled; says so once in the log."""
    if needed <= free:
        return False
    log.info("VAE decode needs %.1f GB and %.1f GB are free: decoding in spatial tiles", needed / 1e9, free / 1e9)
    return True
