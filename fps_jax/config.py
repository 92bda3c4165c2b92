"""Architectures as frozen dataclasses: what a Wan2.1 checkpoint is, apart from its numbers.

Sources: the official configs (Wan-Video/Wan2.1 wan/configs) and diffusers' config.json files.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fps_jax.choices import Preset, check_choice
from fps_jax.sizes import PATCH

Task = Literal["t2v", "i2v", "flf2v"]
Component = Literal["dit", "vae", "text_encoder", "image_encoder"]
COMPONENTS: tuple[Component, ...] = get_args(Component)

# Per-channel statistics of the VAE's latents (Wan-Video/Wan2.1 wan/modules/vae.py; the same in diffusers' vae/config.json).
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# Wan's default negative prompts (wan/configs/shared_config.py, wan_i2v_14B.py and configs/__init__.py).
_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPTS: dict[str, str] = {
    "t2v": _NEGATIVE,
    "i2v": "镜头晃动，" + _NEGATIVE,
    "flf2v": "镜头切换，镜头晃动，" + _NEGATIVE,
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The diffusion transformer. Defaults are what no Wan2.1 checkpoint changes."""

    task: Task
    dim: int
    mlp_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16  # the VAE's z_dim; 36 for i2v and flf2v: noise 16, mask 4, condition 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = PATCH
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = None  # width of the image tower's tokens; None for t2v
    image_positions: int | None = None  # learned positions over the image tokens: 514 for flf2v, else None
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim={self.dim} with num_heads={self.num_heads} doesn't give an even head dim")
        if (self.task == "t2v") != (self.image_dim is None):
            raise ValueError(f"task={self.task!r} with image_dim={self.image_dim}: only t2v has no image_dim")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The causal 3D autoencoder: 4x in time, 8x in space."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    def __post_init__(self):
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values for z_dim={self.z_dim}; give one a latent channel "
                    "(the defaults are those of Wan's 16)"
                )
        if not all(std > 0 for std in self.latents_std):
            raise ValueError(f"latents_std={self.latents_std} must be above 0: latents are divided by it")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} values for {len(self.dim_mult)} stages in dim_mult; "
                "give one between each two stages"
            )


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The UMT5 encoder; defaults are UMT5-xxl."""

    vocab_size: int = 256384
    dim: int = 4096
    mlp_dim: int = 10240
    num_heads: int = 64
    head_dim: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """The image tower of CLIP; defaults are ViT-H/14."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    mlp_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    projection_dim: int | None = None  # official files carry the (unused) projection; diffusers files don't
    eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a video is where a call says nothing: Wan's own, unless a model was trained for something else.

    Attributes:
      height, width: pixels.
      num_inference_steps, guidance_scale: None for the preset's.
      negative_prompt: None for Wan's, by the task.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None

    def __post_init__(self):
        for name in ("height", "width", "num_frames", "num_inference_steps"):
            value = getattr(self, name)
            optional = name == "num_inference_steps" and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} is not a whole number of 1 or more")
        scale = self.guidance_scale
        if scale is not None and (
            isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < 1e3
        ):
            raise ValueError(f"guidance_scale={scale!r} is not a number in [0, 1000)")
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ValueError(f"negative_prompt={self.negative_prompt!r} is not a text")

    def to_dict(self) -> dict[str, Any]:
        """What differs from Wan's own, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """A whole checkpoint."""

    dit: DiTConfig
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    image_encoder: ImageEncoderConfig | None = None
    flow_shift: float = 5.0
    flow_shift_480p: float | None = None  # official I2V code: 3.0 up to 480 x 832 pixels, `flow_shift` above
    preset: Preset = "wan"  # how it is sampled where nothing else is said (`fps_jax.sampling.presets`)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    def __post_init__(self):
        check_choice("preset", self.preset, Preset)
        z = self.vae.z_dim
        channels = (z if self.task == "t2v" else 4 + 2 * z, z)  # noise, then mask and condition
        if (self.dit.in_channels, self.dit.out_channels) != channels:
            raise ValueError(
                f"dit has in_channels={self.dit.in_channels} and out_channels={self.dit.out_channels}; a {self.task} model on "
                f"a VAE of z_dim={z} has {channels[0]} and {channels[1]}"
            )

    @property
    def task(self) -> Task:
        return self.dit.task

    def to_dict(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        if self.preset == "wan":
            del record["preset"]  # so that releases that don't know it read the checkpoints that don't need it
        record["sampling"] = self.sampling.to_dict()
        if not record["sampling"]:
            del record["sampling"]
        return record

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "WanConfig":
        """Inverse of `to_dict`, after a trip through JSON. TypeError on unknown or missing fields, ValueError on wrong ones."""

        def build(kind, fields):
            return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

        parts = {
            "dit": DiTConfig,
            "vae": VAEConfig,
            "text_encoder": TextEncoderConfig,
            "image_encoder": ImageEncoderConfig,
            "sampling": SamplingDefaults,
        }
        fields: dict[str, Any] = {k: build(parts[k], v) if k in parts and v is not None else v for k, v in d.items()}
        return cls(**fields)


def _dit_14b(task: Task, **changes) -> DiTConfig:
    return DiTConfig(task=task, dim=5120, mlp_dim=13824, num_heads=40, num_layers=40, **changes)


WAN_T2V_1_3B = WanConfig(dit=DiTConfig(task="t2v", dim=1536, mlp_dim=8960, num_heads=12, num_layers=30))
WAN_T2V_14B = WanConfig(dit=_dit_14b("t2v"))
# One architecture for the 480P and the 720P model; the shift goes by the frame size (wan/image2video.py).
WAN_I2V_14B = WanConfig(
    dit=_dit_14b("i2v", in_channels=36, image_dim=1280), image_encoder=ImageEncoderConfig(), flow_shift_480p=3.0
)
WAN_FLF2V_14B = WanConfig(
    dit=_dit_14b("flf2v", in_channels=36, image_dim=1280, image_positions=514),
    image_encoder=ImageEncoderConfig(),
    flow_shift=16.0,
)
