"""WanPipeline: prompt in, video out."""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fps_jax.attention.schedule import FPSSchedule
from fps_jax.checkpoints.format import save_checkpoint
from fps_jax.checkpoints.lora import LoRA, MergedLoRAs, Scaled
from fps_jax.checkpoints.open import Model, open_lora, open_model, open_model_files
from fps_jax.checkpoints.placement import visiting
from fps_jax.choices import Dtype, OutputType, Preset, Setting, SigmaGrid, Size, Solver, check_choice
from fps_jax.compilation import enable_compilation_cache
from fps_jax.config import WanConfig
from fps_jax.foreign import check_no_foreign, no_attribute
from fps_jax.media.video import to_pil
from fps_jax.models.params import Params
from fps_jax.models.tokenizer import Tokenizer, check_vocabulary
from fps_jax.models.vae import decode, decode_bytes, encode
from fps_jax.profiling.stages import stage
from fps_jax.progress import Progress, progress_bar, waiting
from fps_jax.sampling.denoise import Segments, denoise
from fps_jax.sampling.encoding import condition_mask, condition_video, image_tokens, text_states
from fps_jax.sampling.guidance import Inputs
from fps_jax.sampling.presets import PRESETS
from fps_jax.sampling.request import Request, repeated
from fps_jax.sampling.solvers import SolverTable
from fps_jax.sizes import video_size

log = logging.getLogger("fps_jax")


class Prepared(NamedTuple):
    """What `denoise` takes of a call, and whether to decode in spatial tiles."""

    inputs: Inputs
    table: SolverTable
    guidance_scale: float
    segments: Segments | None
    tiling: bool


