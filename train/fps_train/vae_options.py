"""What the training of a VAE is told, without jax: the command's options are these and its own."""

from dataclasses import dataclass
from typing import Literal

# The largest values, beyond those of any run: a slip is told before clips are read.
_WHOLE = (
    ("steps", 1, 10**8),
    ("batch_size", 1, 4096),
    ("log_every", 1, 10**8),
    ("save_every", 1, 10**8),
    ("seed", 0, 2**32 - 1),
    ("warmup_steps", 0, 10**8),
)
_LARGEST = 1e6


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """What the training of a VAE does, apart from its clips and its start."""

    train: Literal["all", "decoder"] = "all"
    """decoder: what makes latents stays as it is, so that precomputed latents, and a model trained on them, stay good."""
    steps: int = 2000
    """Steps in all, those before a resume included."""
    batch_size: int = 16
    """Clips a step, drawn with replacement."""
    lr: float | None = None
    """Peak learning rate: linear warm-up, then a cosine down to a thirtieth. 1e-3 for images and 4e-4 for clips if left out."""
    warmup_steps: int = 20
    """Steps of warm-up."""
    weight_decay: float = 1e-3
    """AdamW's, on kernels alone."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    kl_weight: float = 1e-5
    """Weight of the KL divergence from a unit Gaussian, in nats a latent value, beside L1 + MSE of pixels in [-1, 1]."""
    latent_noise: float = 0.3
    """Noise on latents beyond their own: uniform from 0 up to this share of a channel's deviation, one share a clip."""
    seed: int = 0
    """Of the batches and the noise."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between two saved states."""

    def __post_init__(self):
        for name, least, most in _WHOLE:
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} is not in {least} to {most}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _LARGEST:
                raise ValueError(f"{name}={value} is not above 0, up to {_LARGEST:g}")
        for name in ("weight_decay", "kl_weight", "latent_noise"):
            if not 0 <= getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name}={getattr(self, name)} is not in 0 to {_LARGEST:g}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} leaves nothing of steps={self.steps}; use fewer")

    def peak(self, *, images: bool) -> float:
        """The peak learning rate of a run on images, or on clips."""
        return self.lr if self.lr is not None else 1e-3 if images else 4e-4
