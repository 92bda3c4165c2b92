"""A VAE trained on reconstruction: images first, then video. float32, one device, clips in memory: for small models.

Source: images first, then inflated in time, L1 and a small KL: Wan's report (arXiv 2503.20314). Noise on latents, so that the
decoder forgives what a diffusion model gets wrong, is this project's.
"""

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from fps_jax.checkpoints.writes import orbax_writes, quiet_orbax
from fps_jax.config import VAEConfig
from fps_jax.files import append_bytes, write_bytes
from fps_jax.models.params import Params, flatten, unflatten
from fps_jax.models.vae import decode_video, encode_moments
from fps_jax.progress import waiting
from fps_train.fingerprint import VAE_ENCODER
from fps_train.precompute.memory import Stretches
from fps_train.vae_options import VAETraining

_DEAD = 1e-2  # a channel's deviation, as a share of the largest: below it a channel says nothing, and isn't divided by its own
_MOST_MEASURED = 2048  # stretches, spread evenly over the clips, that statistics are of: more tell no more


class State(NamedTuple):
    """What a step changes: a pytree, float32. step: int32, steps done."""

    step: Array
    params: Params
    optimizer: Any


def raw(config: VAEConfig) -> VAEConfig:
    """The same VAE where latents aren't normalised: what is trained, before there are statistics."""
    return replace(config, latents_mean=(0.0,) * config.z_dim, latents_std=(1.0,) * config.z_dim)


def reconstruction_loss(
    config: VAEConfig, options: VAETraining, params: Params, video: UInt8[Array, "B F H W 3"], key: jax.Array
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """(L1 + MSE + kl_weight * KL, its parts): mean over pixels in [-1, 1], unclipped, and over latent values."""
    x = video.astype(jnp.float32) / 127.5 - 1
    mean, log_variance = encode_moments(config, params, x)
    if options.train == "decoder":
        mean, log_variance = jax.lax.stop_gradient((mean, log_variance))
    own, share, extra = jax.random.split(key, 3)
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(own, mean.shape)
    # A share of the batch's deviation, through which gradients flow: larger latents must not escape the noise.
    deviation = jnp.sqrt(mean.var((0, 2, 3, 4), keepdims=True) + 1e-4)
    shares = options.latent_noise * jax.random.uniform(share, (len(mean), 1, 1, 1, 1))
    z = z + shares * deviation * jax.random.normal(extra, mean.shape)
    out = decode_video(config, params, z)
    l1, mse = jnp.abs(out - x).mean(), jnp.square(out - x).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
    psnr = 10 * jnp.log10(4 / jnp.square(jnp.clip(out, -1, 1) - x).mean())
    return l1 + mse + options.kl_weight * kl, {"l1": l1, "mse": mse, "kl": kl, "psnr": psnr}


def optimizer(options: VAETraining, *, images: bool) -> optax.GradientTransformation:
    """AdamW under a clipped gradient. What gets no gradient must not decay: the convolutions in time where there are only
    images, and the encoder where the decoder alone is trained."""
    peak = options.peak(images=images)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, options.warmup_steps, options.steps, end_value=peak / 30)

    def trained(path: str) -> bool:
        still = (images and "/time_conv/" in path) or (options.train == "decoder" and path.split("/")[0] in VAE_ENCODER)
        return not still

    def decays(params: Params) -> Params:
        return unflatten({path: path.endswith("/kernel") and trained(path) for path, _ in flatten(params)})

    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(schedule, b2=0.99, weight_decay=options.weight_decay, mask=decays),
    )


