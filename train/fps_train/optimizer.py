"""AdamW as the paper uses it, or Muon, from Optax: clipping, warm-up and decay of the rate, weight decay of matrices."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fps_jax.models.params import Params, flatten, unflatten
from fps_train.config import OptimizerOptions

_MATRIX = re.compile(r"(^|/)(kernel|lora_a|lora_b)$")


def learning_rate(options: OptimizerOptions, num_steps: int, step: Any) -> Float[Array, ""]:
    """The rate of step `step`, counted from 0: peak (step + 1) / warmup at first, the peak at the warm-up's last step."""
    done = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum(1.0, (done + 1) / max(options.warmup, 1))
    left = jnp.clip((num_steps - 1 - done) / max(num_steps - 1 - options.warmup, 1), 0.0, 1.0)
    fall = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * left)}[options.schedule]
    return jnp.asarray(options.learning_rate * rise * fall, jnp.float32)


@functools.cache  # one object for equal options: it is static in the update program
def build_optimizer(options: OptimizerOptions, num_steps: int) -> optax.GradientTransformation:
    """Clip by the global norm, Adam, decoupled weight decay of matrices, learning rate (FPSAttention, arXiv 2506.04648, section 4).

    With Muon, the blocks' matrices take steps of orthogonalised momentum in place of Adam's (arXiv 2502.16982).
    Its `init` takes the trained parameters in float32; `apply_gradient` steps.
    """
    parts = [optax.clip_by_global_norm(options.clip)] if options.clip else []
    adam = optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps)
    parts += [
        adam if options.kind == "adamw" else optax.partition({"muon": _muon(options), "adam": adam}, _muon_or_adam),
        optax.add_decayed_weights(options.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(functools.partial(learning_rate, options, num_steps)),
    ]
    return optax.chain(*parts)


def _muon(options: OptimizerOptions) -> optax.GradientTransformation:
    """Orthogonal updates of stacked matrices `[L, in, out]`, of one root mean square whatever their sizes."""
    from optax import contrib

    def axes(updates):
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(1, 2), updates)

    def scaled(update, _):
        # An orthogonal matrix has one 1 a row or column, whichever are fewer, in squares
        return update * (options.muon_rms * max(update.shape[1:]) ** 0.5)

    return optax.chain(
        contrib.scale_by_muon(beta=options.muon_momentum, weight_dimension_numbers=axes),  # pyright: ignore[reportArgumentType]
        optax.stateless_with_tree_map(scaled),
    )


def _muon_or_adam(params: Params) -> Params:
    """Muon for the matrices in the blocks, Adam for embeddings, head, norms, biases and modulations."""
    return unflatten(
        {p: "muon" if p.startswith("blocks/") and p.endswith("/kernel") else "adam" for p, _ in flatten(params)}
    )


def apply_gradient(
    grads: Params, state: Any, params: Params, options: OptimizerOptions, num_steps: int
) -> tuple[Params, Any]:
    """(parameters, optimizer state) after one step. grads, params: float32."""
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to a power of int32
        updates, state = build_optimizer(options, num_steps).update(grads, state, params)  # pyright: ignore[reportArgumentType]
        return optax.apply_updates(params, updates), state  # pyright: ignore[reportReturnType, reportArgumentType]


def decayed(params: Params) -> Params:
    """True for the parameters that weight decay draws to 0: matrices, not biases, norms, modulations or positions."""
    return unflatten({path: bool(_MATRIX.search(path)) for path, _ in flatten(params)})


def ema_decay(options: OptimizerOptions, step: Any) -> Float[Array, ""]:
    """Decay of the moving average at step `step`, counted from 0."""
    done = jnp.asarray(step, jnp.float32)
    low = (1 + done) / (10 + done) if options.ema_warmup else options.ema
    return jnp.minimum(jnp.float32(options.ema), low)


def move_average(average: Params, params: Params, decay: Float[Array, ""]) -> Params:
    """decay average + (1 - decay) params, float32."""
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