@dataclasses.dataclass
class WanPipeline:
    """A Wan2.1 checkpoint that samples videos.

    Attributes:
      config: the architecture.
      params: 'dit', 'vae', 'text_encoder' and, where there is one, 'image_encoder'. The two encoders live in host memory and
        visit the device for the time of a call, so the DiT has it to itself.
      dtype: compute dtype of the DiT and the text encoder.
      show_progress: a progress bar on stderr; None shows one where stderr is a terminal.
      schedule: what the checkpoint was trained with, and is sampled with unless a call says otherwise; None for dense.
    """

    config: WanConfig
    params: dict[str, Params]
    tokenizer: Tokenizer
    dtype: Any
    show_progress: bool | None = None
    schedule: FPSSchedule | None = None
    _merged: MergedLoRAs = dataclasses.field(default_factory=MergedLoRAs, repr=False)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, dtype: str = "bfloat16", show_progress: bool | None = None, **foreign: Any
    ) -> "WanPipeline":
        """Load a checkpoint of ours, one from PyTorch (converted on the fly), or a Hugging Face repo id.

        Args:
          path: a directory (official, diffusers, or with ComfyUI's single files in any tree), or 'owner/name' of a repository to
            download into the Hugging Face cache.
          dtype: 'bfloat16' or 'float32', for the DiT and the text encoder. The VAE and the image tower are float32 always.
          show_progress: the attribute, which holds for loading too.
        Raises: FileNotFoundError, ValueError or NotImplementedError in one line: missing, damaged, or not a Wan2.1 checkpoint;
          TypeError for an argument that isn't there, `foreign`.
        """
        check_no_foreign(foreign, "WanPipeline.from_pretrained", ("dtype", "show_progress"))
        check_choice("dtype", dtype, Dtype)
        enable_compilation_cache()
        return cls._of(open_model(path), dtype, show_progress)

    @classmethod
    def from_files(
        cls,
        *,
        dit: str | os.PathLike,
        vae: str | os.PathLike,
        text_encoder: str | os.PathLike,
        image_encoder: str | os.PathLike | None = None,
        tokenizer: str | os.PathLike | None = None,
        root: str | None = None,
        dtype: str = "bfloat16",
        **foreign: Any,
    ) -> "WanPipeline":
        """Load single files, such as ComfyUI's and Kijai's, bf16, fp16 or FP8 (docs/checkpoints.md).

        Args:
          dit, vae, text_encoder: a .safetensors each, or .pth (.pt).
          image_encoder: CLIP, for i2v and flf2v; without it a call needs image_embeds.
          tokenizer: the folder of UMT5's tokenizer; None where the text encoder's file holds it, as ComfyUI's do.
          root: of a DiT's .pt that holds several models under names (Self-Forcing's, CausVid's), the one to take; None for
            generator_ema, else generator, else model.
          dtype: as of `from_pretrained`.
        Raises: as `from_pretrained`.
        """
        check_no_foreign(
            foreign, "WanPipeline.from_files", ("dit", "vae", "text_encoder", "image_encoder", "tokenizer", "root")
        )
        check_choice("dtype", dtype, Dtype)
        enable_compilation_cache()
        model = open_model_files(
            dit=dit, vae=vae, text_encoder=text_encoder, image_encoder=image_encoder, tokenizer=tokenizer, root=root
        )
        return cls._of(model, dtype)

    @classmethod
    def _of(cls, model: Model, dtype: str, show_progress: bool | None = None) -> "WanPipeline":
        for note in model.notes:
            log.info("%s: %s", model.directory, note)
        if model.config.preset != "wan":
            log.info("sampled by preset %s: %s", model.config.preset, PRESETS[model.config.preset].words())
        tokenizer = Tokenizer.from_directory(model.tokenizer_dir)
        check_vocabulary(model.tokenizer_dir, tokenizer.vocab_size, model.config.text_encoder.vocab_size)
        params: dict[str, Params] = {}
        with stage("load"), progress_bar("load", show_progress) as bar:
            for name in model.components:
                params[name] = model.load(name, jnp.dtype(dtype))
                bar(len(params), len(model.components))
        return cls(model.config, params, tokenizer, jnp.dtype(dtype), show_progress, model.schedule)

    def save_pretrained(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write the checkpoint in our format, in the dtypes that it was loaded with, LoRAs merged, and its schedule.

        Raises FileExistsError if path isn't empty.
        """
        tokenizer = self.tokenizer.source.parent
        save_checkpoint(path, self.config, self.params, tokenizer, self.schedule, overwrite=overwrite)

    if not TYPE_CHECKING:  # a type checker goes on to tell names that aren't there

        def __getattr__(self, name: str) -> NoReturn:
            raise no_attribute(self, name)

    @property
    def loras(self) -> list[Scaled]:
        """Those that are merged into the DiT's weights, by `load_lora`."""
        return self._merged.loras

    def load_lora(self, lora: str | os.PathLike | LoRA, scale: float = 1.0, *, partial: bool = False) -> LoRA:
        """Merge a LoRA into the DiT's weights, on top of those that are merged already.

        The sum is made in float32 from the weights as they were loaded, and rounded once. Those that change are kept in host memory
        (at most as many bytes as the DiT has) until `unload_lora`. Compiled programs stay.

        Args:
          lora: a .safetensors file in any spelling of its keys (docs/checkpoints.md), or one that `open_lora` opened.
          scale: how much of it; 1 is what it was trained as.
          partial: leave out tensors that this model has no place for, in place of an error.
        Returns: the record, whose `report` and `summary` say what was used.
        Raises: FileNotFoundError, ValueError or NotImplementedError in one line; the weights are then as they were.
        """
        if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
            raise ValueError(f"scale={scale!r} of a LoRA is not a finite number; 1 is what it was trained as")
        record = lora if isinstance(lora, LoRA) else open_lora(lora, self.config, partial=partial)
        self._merged.set(self.params, [*self.loras, Scaled(record, float(scale))])
        log.info("%s at scale %g", record.summary, scale)
        return record

    def unload_lora(self) -> None:
        """Take all LoRAs out again: the weights are bit for bit those that were loaded."""
        self._merged.clear(self.params)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        last_image: Any = None,
        image_embeds: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        solver: Solver | None = None,
        sigma_grid: SigmaGrid | None = None,
        seed: int | Sequence[int] = 0,
        latents: Any = None,
        output_type: OutputType = "np",
        callback: Progress | None = None,
        vae_tiling: bool = False,
        batch_guidance: bool = False,
        attention: Setting | None = None,
        schedule: FPSSchedule | str | os.PathLike | None = None,
        preset: Preset | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        size: Size = "exact",
        num_videos_per_prompt: int = 1,
        callback_on_step_end: Callable[..., Any] | None = None,
        **foreign: Any,
    ) -> Any:
        """Sample one video per prompt.

        Args:
          prompt: a text, or B texts.
          negative_prompt: None for the checkpoint's own default, a text ('' is empty), or B texts.
          image: first frame, for i2v and flf2v: a path, PIL image, uint8 [H, W, 3], or float in [0, 1] [H, W, 3] or [B, H, W, 3];
            of another size it is resized to cover the frame and centre-cropped (logged, where a tenth is lost); or a list of B.
          last_image: last frame, for flf2v.
          image_embeds: [B, 257, E] (flf2v [B, 514, E]) image-tower tokens in place of those computed from the images.
          height, width: pixels, multiples of 16; None for the checkpoint's own, 480 x 832 for all of Wan's.
          num_frames: 4k + 1; None for the checkpoint's own, 81 for Wan's.
          num_inference_steps: steps on `sigma_grid`. None here and in the next four: what the preset says.
          guidance_scale: classifier-free guidance weight; at 1 or below the negative prompt isn't evaluated.
          flow_shift: shift of the noise levels; by the preset 'wan' the checkpoint's own.
          solver, sigma_grid: see `fps_jax.sampling.flow.VALID_PAIRS`.
          seed: sample i of a batch uses seed + i; or one seed per sample. Of the initial noise, and of the noise that 'lcm' adds.
          latents: initial noise [B, 16, (num_frames - 1)/4 + 1, height/8, width/8] in place of the seed's.
          output_type: 'np' float32 [B, F, H, W, 3] in [0, 1]; 'latent' float32 normalised, as `latents`; 'pil' B lists of images.
          callback: callback(steps_done, steps), called from another thread.
          vae_tiling: decode and encode in overlapping spatial tiles. Also used, and logged, when the frame wouldn't fit.
          batch_guidance: evaluate prompt and negative prompt as one batch of two.
          attention: self-attention of the DiT: 'dense'; 'fps', FP8 and sparse as the schedule says; 'fp8', the schedule with
            whole-grid windows; 'sparse', the schedule without quantization. None is 'fps' where there is a schedule, given here or
            the checkpoint's own, and else 'dense'.
          schedule: an FPSSchedule or its JSON file; None for the checkpoint's own, or the default one (`FPSSchedule.default`).
          preset: 'wan', 50 steps of unipc at guidance 5; 'few-step', 'dmd' or 'causvid' for distilled models
            (`fps_jax.sampling.presets.PRESETS`). None for the checkpoint's own, mostly 'wan'. Other arguments win over it.
          sigmas: the noise levels themselves, in (0, 1], falling, without the closing 0; they aren't shifted. For any solver.
          timesteps: in their place what the model is told, in (0, 1000]: `fps_jax.sampling.flow.explicit_grid`.
          size: 'exact'; 'area' keeps the aspect of `image` at the area of height x width, as the official code does.
          num_videos_per_prompt: n videos of each prompt, one after the other, from n seeds.
          callback_on_step_end: called as in diffusers, (pipe, step, timestep, {'latents': float32 NumPy}), from another thread;
            what it does to the latents has no effect on the sample.
          foreign: names of other libraries, which are answered with ours (docs/coming-from.md).
        Raises: TypeError for an argument that isn't there; ValueError for one that breaks a rule above; FloatingPointError for NaN
          or inf (names step and layer).
        """
        if foreign:
            check_no_foreign(foreign, "a WanPipeline", Request.__dataclass_fields__)
        prompt, negative_prompt, image, last_image = repeated(
            num_videos_per_prompt, prompt, negative_prompt, image, last_image
        )
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            last_image=last_image,
            image_embeds=image_embeds,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
            solver=solver,
            sigma_grid=sigma_grid,
            seed=seed,
            latents=latents,
            output_type=output_type,
            vae_tiling=vae_tiling,
            batch_guidance=batch_guidance,
            attention=attention,
            schedule=schedule,
            preset=preset,
            sigmas=sigmas,
            timesteps=timesteps,
            size=size,
        )
        return self.sample(request, callback, callback_on_step_end)

    def sample(
        self, request: Request, callback: Progress | None = None, on_step_end: Callable[..., Any] | None = None
    ) -> Any:
        """What `__call__` does, of arguments that are one object. on_step_end: its `callback_on_step_end`."""
        with stage("prepare"):
            prepared = self.prepare(request)
        times, seen = prepared.table.timestep, None
        if on_step_end is not None:
            seen = lambda step, latents: on_step_end(self, step, float(times[step]), {"latents": latents})  # noqa: E731
        with stage("denoise") as measured, progress_bar("denoise", self.show_progress) as bar:

            def progress(done: int, total: int) -> None:
                measured.step(done)
                bar(done, total)
                if callback is not None:
                    callback(done, total)

            out = denoise(
                self.config.dit,
                self.params["dit"],
                prepared.inputs,
                prepared.table,
                guidance_scale=prepared.guidance_scale,
                dtype=self.dtype,
                batch_guidance=request.batch_guidance,
                segments=prepared.segments,
                progress=progress,
                seen=seen,
            )
        if request.output_type == "latent":
            return np.asarray(out)
        video = self.decode(out, tiling=prepared.tiling)
        return to_pil(video) if request.output_type == "pil" else video

    def decode(self, latents: Float[Array, "B 16 F H W"], *, tiling: bool) -> Float[np.ndarray, "B T H W 3"]:
        """Frames of denoised latents (`output_type="latent"`), float32 in [0, 1]; `tiling`: in overlapping spatial tiles."""
        with stage("decode"), progress_bar("decode", self.show_progress) as bar:
            video = decode(self.config.vae, self.params["vae"], latents, tiling=tiling, progress=bar)
        video *= 0.5  # [-1, 1] to [0, 1], in place
        video += 0.5
        return np.clip(video, 0, 1, out=video)

    def prepare(self, request: Request) -> Prepared:
        """What the denoising loop needs of a request: everything checked first, then encoded."""
        resolved = request.resolve(self.config, self.schedule)
        with waiting("draw noise", show=self.show_progress):  # the first compiles
            noise = request.noise(resolved.latent_shape)
            step_noise = None
            if resolved.table.renoise is not None:
                step_noise = request.step_noise(resolved.latent_shape, len(resolved.table.sigma))
        guidance_scale = resolved.settings.guidance_scale
        if resolved.preset != "wan" and guidance_scale > 1:
            log.warning(
                "guidance_scale=%g with preset %r: distilled models have guidance in them; 1 is what they were made for",
                guidance_scale,
                resolved.preset,
            )
        frames = request.frames(self.config, tell_crop=True)
        embeds = request.image_embeds
        if embeds is not None:
            embeds = jnp.array(np.asarray(embeds), jnp.float32)
        request.check_tower(self.config, "image_encoder" in self.params)
        tiling = request.vae_tiling or self.needs_tiling(*video_size(resolved.latent_shape[2:])[:2])

        with progress_bar("encode prompt", self.show_progress) as bar:
            text = self._encode_prompts(resolved.prompts)
            negative = self._encode_prompts(resolved.negatives) if guidance_scale > 1 else None
            bar(1, 1)
        condition = None
        if frames:
            if embeds is None:
                embeds = self._encode_images(frames, len(resolved.prompts))
            condition = self._condition(frames, resolved.latent_shape, tiling)
        inputs = Inputs(noise, text, negative, condition, embeds, step_noise)
        return Prepared(inputs, resolved.table, guidance_scale, resolved.segments, tiling)

    def encode_prompt(self, prompt: str) -> Float[Array, "1 T E"]:
        """Text states of a prompt, zero beyond its own tokens."""
        return self._encode_prompts([prompt])

    def prompt_note(self, prompt: str) -> str | None:
        """What whoever wrote a prompt should know of it: that it is too long; None for nothing."""
        read = self.config.dit.text_len
        cut = self.tokenizer.count(prompt) - read
        if cut <= 0:
            return None
        more = f"{cut} tokens more than the {read} that the model reads"
        return f"prompt {prompt[:40]!r}... has {more}: its end is cut, and has no effect"

    def _encode_prompts(self, prompts: list[str]) -> Float[Array, "B T E"]:
        """Text states of each distinct prompt, zero beyond its own tokens."""
        distinct = list(dict.fromkeys(prompts))
        ids, mask = self.tokenizer(distinct, max_length=self.config.dit.text_len)
        for note in filter(None, map(self.prompt_note, distinct)):
            log.warning("%s", note)
        with stage("encode text"), visiting(self.params["text_encoder"]) as params:
            states = text_states(self.config, params, ids, mask, dtype=self.dtype)
            return states[jnp.asarray([distinct.index(p) for p in prompts])].block_until_ready()

    def _encode_images(self, frames: list[np.ndarray], batch: int) -> Float[Array, "B I E"]:
        """Image-tower tokens of the first (and last) frames, one after the other."""
        with stage("encode image"), visiting(self.params["image_encoder"]) as params:
            return image_tokens(self.config, params, frames, batch).block_until_ready()

    def _condition(self, frames: list[np.ndarray], shape: tuple[int, ...], tiling: bool) -> Float[Array, "B 20 F H W"]:
        """Mask (1 where a frame is given) and latents of the video [first, grey, ..., grey(, last)]."""
        video = condition_video(frames, video_size(shape[2:])[2])
        with stage("encode image"), progress_bar("encode image", self.show_progress) as bar:
            latents = encode(self.config.vae, self.params["vae"], video, tiling=tiling, progress=bar)
        mask = condition_mask(len(frames), shape[2:])
        condition = np.concatenate([np.broadcast_to(mask, (len(latents), *mask.shape)), latents], axis=1)
        return jnp.broadcast_to(jnp.asarray(condition), (shape[0], *condition.shape[1:]))

    def needs_tiling(self, height: int, width: int) -> bool:
        """Whether frames of this size have to be decoded in spatial tiles to fit the device. Says so in the log."""
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return False
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        needed = decode_bytes(self.config.vae, height, width)
        if needed <= free:
            return False
        log.info("VAE decode needs %.1f GB and %.1f GB are free: decoding in spatial tiles", needed / 1e9, free / 1e9)
        return True