@functools.cache  # one program for equal options
def _step(config: VAEConfig, options: VAETraining, images: bool) -> Callable:
    rule = optimizer(options, images=images)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, video: Array) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(options.seed), state.step)
        grad = jax.value_and_grad(functools.partial(reconstruction_loss, config, options), has_aux=True)
        (loss, parts), grads = grad(state.params, video, key)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to a power of int32
            updates, moments = rule.update(grads, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, **parts, "grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, params, moments), metrics

    return step


def initial_state(options: VAETraining, params: Params, *, images: bool) -> State:
    """The state before the first step."""
    params = jax.tree.map(lambda a: jnp.array(a, jnp.float32), params)  # a copy: steps donate it
    return State(jnp.int32(0), params, optimizer(options, images=images).init(params))


def batch_indices(options: VAETraining, step: int, num_stretches: int) -> np.ndarray:
    """Which stretches a step reads: a function of (seed, step) alone, so that a resumed run goes on as it would have."""
    return np.random.default_rng([options.seed, step]).integers(num_stretches, size=options.batch_size)


def train(
    config: VAEConfig,
    options: VAETraining,
    params: Params,
    clips: Stretches,
    run: pathlib.Path,
    *,
    tell: Callable[[str], None] = lambda line: None,
    show: bool | None = False,
) -> Params:
    """Trains from `params`, or from where `run` has got to; returns the parameters after the last step.

    In `run`: `state/` (the last two states, orbax) and `metrics.jsonl`. On one machine a resumed run gives the bits of an
    uninterrupted one.

    tell: gets the lines of what was measured. show: as of `progress_bar`, of the step that is waited for between them.
    Raises: FloatingPointError naming the step where the loss is NaN or inf, before a state with it is saved; OSError for a disk
      without room.
    """
    ocp = quiet_orbax()
    config, images = raw(config), clips.num_frames == 1
    with waiting("prepare", show=show):
        step, state = _step(config, options, images), initial_state(options, params, images=images)
    # jax's arrays and tuples as they are: what is restored has to have this tree.
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((run / "state").absolute(), options=keep) as manager, contextlib.ExitStack() as until:
        if manager.latest_step() is not None:
            with waiting("restore", show=show):
                state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
            tell(f"going on after step {manager.latest_step()}")
        # Committed as a step's outputs are, new or restored: else the second step would compile again.
        state = jax.device_put(state, jax.local_devices()[0])
        first = int(state.step)
        metrics = _Metrics(run / "metrics.jsonl", first)
        start, told = time.monotonic(), True
        for i in range(first, options.steps):
            if told:
                until.enter_context(waiting(f"from step {i + 1} of {options.steps}", show=show))
                told = False
            state, measured = step(state, clips.read(clips.starts[batch_indices(options, i, len(clips.starts))]))
            done, last = i + 1, i + 1 == options.steps
            if done % options.log_every and done % options.save_every and not last:
                continue
            line = {name: float(value) for name, value in jax.device_get(measured).items()}
            if not np.isfinite(line["loss"]) or not np.isfinite(line["grad_norm"]):
                raise FloatingPointError(
                    f"step {done}: loss {line['loss']}, norm of the gradient {line['grad_norm']}; resume with a lower --lr in a "
                    "new folder"
                )
            seconds = (time.monotonic() - start) / (done - first)
            metrics.add({"step": done, **line, "seconds_a_step": seconds})
            until.close()
            told = True
            tell(
                f"step {done} of {options.steps}: loss {line['loss']:.4f}, PSNR {line['psnr']:.1f} dB, {seconds:.2f} s"
            )
            if done % options.save_every == 0 or last:
                full = "no space left for the state; make room, then run again"
                with waiting("save", show=show), orbax_writes(run / "state", full):
                    manager.save(done, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    return state.params


class _Metrics:
    """metrics.jsonl: a line a record; lines beyond the step that a run resumes from, and damaged ones, are left out."""

    def __init__(self, file: pathlib.Path, step: int):
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line cut short by a kill
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        write_bytes(file, "".join(f"{line}\n" for line in kept).encode())

    def add(self, record: dict[str, float]) -> None:
        append_bytes(self._file, json.dumps(record).encode() + b"\n", "make room, then run again")


class Measured(NamedTuple):
    """Of a VAE on clips, without noise: latents' mean and deviation by channel, and PSNR of what they decode to, in dB."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    psnr: float


def measure(config: VAEConfig, params: Params, clips: Stretches, batch_size: int) -> Measured:
    """`latents_mean` and `latents_std` of the distributions' means, which is what diffusion is trained on, and the PSNR.

    Of stretches that don't overlap, at most 2,048 of them. A channel with less than 1% of the largest deviation is dead, and gets
    that 1%: its noise must not be blown up.
    Raises: ValueError where all latents are the same.
    """
    config = raw(config)

    @jax.jit
    def look(params: Params, video: UInt8[Array, "B F H W 3"]) -> tuple[Array, Array]:
        x = video.astype(jnp.float32) / 127.5 - 1
        mean, _ = encode_moments(config, params, x)
        return mean, jnp.square(decode_video(config, params, mean, clip=True) - x).mean((1, 2, 3, 4))

    chosen = clips.apart[np.unique(np.linspace(0, len(clips.apart) - 1, _MOST_MEASURED).astype(int))]
    total, square, count, errors = np.zeros(config.z_dim), np.zeros(config.z_dim), 0, []
    for first in range(0, len(chosen), batch_size):
        some = chosen[first : first + batch_size]
        whole = np.concatenate([some, np.repeat(some[-1:], batch_size - len(some))])  # one program
        mean, error = look(params, clips.read(whole))
        values = np.moveaxis(np.asarray(mean, np.float64)[: len(some)], 1, -1).reshape(-1, config.z_dim)
        total, square, count = total + values.sum(0), square + np.square(values).sum(0), count + len(values)
        errors += np.asarray(error, np.float64)[: len(some)].tolist()
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    std = np.maximum(std, _DEAD * std.max())
    if not std.max() > 0:
        raise ValueError(
            "the latents of these clips are constant: nothing was learned; train longer or with another --lr"
        )
    psnr = float(10 * np.log10(4 / max(np.mean(errors), 1e-10)))
    return Measured(tuple(map(float, mean)), tuple(map(float, std)), psnr)
