"""From a run's options to all that its steps need: model, data, schedule, state. Options are checked before weights are read."""

import dataclasses
import functools
import math
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fps_jax.attention.schedule import FPSSchedule
from fps_jax.attention.sharded import on_mesh
from fps_jax.checkpoints.open import Model, open_model
from fps_jax.config import DiTConfig, WanConfig
from fps_jax.models.dit import build_dit, cast_params
from fps_jax.models.init import init_dit_for_training
from fps_jax.models.params import Params, abstract_params
from fps_jax.models.sharding import make_mesh, param_shardings, undivided
from fps_jax.sampling.request import default_flow_shift
from fps_jax.sizes import Shape3, video_size
from fps_train.batches import Batches
from fps_train.config import TrainConfig
from fps_train.data import Data, described_data, open_data
from fps_train.placement import process_rows, put
from fps_train.plan import BucketPlan, bucket_grid
from fps_train.regimes import TrainingRegime, training_regimes
from fps_train.state import Parts, TrainState, init_state, state_shardings
from fps_train.step import StepOptions


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run that is known to be possible. No weights were read.

    Attributes:
      directory: the run's folder.
      schedule: what the weights will be sampled with too; None for dense.
      sampling_shift: of the first bucket's size.
      buckets: as `data.buckets`.
    """

    options: TrainConfig
    directory: pathlib.Path
    model: Model
    data: Data
    batches: Batches
    schedule: FPSSchedule | None
    sampling_shift: float
    buckets: tuple[BucketPlan, ...]
    parts: Parts
    step: StepOptions
    mesh: Mesh

    @property
    def config(self) -> WanConfig:
        return self.model.config

    @functools.cached_property
    def dit_shardings(self) -> Params:
        """Where each of the DiT's parameters lies."""
        return param_shardings(abstract_params(build_dit(self.config.dit)), self.mesh)


def prepare(options: TrainConfig, devices: list[Any] | None = None, sizes: tuple[str, ...] = ()) -> Setup:
    """Opens model and data, and holds all options against them.

    devices: for the mesh, in place of those that there are; they may only be described.
    sizes: of videos, as fps-precompute names them, for a run that is planned without data; `options.data` isn't read then.
    Raises: FileNotFoundError or ValueError in one line.
    """
    for name in ("model",) if sizes else ("model", "data", "output"):
        if not getattr(options, name):
            given = "MODEL" if name == "model" else f"--{name}"
            raise ValueError(f"{given} is missing; give it, or a --config that has it")
    model = open_model(options.model)
    data = described_data(model.config, sizes, options.validation.samples) if sizes else open_data(options.data)
    data.check(model.config)
    dit = model.config.dit
    grids = [bucket_grid(dit, bucket.latent_shape) for bucket in data.buckets]
    schedule = _schedule(options, grids)
    shifts = [_sampling_shift(options, model.config, bucket.latent_shape) for bucket in data.buckets]
    mesh = _mesh(options, dit, grids, devices)
    several = mesh if mesh.size > 1 else None
    batches = Batches(
        data,
        batch_size=options.batch_size,
        seed=options.seed,
        text_dropout=options.text_dropout,
        validation_samples=options.validation.samples,
        rows=functools.partial(process_rows, mesh),
    )

    def regimes(grid: Shape3, shift: float) -> tuple[TrainingRegime, ...]:
        found = training_regimes(
            schedule,
            options.flow,
            grid=grid,
            num_layers=dit.num_layers,
            sampling_shift=shift,
            sampling_steps=options.sampling_steps,
        )
        return tuple(dataclasses.replace(regime, attention=on_mesh(regime.attention, several)) for regime in found)

    buckets = tuple(
        BucketPlan(bucket.latent_shape, grid, regimes(grid, shift))
        for bucket, grid, shift in zip(data.buckets, grids, shifts, strict=True)
    )
    parts = Parts.of(dit, options)
    return Setup(
        options=options,
        directory=pathlib.Path(options.output).expanduser(),
        model=model,
        data=data,
        batches=batches,
        schedule=schedule,
        sampling_shift=shifts[0],
        buckets=buckets,
        parts=parts,
        step=StepOptions(parts, options.flow, options.remat, options.teacher_weight, several),
        mesh=mesh,
    )


@dataclass(frozen=True)
class Start:
    """Weights in place: the state before the first step, what stays frozen, and the dense teacher's weights or None."""

    state: TrainState
    frozen: Params
    teacher: Params | None


