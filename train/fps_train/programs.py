"""A run's compiled programs: a gradient for each size of video and each attention, and one update."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from fps_jax.attention.attend import TokenAttention
from fps_jax.mesh import BATCH
from fps_jax.models.params import Params, flatten
from fps_train.batch import Batch
from fps_train.plan import BucketPlan, peak_flops, sample_flops
from fps_train.regimes import TrainingRegime
from fps_train.setup import Setup, Start
from fps_train.state import TrainState
from fps_train.step import Interval, Micro, Seen, gradient, update


class Programs:
    """Compiled before the first step, so that no step stalls and what can't compile is known at once."""

    def __init__(self, setup: Setup, begun: Start):
        self._setup, self._options = setup, setup.options
        self._frozen, self._teacher = begun.frozen, begun.teacher
        self._state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), begun.state)
        self._seed = np.uint32(setup.options.seed)
        self._gradients: dict[tuple[BucketPlan, TokenAttention], Any] = {}
        self._update: Any = None
        peak = peak_flops()
        self.peak_flops = None if peak is None else peak * setup.mesh.size
        joined = jax.eval_shape(setup.parts.join, self._state.params, begun.frozen)
        self._matrix_params = sum(leaf.size for path, leaf in flatten(joined) if path.endswith("kernel"))
        shapes, shardings = self._state.params, jax.tree.map(lambda a: a.sharding, self._state.params)
        self._zeros = jax.jit(
            lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), out_shardings=shardings
        )

    def compile(self, say: Callable[[str], None]) -> None:
        """All programs. say: told how many there are, and each when it is done."""
        todo = [(bucket, attention) for bucket in self._setup.buckets for attention in bucket.attentions]
        sizes = f"{len(self._setup.buckets)} size{'s' * (len(self._setup.buckets) > 1)} of video"
        later = "; validation's when it first runs" if self._options.validation.every else ""
        say(f"compiling {len(todo) + 1} programs: {len(todo)} gradients (regimes of {sizes}) and the update{later}")
        for number, (bucket, attention) in enumerate(todo, 1):
            began = time.monotonic()
            sums = self._state.params if self._options.accumulate > 1 else None
            self._gradients[bucket, attention] = gradient.lower(
                self._state.params,
                self._frozen,
                self._teacher,
                self._abstract_batch(bucket),
                self._scalar(jnp.uint32),
                Interval(self._scalar(jnp.float32), self._scalar(jnp.float32)),
                sums,
                options=self._setup.step,
                attention=attention,
            ).compile()
            say(f"  {number} of {len(todo) + 1}: {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        losses = self._scalar(jnp.float32, self._options.accumulate)
        self._update = update.lower(
            self._state,
            self._state.params,
            losses,
            options=self._options.optimizer,
            num_steps=self._options.steps,
            mesh=self._setup.step.mesh,
        ).compile()
        say(f"  {len(todo) + 1} of {len(todo) + 1}: {time.monotonic() - began:.0f} s")

    def compiled(self) -> dict[str, Any]:
        """`jax.stages.Compiled` of each, by the size of video and the first regime that it is of, and 'update'."""
        firsts = {name: self._gradients[key] for name, (key, _) in self._first_regimes().items()}
        return {**firsts, "update": self._update}

    def flops(self) -> dict[str, float]:
        """Floating-point operations of a microbatch, forward and backward, by the names of `compiled`."""
        rows = self._options.batch_size
        return {
            name: rows * self.sample_flops(bucket, regime)
            for name, ((bucket, _), regime) in self._first_regimes().items()
        }

    def shares(self) -> dict[str, float]:
        """Of a run's microbatches, by the names of `compiled`; the update has none."""
        sizes = dict(zip(self._setup.buckets, self._setup.data.buckets, strict=True))
        samples = sum(bucket.num_samples for bucket in sizes.values())
        return {
            name: sizes[bucket].num_samples
            / samples
            * sum(r.probability for r in bucket.regimes if r.attention == attention)
            for name, ((bucket, attention), _) in self._first_regimes().items()
        }

    def _first_regimes(self) -> dict[str, tuple[tuple[BucketPlan, TokenAttention], TrainingRegime]]:
        found = {}
        for bucket, attention in self._gradients:
            regime = next(regime for regime in bucket.regimes if regime.attention == attention)
            found[f"{'x'.join(map(str, bucket.grid))} tokens, {regime.name}"] = ((bucket, attention), regime)
        return found

    def gradient(
        self, trained: Params, batch: Batch, bucket: BucketPlan, regime: TrainingRegime, sums: Params | None
    ) -> tuple[Params, Micro]:
        """A microbatch's gradient, added to `sums`; None at a step's first one."""
        if sums is None and self._options.accumulate > 1:
            sums = self._zeros()
        program = self._gradients[bucket, regime.attention]
        return program(trained, self._frozen, self._teacher, batch, self._seed, _interval(regime), sums)

    def update(self, state: TrainState, sums: Any, losses: Array) -> tuple[TrainState, Seen]:
        """The step itself."""
        return self._update(state, sums, losses)

    def sample_flops(self, bucket: BucketPlan, regime: TrainingRegime) -> float:
        """Of one sample, forward and backward."""
        return sample_flops(self._setup.config.dit, bucket, regime.attention, self._matrix_params)

    def _scalar(self, dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._setup.mesh, PartitionSpec()))

    def _abstract_batch(self, bucket: BucketPlan) -> Batch:
        """Shapes of a bucket's batches, as `Batches` makes them."""
        rows, config = self._options.batch_size, self._setup.config
        sharding = NamedSharding(self._setup.mesh, PartitionSpec(BATCH))

        def of(*shape, dtype: Any = jnp.bfloat16) -> Any:
            return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

        dit, (z, *sizes) = config.dit, bucket.latent_shape
        batch = Batch(of(z, *sizes), of(dit.text_len, dit.text_dim), of(dtype=jnp.uint32))
        image = self._setup.data.contents.image_shape
        return batch if image is None else batch._replace(condition=of(dit.in_channels - z, *sizes), image=of(*image))


def _interval(regime: TrainingRegime) -> Interval:
    return Interval(np.float32(regime.low), np.float32(regime.high))  # pyright: ignore[reportArgumentType]
