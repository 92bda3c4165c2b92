"""What a caller may choose by name. Command lines are parsed by these before jax is imported, so nothing is imported here."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

Dtype = Literal["bfloat16", "float32"]
Solver = Literal["unipc", "dpm++", "euler", "lcm"]
SigmaGrid = Literal["wan", "diffusers"]
# How a model is sampled where nothing else is said: `fps_jax.sampling.presets`.
Preset = Literal["wan", "few-step", "dmd", "causvid"]
# How a causal model makes its blocks: `fps_jax.causal`.
CausalPreset = Literal["self-forcing", "causvid-3", "causvid-4"]
# What becomes of the frames so far where a stream's prompt changes: `fps_jax.sampling.stream.Session.switch`. Weakest first.
Switch = Literal["continue", "recache", "cut"]
# What a stream keeps of the frames so far: keys and values in the compute dtype, or rounded to FP8, which attention then is too.
KVCacheFormat = Literal["same", "fp8"]
OutputType = Literal["np", "latent", "pil"]
# Whether height and width are the video's own, or name the area at which it keeps the aspect of its image.
Size = Literal["exact", "area"]
Which = Literal["ema", "raw"]  # of a run's weights: the moving average, or themselves
Setting = Literal["dense", "fp8", "sparse", "fps"]  # of self-attention
# What `fps-convert` casts weights to, whose files it writes, and what it casts ComfyUI's to.
WeightDtype = Literal["bfloat16", "float16", "float32"]
LayoutName = Literal["official", "diffusers", "comfyui", "self-forcing"]
ComfyDtype = Literal["bfloat16", "fp8_scaled"]
DriftWeights = Literal["linear", "log"]  # of a video's chunks: `fps_jax.evaluation.drift`
# What a gradient keeps of a block's forward, the rest is computed again: all of it; output and log-sum-exp of self-attention, which
# then isn't run again; the matmuls with weights; nothing but its input.
Remat = Literal["none", "attention", "dots", "full"]


def choices(kind: Any) -> str:
    """The names of a Literal, for a message: "'a', 'b'"."""
    return ", ".join(map(repr, get_args(kind)))


def strongest(ways: Iterable[Switch]) -> Switch:
    """The way that counts of those of prompts that no block has begun with: a cut that another prompt follows is a cut still."""
    return max(ways, key=get_args(Switch).index)


def file_and_scale(text: str) -> tuple[str, float]:
    """'FILE:SCALE' or 'FILE', whose scale is 1. Raises ValueError for what isn't a finite number behind the last colon."""
    file, colon, tail = text.rpartition(":")
    if not colon or tail.endswith(".safetensors"):  # a name may hold a colon
        return text, 1.0
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not file or not math.isfinite(scale):
        raise ValueError(
            f"lora={text!r} is not FILE or FILE:SCALE with a number as scale, such as style.safetensors:0.8"
        )
    return file, scale


def check_text(name: str, text: str) -> None:
    """Raises ValueError for a text that isn't Unicode: bytes of a shell in another encoding, which no record in JSON can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}={text[:60]!r} is not valid text (UTF-8); write it in UTF-8") from None


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError where the argument `name` is none of the names of a Literal."""
    if value not in get_args(kind):
        raise ValueError(f"{name}={value!r} is not one of {choices(kind)}")


def check_fps(fps: Any) -> None:
    """Raises ValueError for frames per second that no player has; fractions may be."""
    try:
        fine = 1 <= float(fps) <= 1000
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"fps={fps!r} is not a number in 1 to 1000; Wan's videos are 16")
