"""The fields of a call, once for Python and the command line, which is parsed before jax is imported: so nothing here needs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from fps_jax.choices import Preset, Setting, SigmaGrid, Size, Solver, check_choice, check_text
from fps_jax.config import SamplingDefaults
from fps_jax.sizes import Shape3, check_frame, check_integer


@dataclass(frozen=True, kw_only=True, eq=False)  # who extends it says what is equal
class RequestFields:
    """What `fps_jax.sampling.request.Request` and `fps_jax.commands.options.VideoOptions` have in common.

    A new field here is an option of the commands, whose help is the text below it, and of a `Request`; it is to be an argument of
    `WanPipeline.__call__` too. One of `Any` is a path on a command line and an array in Python, or one value there and several
    here: each of the two says its own type and has the default from here.
    """

    prompt: Any
    negative_prompt: Any = None
    image: Any = None
    last_image: Any = None
    image_embeds: Any = None
    height: int | None = None
    """Pixels, a multiple of 16; the checkpoint's own if left out, 480 for all of Wan's."""
    width: int | None = None
    """Pixels, a multiple of 16; the checkpoint's own if left out, 832 for Wan's."""
    size: Size = "exact"
    """exact; area keeps the aspect of --image at the area of height x width, as the official code does."""
    num_frames: int | None = None
    """4k + 1; the checkpoint's own if left out, 81 for Wan's."""
    preset: Preset | None = None
    """How to sample where the next seven are left out. wan: 50 steps of unipc, guidance 5, the checkpoint's shift. few-step: for
    step-distilled checkpoints and LoRAs, 4 steps of lcm, shift 5, no guidance. dmd, causvid: FastWan's and CausVid's 3 steps. Left
    out: the checkpoint's own, which is wan for all but FastWan's."""
    num_inference_steps: int | None = None
    """Denoising steps; 50 by the preset wan."""
    guidance_scale: float | None = None
    """Classifier-free guidance weight; at 1 or below the negative prompt isn't used. 5.0 by the preset wan."""
    flow_shift: float | None = None
    """Shift of the noise levels; by the preset wan the checkpoint's own."""
    solver: Solver | None = None
    """unipc (the preset wan's), dpm++ and euler follow the ODE; lcm adds fresh noise after each step, for distilled models."""
    sigma_grid: SigmaGrid | None = None
    """Noise levels of the official code (wan) or of diffusers."""
    sigmas: Sequence[float] | None = None
    """The noise levels themselves, in (0, 1], falling, without the closing 0, in place of a grid."""
    timesteps: Sequence[float] | None = None
    """The same by what the model is told, in (0, 1000], such as 1000 757 522."""
    seed: Any = 0
    latents: Any = None
    vae_tiling: bool = False
    """Decode in spatial tiles, for little memory."""
    batch_guidance: bool = False
    """Evaluate prompt and negative prompt as one batch of two."""
    attention: Setting | None = None
    """Self-attention: dense; fps, FP8 and sparse as the schedule says; fp8 or sparse, only that half of it. Left out: fps with a
    schedule, given here or the checkpoint's own, and else dense."""
    schedule: Any = None

    def check_fields(self) -> None:
        """Raises ValueError for what is wrong on every Wan2.1 model, as far as neither NumPy nor a file has to say so."""
        check_choice("size", self.size, Size)
        if self.size == "area" and self.image is None:
            raise ValueError(
                "size='area' keeps the aspect of an image, and there is none; pass image, or leave size out"
            )
        for name in ("vae_tiling", "batch_guidance"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not True or False")
        self._texts(default_negative="")
        check_frame(*self._asked(SamplingDefaults()))  # a size that is left out can't be wrong
        for name, kind in (("preset", Preset), ("solver", Solver), ("sigma_grid", SigmaGrid), ("attention", Setting)):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), kind)
        if self.num_inference_steps is not None:
            check_integer("num_inference_steps", self.num_inference_steps)
        scale = self.guidance_scale
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, Real) or not -1e3 < scale < 1e3):
            raise ValueError(f"guidance_scale={scale!r} is not a finite number below 1000; Wan uses 5.0")
        if self.attention == "dense" and self.schedule is not None:
            raise ValueError(
                "schedule was given, but attention='dense' follows none; pass attention='fps', or leave it out"
            )
        self._seeds()

    def _asked(self, own: SamplingDefaults) -> Shape3:
        """(height, width, num_frames) as they are given."""
        return (
            own.height if self.height is None else self.height,
            own.width if self.width is None else self.width,
            own.num_frames if self.num_frames is None else self.num_frames,
        )

    def _texts(self, default_negative: str) -> tuple[list[str], list[str]]:
        """Prompts and as many negative prompts."""
        given, negative = self.prompt, self.negative_prompt
        positive = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
        if not positive or not all(isinstance(p, str) for p in positive):
            raise ValueError(f"prompt={given!r} is not a text or a non-empty list of texts")
        for text in positive:
            check_text("prompt", text)
        if negative is None:
            negative = default_negative
        if isinstance(negative, str):
            check_text("negative_prompt", negative)
            return positive, [negative] * len(positive)
        if not isinstance(negative, Sequence):
            raise ValueError(f"negative_prompt={negative!r} is not None, a text or a list of texts")
        if len(negative) != len(positive) or not all(isinstance(p, str) for p in negative):
            raise ValueError(
                f"negative_prompt has {len(negative)} texts for {len(positive)} prompts; pass one text, or as many"
            )
        for text in negative:
            check_text("negative_prompt", text)
        return positive, list(negative)

    def _seeds(self) -> list[int]:
        """One seed per sample."""
        batch = len(self._texts("")[0])
        if isinstance(self.seed, Integral):
            seeds = [int(self.seed) + i for i in range(batch)]
        elif isinstance(self.seed, Sequence):
            seeds = list(self.seed)
        else:
            raise ValueError(f"seed={self.seed!r} is not a whole number or a list of them")
        if len(seeds) != batch:
            raise ValueError(f"seed has {len(seeds)} values for {batch} prompts; pass one integer, or as many")
        for value in seeds:
            check_integer("seed", value)
            if not 0 <= value < 2**32:  # jax would wrap a larger one silently
                raise ValueError(f"seed={value} is not in [0, 2**32); use a smaller or a positive one")
        return [int(value) for value in seeds]