def start(setup: Setup, init_from: str | None = None) -> Start:
    """Reads the model's weights (or makes random ones) straight into their shards, and makes the state of them.

    init_from: a checkpoint or run whose DiT to start from in place of the model's; the teacher stays the model's.
    Raises: ValueError where that is of another architecture.
    """
    options, config = setup.options, setup.config.dit
    key = jax.random.key(options.seed)
    load_dtype = jnp.float32 if setup.parts.lora is None else jnp.dtype(options.dtype)
    shards = setup.dit_shardings
    teacher = None
    if options.from_scratch:
        params = jax.jit(init_dit_for_training, static_argnums=0, out_shardings=shards)(config, key)
    else:
        source = setup.model
        if init_from is not None:
            source = open_model(init_from)
            if source.config.dit != config:
                raise ValueError(f"init_from={init_from!r} is of another architecture than {options.model!r}")
        params = source.load("dit", load_dtype, shards)
        if options.teacher_weight:
            base = params if init_from is None else setup.model.load("dit", jnp.dtype(options.dtype), shards)
            teacher = cast_params(base, jnp.dtype(options.dtype))
            # A copy: what has that dtype already would be the trained weights themselves, which each step overwrites.
            teacher = jax.tree.map(jnp.copy, teacher)
    trained, frozen = setup.parts.split(params, jax.random.fold_in(key, 1), setup.mesh)
    del params
    frozen = put(frozen, param_shardings(frozen, setup.mesh))
    make = lambda trained: init_state(trained, options.optimizer, options.steps)  # noqa: E731
    shardings = state_shardings(jax.eval_shape(make, trained), setup.mesh)
    state = jax.jit(make, out_shardings=shardings, donate_argnums=0)(put(trained, shardings.params))
    return Start(state, frozen, teacher)


def abstract_start(setup: Setup) -> Start:
    """Shapes and shardings of what `start` gives: nothing is read, and no device has to be there."""
    options, mesh = setup.options, setup.mesh
    weights = abstract_params(build_dit(setup.config.dit))

    def on(shapes, shardings):
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)

    trained, frozen = jax.eval_shape(lambda params: setup.parts.split(params, jax.random.key(0)), weights)
    state = jax.eval_shape(lambda trained: init_state(trained, options.optimizer, options.steps), trained)
    teacher = None
    if options.teacher_weight:
        teacher = jax.eval_shape(lambda params: cast_params(params, jnp.dtype(options.dtype)), weights)
        teacher = on(teacher, param_shardings(teacher, mesh))
    return Start(on(state, state_shardings(state, mesh)), on(frozen, param_shardings(frozen, mesh)), teacher)


def _mesh(options: TrainConfig, dit: DiTConfig, grids: list[Shape3], devices: list[Any] | None) -> Mesh:
    """The run's mesh. Raises ValueError where model or data can't be cut so."""
    sizes = options.mesh_sizes
    mesh = make_mesh(sizes, devices)
    for name, count in (("heads", dit.num_heads), ("MLP columns", dit.mlp_dim)):
        if count % sizes["tensor"]:
            raise ValueError(
                f"mesh={options.mesh!r}: tensor={sizes['tensor']} does not divide the model's {count} {name}; "
                f"use a divisor of {math.gcd(dit.num_heads, dit.mlp_dim)}, or fsdp"
            )
    for grid in grids if options.attention == "dense" or options.teacher_weight else ():
        if math.prod(grid) % sizes["context"]:
            raise ValueError(
                f"mesh={options.mesh!r}: context={sizes['context']} does not divide the {math.prod(grid)} tokens of "
                f"grid {grid}, as dense attention needs; use a divisor, or a schedule, whose tiles are padded"
            )
    found = undivided(abstract_params(build_dit(dit)), mesh)
    if found is not None:
        axes, size = found
        devices_along = math.prod(sizes[axis] for axis in axes)
        named = " x ".join(f"{axis}={sizes[axis]}" for axis in axes) + (f" = {devices_along}" if len(axes) > 1 else "")
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        nearest = [n for n in divisors if n < devices_along][-1:] + [n for n in divisors if n > devices_along][:1]
        raise ValueError(
            f"mesh={options.mesh!r}: {named} does not divide the {size} rows or columns of the blocks' matrices, which every "
            f"device would then hold whole; use {' or '.join(map(str, nearest))}"
        )
    return mesh


def _schedule(options: TrainConfig, grids: list) -> FPSSchedule | None:
    if options.attention == "dense":
        return None
    one = grids[0] if len(set(grids)) == 1 else None
    if options.schedule is not None:
        given = FPSSchedule.load(options.schedule)
    elif one is not None:
        given = FPSSchedule.default(one)
    else:  # one scale a tile is what every tile allows
        given = FPSSchedule.default()
        given = dataclasses.replace(
            given, regimes=tuple(dataclasses.replace(r, scales_per_tile=1) for r in given.regimes)
        )
    schedule = given.setting(options.attention)
    if one is not None:
        return schedule.resolve(one)
    if schedule.grid is not None:
        raise ValueError(
            f"schedule is for a grid of {schedule.grid} tokens and the data has videos of {len(set(grids))} sizes; "
            "take grid and tile out of it (null), or train one size"
        )
    return dataclasses.replace(schedule, tile=None)


def _sampling_shift(options: TrainConfig, config: WanConfig, latent_shape: tuple[int, ...]) -> float:
    if options.sampling_shift is not None:
        return options.sampling_shift
    height, width, _ = video_size(latent_shape[1:])
    return default_flow_shift(config, height, width)
