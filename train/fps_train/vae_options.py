"""What the training of a VAE is told, without jax: the command's options are these and its own."""

from dataclasses import dataclass
from typing import Literal


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
        for name in ("steps", "batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        for name in ("weight_decay", "kl_weight", "latent_noise", "seed", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} leaves nothing of steps={self.steps}; use fewer")

    def peak(self, *, images: bool) -> float:
        """The peak learning rate of a run on images, or on clips."""
        return self.lr if self.lr is not None else 1e-3 if images else 4e-4
