"""Wan2.1 video diffusion in JAX/Flax, with FPSAttention."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "AttentionPlan",
    "CausalConfig",
    "CausalPipeline",
    "FPSSchedule",
    "Regime",
    "WanPipeline",
    "attend",
    "profile",
    "save_video",
    "to_flax",
    "to_torch",
]

if TYPE_CHECKING:
    from fps_convert import to_flax, to_torch
    from fps_jax.attention.attend import attend
    from fps_jax.attention.plan import AttentionPlan
    from fps_jax.attention.schedule import FPSSchedule, Regime
    from fps_jax.causal import CausalConfig
    from fps_jax.media.video import save_video
    from fps_jax.profiling.stages import profile
    from fps_jax.sampling.pipeline import WanPipeline
    from fps_jax.sampling.stream import CausalPipeline

_LAZY = {
    "AttentionPlan": "fps_jax.attention.plan",
    "CausalConfig": "fps_jax.causal",
    "CausalPipeline": "fps_jax.sampling.stream",
    "FPSSchedule": "fps_jax.attention.schedule",
    "Regime": "fps_jax.attention.schedule",
    "WanPipeline": "fps_jax.sampling.pipeline",
    "attend": "fps_jax.attention.attend",
    "profile": "fps_jax.profiling.stages",
    "save_video": "fps_jax.media.video",
    "to_flax": "fps_convert",
    "to_torch": "fps_convert",
}


def __getattr__(name: str) -> Any:  # lazy: `import fps_jax.config` shouldn't pay for jax
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fps_jax' has no attribute {name!r}")
