"""What a run will compile and do, known before its first step: programs, tokens, arithmetic."""

from dataclasses import dataclass
from typing import Any

import jax

from fps_jax.attention.attend import PlannedAttention, TokenAttention
from fps_jax.attention.sharded import on_one_device
from fps_jax.config import DiTConfig
from fps_jax.sizes import Shape3, token_grid
from fps_train.regimes import TrainingRegime

# Dense bf16 peak in FLOP/s by datasheet, by jax's device kind.
_PEAK = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA GH200": 989e12, "NVIDIA A100": 312e12}


@dataclass(frozen=True)
class BucketPlan:
    """One size of video in a run: latents `[Z, F, H, W]`, tokens (F, Y, X), and the regimes on that grid."""

    latent_shape: tuple[int, ...]
    grid: Shape3
    regimes: tuple[TrainingRegime, ...]

    @property
    def attentions(self) -> tuple[TokenAttention, ...]:
        """The distinct ones: a program each."""
        return tuple(dict.fromkeys(regime.attention for regime in self.regimes))

    @property
    def num_tokens(self) -> int:
        f, y, x = self.grid
        return f * y * x


def bucket_grid(config: DiTConfig, latent_shape: tuple[int, ...]) -> Shape3:
    """Tokens (F, Y, X) of latents `[Z, F, H, W]`. Raises ValueError where patches don't divide them."""
    _, f, h, w = latent_shape
    return token_grid((f, h, w), config.patch_size)


def sample_flops(config: DiTConfig, bucket: BucketPlan, attention: TokenAttention, num_params: int) -> float:
    """Floating-point operations of a sample's forward and backward, what remat computes again not counted.

    Two for each weight of a matrix and token, and 4 S K D for attention to K keys; the backward is twice the forward. Attention
    counts the pairs of tokens that are attended.
    """
    tokens = bucket.num_tokens
    attention = on_one_device(attention)
    density = attention.plan.density if isinstance(attention, PlannedAttention) else 1.0
    self_attention = 4 * tokens * tokens * density * config.dim
    cross = 4 * tokens * config.text_len * config.dim
    return 3 * (2 * num_params * tokens + config.num_layers * (self_attention + cross))


def peak_flops(device: Any = None) -> float | None:
    """The device's dense bf16 peak; None where we have no datasheet (a CPU)."""
    kind = (jax.local_devices()[0] if device is None else device).device_kind
    return next((peak for name, peak in _PEAK.items() if kind.startswith(name)), None)
