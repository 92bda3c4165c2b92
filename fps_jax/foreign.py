"""Names that people bring from diffusers, the official generate.py and ComfyUI, and what stands for them here."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any

_OFFLOAD = ("", "the text encoder is on the device for its own moment only")
_ONE_DEVICE = ("", "sampling is on one device; fps-train has --mesh")
_NO_SCORES = ("", "attention never holds its scores")
_NO_VIDEO_IN = ("", "video to video isn't supported")
# What a name that isn't ours is answered with: ours, and what is to be said of it; '' where there is nothing to give.
# docs/coming-from.md has them all side by side.
FOREIGN: dict[str, tuple[str, str]] = {
    # Wan-Video/Wan2.1 generate.py
    "sample_steps": ("num_inference_steps", ""),
    "sample_shift": ("flow_shift", ""),
    "sample_guide_scale": ("guidance_scale", ""),
    "sample_solver": ("solver", ""),
    "base_seed": ("seed", ""),
    "frame_num": ("num_frames", ""),
    "save_file": ("output", " of fps-sample, or save_video"),
    "ckpt_dir": ("", "the checkpoint's folder is the first argument, of WanPipeline.from_pretrained and of fps-sample"),
    "task": ("", "it is told by the checkpoint"),
    "offload_model": _OFFLOAD,
    "t5_cpu": _OFFLOAD,
    "dit_fsdp": _ONE_DEVICE,
    "t5_fsdp": _ONE_DEVICE,
    "ulysses_size": _ONE_DEVICE,
    "ring_size": _ONE_DEVICE,
    "n_prompt": ("negative_prompt", ""),
    "first_frame": ("image", ""),
    "last_frame": ("last_image", ""),
    # diffusers
    "generator": ("seed", ": a whole number, or one for each video"),
    "torch_dtype": ("dtype", ", 'bfloat16' or 'float32', of WanPipeline.from_pretrained and fps-sample"),
    "enable_model_cpu_offload": _OFFLOAD,
    "enable_sequential_cpu_offload": _OFFLOAD,
    "enable_vae_tiling": ("vae_tiling", "=True of a call"),
    "enable_vae_slicing": ("", "the VAE goes frame by frame; vae_tiling=True of a call saves more"),
    "enable_attention_slicing": _NO_SCORES,
    "enable_xformers_memory_efficient_attention": _NO_SCORES,
    "load_lora_weights": ("load_lora", "(file, scale)"),
    "set_adapters": ("load_lora", "(file, scale), once for each"),
    "fuse_lora": ("load_lora", ": it merges"),
    "unload_lora_weights": ("unload_lora", "()"),
    "to": ("", "parameters are on JAX's default device when they are loaded"),
    "scheduler": ("solver", " and sigma_grid"),
    "prompt_embeds": ("prompt", ": text states can't be given"),
    "negative_prompt_embeds": ("negative_prompt", ": text states can't be given"),
    "max_sequence_length": ("", "Wan reads 512 tokens"),
    "return_dict": ("", "a call returns the videos"),
    "guidance_scale_2": ("guidance_scale", ": that is Wan2.2's, whose two models aren't supported"),
    "strength": _NO_VIDEO_IN,
    # ComfyUI's nodes
    "steps": ("num_inference_steps", ""),
    "cfg": ("guidance_scale", ""),
    "shift": ("flow_shift", ""),
    "noise_seed": ("seed", ""),
    "sampler_name": ("solver", ""),
    "length": ("num_frames", ""),
    "batch_size": ("num_videos_per_prompt", ", or a list of prompts"),
    "denoise": _NO_VIDEO_IN,
    "unet_name": ("dit", " of WanPipeline.from_files"),
    "clip_name": ("text_encoder", " of WanPipeline.from_files"),
    "vae_name": ("vae", " of WanPipeline.from_files"),
    "start_image": ("image", ""),
    "end_image": ("last_image", ""),
}

# Names that stand for nothing where a causal model makes blocks, ours among them.
_DISTILLED = ("", "guidance is distilled into the model, and each step is one pass")
_OF_STREAMS = {"guidance_scale": _DISTILLED, "negative_prompt": _DISTILLED}


def answer(name: str, near: Iterable[str] = ()) -> str | None:
    """What to use in Python in place of a name, or the one of `near` that is nearest; None where none is."""
    if name in FOREIGN:
        here, remark = FOREIGN[name]
        return f"use {here}{remark}" if here else f"leave it out: {remark}"
    close = difflib.get_close_matches(name, list(near), 1)
    return f"did you mean {close[0]}?" if close else None


def stream_answer(name: str, ours: Collection[str]) -> str | None:
    """As `answer`, for a stream, whose arguments are `ours`: what stands for a name is among them, or isn't said."""
    here, remark = _here(name, stream=True)
    if here is None:
        return answer(name, ours)
    if not here:
        return f"leave it out: {remark}"
    return f"use {here}" if here in ours else None


def option_answer(option: str, ours: Collection[str]) -> str | None:
    """What to use in place of an option; None where it is unknown, or what stands for it is none of a command's, `ours`."""
    if "model" not in ours:  # a command that doesn't sample
        return None
    here, remark = _here(option.lstrip("-").replace("-", "_"), stream="kv_cache" in ours)
    if here is None or (here and here not in ours):
        return None
    # What is said of a name of ours is about Python, as is a way to say a value.
    return f"use --{here.replace('_', '-')}" if here else f"leave it out: {remark}"


def _here(name: str, *, stream: bool) -> tuple[str | None, str]:
    """What stands for a name, and what is to be said of it: None where it is unknown, '' where there is nothing to give."""
    here, remark = FOREIGN.get(name, (None, ""))
    return _OF_STREAMS.get(here or name, (here, remark)) if stream else (here, remark)


def check_no_foreign(foreign: Iterable[str], where: str, near: Iterable[str] = ()) -> None:
    """Raises TypeError for keywords that `where` doesn't have, answered with ours."""
    for name in foreign:
        raise TypeError(f"{name} is no argument of {where}{_said(answer(name, near))}")


def check_no_foreign_of_stream(foreign: Iterable[str], ours: Collection[str]) -> None:
    """Raises TypeError for keywords that a stream doesn't have, answered with `ours`, or why there is none."""
    for name in foreign:
        raise TypeError(f"{name} is no argument of a stream{_said(stream_answer(name, ours))}")


def no_attribute(owner: Any, name: str) -> AttributeError:
    """The error of an attribute that an object doesn't have, answered with ours."""
    kind = type(owner).__name__
    return AttributeError(f"{kind!r} object has no attribute {name!r}{_said(answer(name))}", name=name, obj=owner)


def _said(words: str | None) -> str:
    return f"; {words}" if words else ""
