"""Names that people bring from diffusers, the official generate.py and ComfyUI, and what stands for them here."""

import difflib
from collections.abc import Iterable

# What a name that isn't ours is answered with: docs/coming-from.md has them all side by side.
FOREIGN: dict[str, str] = {
    # Wan-Video/Wan2.1 generate.py
    "sample_steps": "num_inference_steps",
    "sample_shift": "flow_shift",
    "sample_guide_scale": "guidance_scale",
    "sample_solver": "solver",
    "base_seed": "seed",
    "frame_num": "num_frames",
    "save_file": "output of fps-sample, or save_video",
    "ckpt_dir": "the checkpoint's folder: WanPipeline.from_pretrained(DIR), the first argument of fps-sample",
    "task": "nothing: it is told by the checkpoint",
    "offload_model": "nothing: the text encoder is on the device for its own moment only",
    "t5_cpu": "nothing: the text encoder is on the device for its own moment only",
    "dit_fsdp": "nothing: sampling is on one device; fps-train has --mesh",
    "t5_fsdp": "nothing: sampling is on one device; fps-train has --mesh",
    "ulysses_size": "nothing: sampling is on one device; fps-train has --mesh",
    "ring_size": "nothing: sampling is on one device; fps-train has --mesh",
    "n_prompt": "negative_prompt",
    "first_frame": "image",
    "last_frame": "last_image",
    # diffusers
    "generator": "seed: a whole number, or one for each video",
    "torch_dtype": "dtype of WanPipeline.from_pretrained and fps-sample: 'bfloat16' or 'float32'",
    "enable_model_cpu_offload": "nothing: the text encoder is on the device for its own moment only",
    "enable_sequential_cpu_offload": "nothing: the text encoder is on the device for its own moment only",
    "enable_vae_tiling": "vae_tiling=True of a call",
    "enable_vae_slicing": "nothing: the VAE goes frame by frame; vae_tiling=True saves more",
    "enable_attention_slicing": "nothing: attention never holds its scores",
    "enable_xformers_memory_efficient_attention": "nothing: attention never holds its scores",
    "load_lora_weights": "load_lora(file, scale)",
    "set_adapters": "load_lora(file, scale), once for each",
    "fuse_lora": "load_lora: it merges",
    "unload_lora_weights": "unload_lora()",
    "to": "nothing: parameters are on JAX's default device when they are loaded",
    "scheduler": "solver and sigma_grid",
    "prompt_embeds": "prompt: text states can't be given",
    "negative_prompt_embeds": "negative_prompt: text states can't be given",
    "max_sequence_length": "nothing: Wan reads 512 tokens",
    "return_dict": "nothing: a call returns the videos",
    "guidance_scale_2": "guidance_scale: that is Wan2.2's, whose two models aren't supported",
    "strength": "nothing: video to video isn't supported",
    # ComfyUI's nodes
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "shift": "flow_shift",
    "noise_seed": "seed",
    "sampler_name": "solver",
    "length": "num_frames",
    "batch_size": "num_videos_per_prompt, or a list of prompts",
    "denoise": "nothing: video to video isn't supported",
    "unet_name": "dit of WanPipeline.from_files",
    "clip_name": "text_encoder of WanPipeline.from_files",
    "vae_name": "vae of WanPipeline.from_files",
    "start_image": "image",
    "end_image": "last_image",
}


def answer(name: str, ours: Iterable[str] = ()) -> str | None:
    """What to use in place of a name, or the nearest of ours; None where nothing is near."""
    plain = name.lstrip("-").replace("-", "_")
    if plain in FOREIGN:
        return (
            f"use {FOREIGN[plain]}" if not FOREIGN[plain].startswith("nothing") else f"leave it out; {FOREIGN[plain]}"
        )
    near = difflib.get_close_matches(plain, list(ours), 1)
    return f"did you mean {near[0]}?" if near else None
