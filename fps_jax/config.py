"""Architectures as frozen dataclasses: what a Wan2.1 checkpoint is, apart from its numbers.

Sources: the official configs (Wan-Video/Wan2.1 wan/configs) and diffusers' config.json files.
"""

import dataclasses
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fps_jax.causal import CausalConfig
from fps_jax.choices import CausalPreset, Preset, check_choice
from fps_jax.sizes import PATCH

Task = Literal["t2v", "i2v", "flf2v"]
Component = Literal["dit", "vae", "text_encoder", "image_encoder"]
MAX_SHIFT = 1000.0  # of noise levels; Wan's are 3 to 16, and beyond this nearly every level rounds to 1
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


# The largest size that a config may state, ten times those of any model: a slip is told before arrays are made of it.
MAX_SIZE = 2**20
MAX_LAYERS = 1000


class _Checked:
    """A config whose fields are of their types and in sane bounds, whoever made it: a reader, the converter, a person.

    Whole numbers are 1 to `MAX_SIZE`, layers at most `MAX_LAYERS`, floats finite, an `eps` in (0, 0.1]. ValueError otherwise.
    """

    def __post_init__(self):
        for own in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            _check_value(own.name, getattr(self, own.name), own.type)
        self._check()

    def _check(self) -> None:
        """What fields say of each other."""


def _check_value(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError where a field isn't of its annotated type or is out of bounds."""
    args = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        if value is not None or NoneType not in args:
            _check_value(name, value, next(arg for arg in args if arg is not NoneType))
    elif get_origin(kind) is Literal:
        check_choice(name, value if isinstance(value, str) else repr(value), kind)
    elif get_origin(kind) is tuple:
        if (
            not isinstance(value, tuple)
            or not 0 < len(value) <= 1000
            or (args[-1] is not ... and len(value) != len(args))
        ):
            length = "a list" if args[-1] is ... else f"a list of {len(args)}"
            raise ValueError(f"{name}={_shown(value)} is not {length} of {_KINDS[args[0]]}")
        for item in value:
            _check_value(name, item, args[0])
    elif kind is float:
        top = 0.1 if name == "eps" else 1e6
        if not isinstance(value, int | float) or isinstance(value, bool) or not -top <= value <= top:
            raise ValueError(f"{name}={_shown(value)} is not a finite number of at most {top:g}")
        if name == "eps" and value <= 0:
            raise ValueError(f"{name}={_shown(value)} is not above 0")
    elif kind is int:
        top = MAX_LAYERS if name in ("num_layers", "num_res_blocks") else MAX_SIZE
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= top:
            raise ValueError(f"{name}={_shown(value)} is not a whole number in 1 to {top:,}")
    elif isinstance(kind, type) and not isinstance(value, kind):
        raise ValueError(f"{name}={_shown(value)} is not {_KINDS.get(kind, f'a {kind.__name__}')}")


_KINDS: dict[Any, str] = {int: "whole numbers", float: "numbers", bool: "true or false", str: "a text"}


def _shown(value: Any) -> str:
    """A value in a message, whatever it is and however long."""
    try:
        return repr(value)[:80]
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"


@dataclass(frozen=True, kw_only=True)
class DiTConfig(_Checked):
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

    def _check(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim={self.dim} with num_heads={self.num_heads} doesn't give an even head dim")
        if (self.task == "t2v") != (self.image_dim is None):
            raise ValueError(f"task={self.task!r} with image_dim={self.image_dim}: only t2v has no image_dim")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VAEConfig(_Checked):
    """The causal 3D autoencoder: 4x in time, 8x in space."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    def _check(self) -> None:
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
class TextEncoderConfig(_Checked):
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
class ImageEncoderConfig(_Checked):
    """The image tower of CLIP; defaults are ViT-H/14."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    mlp_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    projection_dim: int | None = None  # official files carry the (unused) projection; diffusers files don't
    eps: float = 1e-5

    def _check(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} isn't a multiple of num_heads={self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} isn't a multiple of patch_size={self.patch_size}")

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults(_Checked):
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

    def _check(self) -> None:
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < 1e3:
            raise ValueError(f"guidance_scale={self.guidance_scale!r} is not a number in [0, 1000)")

    def to_dict(self) -> dict[str, Any]:
        """What differs from Wan's own, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class WanConfig(_Checked):
    """A whole checkpoint."""

    dit: DiTConfig
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    image_encoder: ImageEncoderConfig | None = None
    flow_shift: float = 5.0
    flow_shift_480p: float | None = None  # official I2V code: 3.0 up to 480 x 832 pixels, `flow_shift` above
    preset: Preset = "wan"  # how it is sampled where nothing else is said (`fps_jax.sampling.presets`)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    causal: CausalConfig | None = None  # how it makes video block after block; None for a model of whole videos

    def _check(self) -> None:
        for name in ("flow_shift", "flow_shift_480p"):
            shift = getattr(self, name)
            if shift is not None and not 0 < shift <= MAX_SHIFT:
                raise ValueError(f"{name}={shift} is not a positive number of at most {MAX_SHIFT:g}; Wan uses 3 to 16")
        if self.causal is not None and self.task != "t2v":
            raise ValueError(f"causal is set for a {self.task} model; block diffusion is for t2v models")
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
        if self.causal is None:
            del record["causal"]  # as with the preset
        return record

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "WanConfig":
        """Inverse of `to_dict`, after a trip through JSON. TypeError on unknown or missing fields, ValueError on wrong ones."""

        def build(name, kind, fields):
            if not isinstance(fields, dict):
                raise ValueError(f"{name} is a {type(fields).__name__}, not an object of fields")
            return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

        parts = {
            "dit": DiTConfig,
            "vae": VAEConfig,
            "text_encoder": TextEncoderConfig,
            "image_encoder": ImageEncoderConfig,
            "sampling": SamplingDefaults,
            "causal": CausalConfig,
        }
        fields: dict[str, Any] = {k: build(k, parts[k], v) if k in parts and v is not None else v for k, v in d.items()}
        return cls(**fields)


def _dit_14b(task: Task, **changes) -> DiTConfig:
    return DiTConfig(task=task, dim=5120, mlp_dim=13824, num_heads=40, num_layers=40, **changes)


PRESET_MODEL = "Wan2.1-T2V-1.3B"  # of all causal presets
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


def check_preset_size(preset: CausalPreset, dit: DiTConfig) -> None:
    """Raises ValueError for a DiT that is larger than the one that the models of all causal presets were made from."""
    most = WAN_T2V_1_3B.dit
    if dit.dim > most.dim or dit.num_layers > most.num_layers:
        raise ValueError(
            f"preset={preset!r} is of {PRESET_MODEL}, and this DiT has {dit.num_layers} layers of width {dit.dim}; leave it out, "
            "and give CausalPipeline.from_pretrained a CausalConfig"
        )
