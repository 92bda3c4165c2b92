"""Everything that a training run is told, as one record: the command line, RUN/config.toml and the checks are made from it.

Nothing here imports jax: arguments are checked before it is loaded.
"""

import dataclasses
import math
import pathlib
import tomllib
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fps_jax.choices import Dtype, Remat, Setting, check_choice
from fps_jax.files import write_bytes
from fps_jax.mesh import AXES, BATCH, parse_mesh

TDistribution = Literal["wan", "uniform", "logit-normal"]
Weighting = Literal["none", "cosmap"]
LearningRate = Literal["constant", "cosine", "linear"]
OptimizerKind = Literal["adamw", "muon"]


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not a whole number of {least} or more")


def _positive(name: str, value: Any) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} is not a positive number")


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Which noise levels are trained, and what they weigh."""

    distribution: TDistribution = "wan"
    """Distribution of t before the shift: logit-normal, uniform, or wan: logit-normal (0, 1) with shift 2, as its authors say that
    they trained at 480p (Wan-Video/Wan2.1, issue 291)."""
    mean: float = 0.0
    """Mean of logit(t), for logit-normal."""
    std: float = 1.0
    """Deviation of logit(t), for logit-normal."""
    shift: float | None = None
    """sigma = shift t / (1 + (shift - 1) t): moves training to higher noise. 2 for wan and 1 for the others if left out."""
    weighting: Weighting = "none"
    """Weight of a sample's loss: none; cosmap, 2 / (pi (1 - 2 sigma + 2 sigma^2)) (arXiv 2403.03206)."""

    def __post_init__(self):
        check_choice("flow.distribution", self.distribution, TDistribution)
        check_choice("flow.weighting", self.weighting, Weighting)
        if self.distribution != "logit-normal" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(
                f"flow.mean={self.mean} and flow.std={self.std} are for flow.distribution='logit-normal'; leave them out"
            )
        _positive("flow.std", self.std)
        if self.shift is None:
            object.__setattr__(self, "shift", 2.0 if self.distribution == "wan" else 1.0)
        _positive("flow.shift", self.shift)

    @property
    def training_shift(self) -> float:
        """`shift`, which is never None once the options are made."""
        assert self.shift is not None
        return self.shift


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW or Muon, its schedule, and the moving average of the weights."""

    kind: OptimizerKind = "adamw"
    """adamw; muon, which orthogonalises the momentum of the blocks' matrices and leaves the rest to AdamW: from scratch it learns
    in fewer steps."""
    learning_rate: float = 5e-6
    """Peak learning rate."""
    schedule: LearningRate = "constant"
    """After the warm-up: constant, or cosine or linear to 0 at the last step."""
    warmup: int = 200
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 1e-4
    """Decoupled weight decay (AdamW, arXiv 1711.05101), of matrices only."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    muon_rms: float = 0.2
    """Root mean square of Muon's updates in learning rates: at 0.2, AdamW's own, both take the same rate (arXiv 2502.16982)."""
    eps: float = 1e-15
    """Added to the root of the second moment."""
    clip: float = 1.0
    """The gradient's global norm is clipped to this; 0 doesn't clip."""
    ema: float = 0.99
    """Decay of the float32 moving average of the weights a step; 0 keeps none."""
    ema_warmup: bool = False
    """Let that decay start low: at most (1 + step) / (10 + step)."""

    def __post_init__(self):
        check_choice("optimizer.kind", self.kind, OptimizerKind)
        check_choice("optimizer.schedule", self.schedule, LearningRate)
        _positive("optimizer.learning_rate", self.learning_rate)
        _positive("optimizer.muon_rms", self.muon_rms)
        _positive("optimizer.eps", self.eps)
        _whole("optimizer.warmup", self.warmup, 0)
        for name in ("b1", "b2", "muon_momentum", "ema"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"optimizer.{name}={value} is not in [0, 1); it is a decay a step")
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"optimizer.{name}={value} is not a number of 0 or more")
        if self.kind != "muon" and (self.muon_momentum, self.muon_rms) != (0.95, 0.2):
            raise ValueError(
                f"optimizer.muon_momentum={self.muon_momentum} and optimizer.muon_rms={self.muon_rms} are for "
                "optimizer.kind='muon'; leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters in place of full fine-tuning; the base stays frozen."""

    rank: int = 0
    """Rank of the adapters; 0 fine-tunes the weights themselves."""
    alpha: float | None = None
    """The adapters' product is scaled by alpha / rank; the rank if left out."""
    targets: tuple[str, ...] = ()
    """Patterns (* ? [abc]) of the linear layers that get one, over a path or its end: 'self_attn/[qk]' say. All of attention and
    MLP in the blocks if left out."""

    def __post_init__(self):
        _whole("lora.rank", self.rank, 0)
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank == 0 and (self.alpha is not None or self.targets):
            raise ValueError("lora.alpha or lora.targets was given without lora.rank; give a rank, 16 say")
        if self.rank and self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if self.alpha is not None:
            _positive("lora.alpha", self.alpha)


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """What is looked at while the run goes on."""

    every: int = 500
    """Steps between validations; 0 for none."""
    samples: int = 8
    """Samples held out of the data for the validation loss, at fixed noise levels and noise."""
    videos: int = 2
    """Validation prompts of the data that are sampled; 0 for none."""
    video_every: int = 0
    """Steps between validation videos; 0: with every validation."""
    steps: int = 20
    """Denoising steps of a validation video."""
    guidance_scale: float = 5.0
    """Guidance of a validation video."""
    seed: int = 0
    """Seed of the videos' noise."""

    def __post_init__(self):
        for name, least in (("every", 0), ("samples", 0), ("videos", 0), ("video_every", 0), ("steps", 1)):
            _whole(f"validation.{name}", getattr(self, name), least)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """When the run is saved, and what is kept."""

    every: int = 500
    """Steps between checkpoints; the last step is always one."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    best: int = 1
    """Checkpoints of the lowest validation loss that are kept beside those; 0 for none."""

    def __post_init__(self):
        for name, least in (("every", 1), ("keep", 1), ("best", 0)):
            _whole(f"checkpoint.{name}", getattr(self, name), least)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune a Wan2.1 DiT with the attention that it will be sampled with."""

    model: str = ""
    """A converted checkpoint, an official or diffusers directory, a Hugging Face repo id, or another run."""
    data: str = ""
    """What fps-precompute wrote."""
    output: str = ""
    """Folder of the run: config, checkpoints, metrics, validation videos."""
    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 1
    """Samples of a microbatch, over all devices."""
    accumulate: int = 1
    """Microbatches of a step; each has one regime of the schedule."""
    seed: int = 0
    """Seed of the samples' order, noise, noise levels and text dropout."""
    mesh: str = ""
    """Devices along each axis, 'data=2,fsdp=4' say: data, samples; fsdp, samples and shards of the parameters; context, tokens of a
    sample; tensor, heads. One device if left out."""
    attention: Setting = "fps"
    """Self-attention in training: fps, FP8 and sparse as the schedule says; fp8 or sparse, only that half; dense."""
    schedule: str | None = None
    """Schedule as JSON, from fps-calibrate; the default one if left out."""
    sampling_shift: float | None = None
    """Shift that the model will be sampled with, by which the schedule's progress is measured; the checkpoint's own if left out."""
    sampling_steps: int = 50
    """Steps that it will be sampled with: gives a schedule's dense_steps their share of noise levels."""
    dtype: Dtype = "bfloat16"
    """Compute dtype. Masters, moments and the moving average are float32."""
    remat: Remat = "full"
    """What the backward computes again: nothing (none); all but matmuls with weights (dots); all but self-attention (attention), or
    all (full). From most memory to least."""
    text_dropout: float = 0.1
    """Share of samples that see the empty prompt, for guidance."""
    train_only: tuple[str, ...] = ()
    """Patterns (* ? [abc]) of parameters that are trained, over a path or its end: 'self_attn/*' say. All are if left out."""
    teacher_weight: float = 0.0
    """Share of the loss that pulls towards the dense base model's velocity in place of the data's."""
    from_scratch: bool = False
    """Start from random weights of the model's config in place of its weights."""
    init_from: str | None = None
    """Start anew from the weights of this checkpoint or run in place of MODEL's."""
    flow: FlowOptions = field(default_factory=FlowOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    def __post_init__(self):
        check_choice("attention", self.attention, Setting)
        check_choice("dtype", self.dtype, Dtype)
        check_choice("remat", self.remat, Remat)
        for name in ("steps", "batch_size", "accumulate", "sampling_steps"):
            _whole(name, getattr(self, name), 1)
        _whole("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} is not in [0, 2**32); use a smaller one")
        for name in ("text_dropout", "teacher_weight"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is not a share in [0, 1]")
        if self.sampling_shift is not None:
            _positive("sampling_shift", self.sampling_shift)
        self._check_mesh()
        if self.attention == "dense" and self.schedule is not None:
            raise ValueError(
                "schedule was given, but attention='dense' follows none; pass attention='fps', or leave it out"
            )
        object.__setattr__(self, "train_only", tuple(self.train_only))
        if self.lora.rank and self.optimizer.kind == "muon":
            raise ValueError("optimizer.kind='muon' is for whole matrices, not for LoRA's adapters; leave it out")
        if self.lora.rank and self.train_only:
            raise ValueError("train_only was given with lora.rank, which freezes the base; choose one of them")
        if self.from_scratch and self.init_from is not None:
            raise ValueError(
                f"init_from={self.init_from!r} was given with from_scratch, which starts from random weights; "
                "leave one of them out"
            )
        if self.from_scratch and (self.lora.rank or self.train_only or self.teacher_weight):
            raise ValueError(
                "from_scratch trains all weights and has no teacher; leave lora, train_only and teacher_weight out"
            )

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Devices along every axis of the mesh."""
        return dict.fromkeys(AXES, 1) | parse_mesh(self.mesh)

    def _check_mesh(self) -> None:
        shared = math.prod(self.mesh_sizes[axis] for axis in BATCH)
        if self.batch_size % shared:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of the {shared} devices along data and fsdp that share a "
                f"microbatch (mesh={self.mesh!r}); use {-(-self.batch_size // shared) * shared}, or context in place of fsdp"
            )

    def to_toml(self) -> str:
        """All of it, as RUN/config.toml holds it; what is None is left out, as TOML has no null."""
        import tomli_w

        return tomli_w.dumps(_without_none(dataclasses.asdict(self)))

    def save(self, path: pathlib.Path) -> None:
        """Writes a TOML file, whole or not at all."""
        write_bytes(path, self.to_toml().encode())

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "TrainConfig":
        """From parsed TOML. Raises ValueError for an unknown entry or a wrong value, naming it."""
        return _build(cls, record, "")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "TrainConfig":
        """Reads a TOML file. Raises FileNotFoundError, or ValueError that names the file and what is wrong in it."""
        try:
            record = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"config={str(path)!r} doesn't exist; a run writes its own as config.toml"
            ) from None
        except (IsADirectoryError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(
                f"config={str(path)!r} is not a TOML file ({error}); a run writes one as config.toml"
            ) from None
        try:
            return cls.from_dict(record)
        except ValueError as error:
            raise ValueError(f"config={str(path)!r}: {error}") from None


PRESETS: dict[str, TrainConfig] = {
    # FPSAttention (arXiv 2506.04648) section 4: full fine-tuning.
    "paper": TrainConfig(),
    # LoRA (arXiv 2106.09685): few weights, so a larger rate and no average; the base needs no float32 copy.
    "lora": TrainConfig(
        lora=LoraOptions(rank=32),
        optimizer=OptimizerOptions(learning_rate=1e-4, weight_decay=0.01, eps=1e-8, warmup=100, ema=0.0),
    ),
    "scratch": TrainConfig(
        from_scratch=True,
        attention="dense",
        remat="none",
        optimizer=OptimizerOptions(
            learning_rate=1e-3, schedule="cosine", weight_decay=0.01, b2=0.99, eps=1e-8, ema=0.998, ema_warmup=True
        ),
    ),
}


def _build(kind: Any, record: dict[str, Any], prefix: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    given = {}
    for name, value in record.items():
        if name not in known:
            raise ValueError(f"{prefix}{name} is no option; there are {', '.join(prefix + n for n in known)}")
        default = known[name].default_factory
        if isinstance(default, type) and dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{name}={value!r} is not a table of options; write [{name}]")
            value = _build(default, value, f"{name}.")
        else:
            value = _typed(prefix + name, value, known[name].type)
        given[name] = value
    return kind(**given)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A TOML value as the field's type has it. Literals are checked by the dataclasses themselves."""
    if isinstance(kind, str):  # pragma: no cover
        raise TypeError(f"{name}: annotations of options are not strings")
    allowed = get_args(kind) or (kind,)
    if kind == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{name}={value!r} is not a list of texts")
        return tuple(value)
    if all(isinstance(a, str) for a in allowed):
        return value
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not any(isinstance(value, a) and not (isinstance(value, bool) and a is not bool) for a in allowed):
        names = " or ".join({"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}
                            .get(a.__name__, "") for a in allowed if a is not type(None))  # fmt: skip
        raise ValueError(f"{name}={value!r} is not {names}")
    return value


def _without_none(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
        for key, value in record.items()
        if value is not None
    }
