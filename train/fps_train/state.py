"""What a run trains and what it keeps fixed, and where both lie."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from fps_jax.config import DiTConfig
from fps_jax.models.dit import cast_params
from fps_jax.models.lora import LoRAConfig, init_lora, with_lora
from fps_jax.models.params import Params, flatten, matches, unflatten
from fps_jax.models.sharding import param_shardings
from fps_train.config import OptimizerOptions, TrainConfig
from fps_train.optimizer import build_optimizer


class TrainState(NamedTuple):
    """All that a step changes. A pytree, donated by every step.

    Attributes:
      step: int32, optimizer steps done.
      params: the trained parameters, float32 masters.
      optimizer: Optax's state: moments in float32.
      ema: moving average of params, float32; None where none is kept.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: Any
    ema: Params | None


@dataclass(frozen=True)
class Parts:
    """How the parameters of a DiT divide into trained and frozen ones, and come together again. Hashable: static in programs.

    Attributes:
      config: the architecture.
      dtype: compute dtype, in which frozen parameters are held too.
      lora: adapters are trained and the base is frozen; None for the weights themselves.
      train_only: patterns of trained paths (`fps_jax.models.params.matches`); () for all.
    Raises: ValueError for a pattern that matches nothing.
    """

    config: DiTConfig
    dtype: str
    lora: LoRAConfig | None = None
    train_only: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: DiTConfig, options: TrainConfig) -> "Parts":
        """As a run's options say."""
        lora = None
        if options.lora.rank:
            targets = {"targets": options.lora.targets} if options.lora.targets else {}
            assert options.lora.alpha is not None
            lora = LoRAConfig(rank=options.lora.rank, alpha=options.lora.alpha, **targets)
        return cls(config, options.dtype, lora, options.train_only)

    @property
    def freezes(self) -> bool:
        """Whether some of the base's weights stay as they are."""
        return self.lora is not None or bool(self.train_only)

    def split(self, params: Params, key: Array, mesh: Mesh | None = None) -> tuple[Params, Params]:
        """(trained in float32, frozen in the compute dtype) of a whole DiT's parameters; adapters start from `key`.

        mesh: what adapters are made on, shard by shard; other parameters lie where they are.
        """
        if self.lora is not None:
            make = functools.partial(init_lora, self.config, self.lora)
            shardings = None if mesh is None else param_shardings(jax.eval_shape(make, key), mesh)
            return jax.jit(make, out_shardings=shardings)(key), cast_params(params, jnp.dtype(self.dtype))
        trained, frozen = {}, {}
        for path, leaf in flatten(params):
            (trained if self._is_trained(path) else frozen)[path] = leaf
        for pattern in self.train_only:
            if not any(matches(path, pattern) for path in trained):
                some = ", ".join(sorted(path for path, _ in flatten(params))[:4])
                raise ValueError(f"train_only={pattern!r} matches no parameter; they are {some}, ...")
        as_float32 = unflatten({path: leaf.astype(jnp.float32) for path, leaf in trained.items()})
        return as_float32, cast_params(unflatten(frozen), jnp.dtype(self.dtype))

    def join(self, trained: Params, frozen: Params) -> Params:
        """What `fps_jax.models.dit.dit` takes, in the compute dtype. Differentiable with respect to `trained`."""
        if self.lora is not None:
            return with_lora(frozen, trained, self.lora)
        leaves = dict(flatten(cast_params(trained, jnp.dtype(self.dtype)))) | dict(flatten(frozen))
        return unflatten(leaves)

    def _is_trained(self, path: str) -> bool:
        return not self.train_only or any(matches(path, pattern) for pattern in self.train_only)


def init_state(trained: Params, options: OptimizerOptions, num_steps: int) -> TrainState:
    """The state before the first step. Pure: for `jax.jit` with `out_shardings`, and for `jax.eval_shape`."""
    optimizer = build_optimizer(options, num_steps).init(trained)  # pyright: ignore[reportArgumentType]
    ema = jax.tree.map(jnp.copy, trained) if options.ema else None
    return TrainState(jnp.int32(0), trained, optimizer, ema)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a state, or of its shapes: parameters, moments and average by the one table of parameter paths."""
    whole: Any = NamedSharding(mesh, PartitionSpec())
    of_params = param_shardings(state.params, mesh)
    by_path = dict(flatten(of_params))

    def of_moment(path, _):
        # Moments are trees like the parameters', or parts of one, somewhere in Optax's state
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        names = ("/".join(keys[i:]) for i in range(len(keys)))
        return next((by_path[name] for name in names if name in by_path), whole)

    optimizer = jax.tree_util.tree_map_with_path(of_moment, state.optimizer)
    return TrainState(whole, of_params, optimizer, None if state.ema is None else of_params)
