"""Block diffusion's rollout: one block of latents after the other, each from the cache of those before it.

A block is one call of one compiled program: the few denoising steps, which leave the cache alone, and one pass over the finished
block, whose keys and values go into it. So a block that is not finished leaves no trace.
Source: guandeh17/Self-Forcing pipeline/causal_inference.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fps_jax.attention.cache import CachedAttention, CacheLayout, Context, Implementation, KVCache
from fps_jax.causal import CausalConfig
from fps_jax.config import DiTConfig
from fps_jax.models.dit import build_dit, stage_name
from fps_jax.models.dit_layers import TextKV
from fps_jax.models.params import Params, bind
from fps_jax.models.rope import rope_table
from fps_jax.sampling.flow import block_levels
from fps_jax.sampling.guidance import Inputs, guided_velocity
from fps_jax.sampling.room import memory_limit, memory_used
from fps_jax.sampling.solvers import SolverState, SolverTable, coefficients, solver_step
from fps_jax.sizes import token_grid


class BlockOutputs(NamedTuple):
    """latents: the finished block, float32. cache: with it. first_bad: (step, stage) of the first NaN or inf, -1 for none."""

    latents: Float[Array, "B 16 m H W"]
    cache: KVCache
    first_bad: Int[Array, "2"]


def text_kv(config: DiTConfig, params: Params, text_states: Float[Array, "B T E"], *, dtype: Any) -> TextKV:
    """Cross-attention's keys and values of a prompt, `[L, B, text_len, N, H]`: made once, read at every step of every block."""
    return _text_kv(params, text_states, config=config, dtype=jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _text_kv(params, text_states, *, config, dtype):
    with jax.default_matmul_precision("highest"):
        return bind(build_dit(config, dtype=dtype), params).text_kv(text_states)


def denoise_block(
    params: Params,
    inputs: Inputs,
    cache: KVCache,
    rope: Float[Array, "2 S H/2"],
    context: Context,
    table: SolverTable,
    context_time: Float[Array, ""],
    *,
    config: DiTConfig,
    layout: CacheLayout,
    dtype: Any,
    implementation: Implementation = "auto",
) -> BlockOutputs:
    """One block from noise, and the cache with it. Pure: for `jax.jit`, with the cache donated, and ahead-of-time compiles.

    Args:
      inputs: float32 noise of the block, and step noise, which after the last step is nothing; as text what `text_kv` made.
      rope: float32, of the block's own frames in the video, in raster order.
      context: what the block attends.
      table: the levels' coefficients (`solvers.coefficients` of solver "lcm").
      context_time: the timestep that the model is told in the pass over the finished block.
    """
    attention = CachedAttention(layout, inputs.noise.shape[2], cache, context, implementation)
    velocity = functools.partial(guided_velocity, config, params, inputs, attention=attention, rope=rope, dtype=dtype)

    def step(carry, numbered_row):
        state, bad = carry
        index, row, noise = numbered_row
        v, stage = velocity(state.x, row.timestep)
        return (solver_step(state, row, v, noise), _first(bad, index, stage)), None

    steps = table.sigma.shape[0]
    zeros = jnp.zeros_like(inputs.noise)
    carry = (SolverState(inputs.noise, zeros, zeros, zeros), jnp.full(2, -1, jnp.int32))
    rows = (jnp.arange(steps, dtype=jnp.int32), table, inputs.step_noise)
    (state, bad), _ = jax.lax.scan(step, carry, rows)
    cache, stage = _kept(velocity, layout, cache, context, state.x, context_time)
    return BlockOutputs(state.x, cache, _first(bad, jnp.int32(steps), stage))


def keep_block(
    params: Params,
    text: TextKV,
    cache: KVCache,
    latents: Float[Array, "B 16 m H W"],
    rope: Float[Array, "2 S H/2"],
    context: Context,
    context_time: Float[Array, ""],
    *,
    config: DiTConfig,
    layout: CacheLayout,
    dtype: Any,
    implementation: Implementation = "auto",
) -> tuple[KVCache, Int[Array, "2"]]:
    """The cache with a block that is given, not made. As `denoise_block`; the first NaN or inf is of step n, behind the last."""
    attention = CachedAttention(layout, latents.shape[2], cache, context, implementation)
    inputs = Inputs(latents, text)  # of which the velocity reads the text alone
    velocity = functools.partial(guided_velocity, config, params, inputs, attention=attention, rope=rope, dtype=dtype)
    cache, stage = _kept(velocity, layout, cache, context, latents, context_time)
    return cache, _first(jnp.full(2, -1, jnp.int32), jnp.int32(len(layout.causal.steps)), stage)


def _kept(velocity, layout: CacheLayout, cache: KVCache, context: Context, latents: Array, time: Array):
    """The cache with a finished block, and the first stage of that pass with a NaN or inf."""
    own: dict[str, Array] = {}
    _, stage = velocity(latents, time, attention_taps=own)
    return layout.write(cache, KVCache(**own), jnp.asarray(context.slots)), stage


def _first(bad: Array, step: Array, stage: Array) -> Array:
    return jnp.where((bad[0] < 0) & (stage >= 0), jnp.stack([step, stage]), bad)


def _first_bad(bad: Array) -> tuple[int, int]:
    """(step, stage). Waits for the program that says it."""
    step, stage = (int(i) for i in jax.device_get(bad))
    return step, stage


_STATIC = ("config", "layout", "dtype", "implementation")
_denoise_block = jax.jit(denoise_block, static_argnames=_STATIC, donate_argnames="cache")
_keep_block = jax.jit(keep_block, static_argnames=_STATIC, donate_argnames="cache")


def device_of(params: Params) -> Any:
    """Where a model's weights are."""
    leaf = jax.tree.leaves(params)[0]
    return next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jax.local_devices()[0]


class Rollout:
    """A video as it is made: its cache, and the latent frame where the next block begins.

    Attributes:
      layout: of the cache.
      cache: keys and values so far, on the device.
      next_frame: latent frames so far.
      text: of the prompt that the next block follows; another may be set between blocks.
    """

    def __init__(
        self,
        config: DiTConfig,
        params: Params,
        text: TextKV,
        layout: CacheLayout,
        *,
        dtype: Any = jnp.float32,
        implementation: Implementation = "auto",
    ):
        if config.task != "t2v":
            raise NotImplementedError(f"a {config.task} model isn't causal; block diffusion is for t2v models")
        self.config, self.params, self.text, self.layout = config, params, text, layout
        self.dtype, self.implementation = jnp.dtype(dtype), implementation
        self.table = jax.tree.map(jnp.asarray, coefficients("lcm", block_levels(layout.causal)))
        self.next_frame = 0
        self._check_room()
        self.cache, self._finite = self._empty(), True
        self._unchecked: tuple[Array, int] | None = None

    def _empty(self) -> KVCache:
        return self.on_device(self._zeros())

    def _zeros(self) -> KVCache:
        heads, size = self.config.num_heads, self.config.head_dim
        return self.layout.zeros(self.config.num_layers, self.text.k.shape[1], heads, size, self.dtype)

    def _check_room(self) -> None:
        """Raises ValueError where the device can't hold the cache beside the weights."""
        device = device_of(self.params)
        limit = memory_limit(device)
        need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(self._zeros)))
        if limit is None or need <= (left := limit - memory_used(device)):
            return
        n, frames = self.causal.frames_per_block, self.layout.frames
        fit = max(0, left) * frames // need // n
        instead = f"a window, of {fit * n} frames or less" if fit else "a smaller height and width"
        raise ValueError(
            f"the cache of {frames} latent frames takes {need / 1e9:.1f} GB and the device has {max(0, left) / 1e9:.1f} GB left, "
            f"which {fit} blocks of {n} fit into; give {instead}"
        )

    def on_device(self, cache: KVCache) -> KVCache:
        """The cache where the weights are, and bound to that device as a block's results are: else the second block's program is
        another one, for arguments that are bound.
        """
        leaf = jax.tree.leaves(self.params)[0]
        return jax.device_put(cache, next(iter(leaf.devices()))) if isinstance(leaf, jax.Array) else cache

    @property
    def causal(self) -> CausalConfig:
        return self.layout.causal

    def next_shape(self) -> tuple[int, ...]:
        """Of the next block's latents, `(B, 16, m, H/8, W/8)`."""
        start, end = self.causal.block(self.next_frame)
        _, py, px = self.config.patch_size
        _, rows, columns = self.layout.slot.grid
        return self.text.k.shape[1], self.config.out_channels, end - start, rows * py, columns * px

    def block(
        self, noise: Array | np.ndarray, step_noise: Array | np.ndarray, *, check: bool = True
    ) -> Float[Array, "B 16 m H W"]:
        """The next block's latents, from noise (`next_shape`) and what is added after each step (`[n, *next_shape]`).

        One that is broken off is made again by the same call, with the same bits.

        check: False has the device begin and doesn't wait for it; `check` then waits, and has to be called before the next block.
        Raises: ValueError for noise of another shape, or no room for the block; FloatingPointError that names block, step and
          layer of the first NaN or inf: the rollout then can't go on, but for `restart`.
        """
        shape, steps = self.next_shape(), len(self.table.sigma)
        for name, value, want in (("noise", noise, shape), ("step_noise", step_noise, (steps, *shape))):
            if jnp.shape(value) != want:
                raise ValueError(f"{name} has shape {jnp.shape(value)}; the next block needs {want}")
        rope, context = self._place(shape)
        noise, step_noise = jnp.asarray(noise, jnp.float32), jnp.asarray(step_noise, jnp.float32)
        inputs = Inputs(noise, self.text, step_noise=step_noise)
        time = jnp.float32(self.causal.context_noise)
        # The cache at once: the one that was taken is no more.
        latents, self.cache, bad = _denoise_block(
            self.params, inputs, self.cache, rope, context, self.table, time, **self._static
        )
        if check:
            self._advance(bad, shape[2])
        else:
            self._unchecked = bad, shape[2]
            self.next_frame += shape[2]
        return latents

    def check(self) -> None:
        """Waits for the block that was begun without; nothing where none was. Raises FloatingPointError as `block`."""
        if self._unchecked is not None:
            bad, frames = self._unchecked
            self._raise_for(_first_bad(bad), self.next_frame - frames, frames)
            self._unchecked = None

    def give(self, latents: Float[Array | np.ndarray, "B 16 f H W"]) -> None:
        """Goes on from latents that are given, clean: of a clip that is continued, or of an image.

        Raises: ValueError where they are no whole blocks, or of another size; FloatingPointError as `block`.
        """
        given = jnp.asarray(latents, jnp.float32)
        if given.ndim != 5:
            raise ValueError(f"latents have shape {given.shape}; give [B, 16, F, H/8, W/8]")
        self.causal.check_frames(self.next_frame + given.shape[2], "given latent frames")
        self._check_size(given)
        self._keep(given, 0, 0.0)

    def recache(self, latents: Float[Array | np.ndarray, "B 16 f H W"], start: int) -> None:
        """Computes the keys and values of the last frames, from `start` to `next_frame`, again: under a `text` that is another now.

        Of the frames before them they attend the sink alone. One that is broken off has to be made again, whole.
        Raises: ValueError where `latents` aren't those frames, and `start` is no block's; FloatingPointError as `block`.
        """
        given, end = jnp.asarray(latents, jnp.float32), self.next_frame
        if given.ndim != 5 or start + given.shape[2] != end:
            raise ValueError(
                f"latents have shape {given.shape}; from latent frame {start} on this video has {end - start} so far"
            )
        self.causal.block(start)
        self._check_size(given)
        self.next_frame = start
        try:
            self._keep(given, start, self.causal.context_noise)
        finally:
            self.next_frame = end

    def _check_size(self, latents: Array) -> None:
        shape = self.next_shape()
        want = (*shape[:2], latents.shape[2], *shape[3:])
        if latents.shape != want:
            raise ValueError(f"given latents have shape {latents.shape}; this video needs {want}")

    def _keep(self, latents: Array, since: int, time: float) -> None:
        done = 0
        while done < latents.shape[2]:
            shape = self.next_shape()
            part = latents[:, :, done : done + shape[2]]
            rope, context = self._place(shape, since)
            self.cache, bad = _keep_block(
                self.params, self.text, self.cache, part, rope, context, jnp.float32(time), **self._static
            )
            self._advance(bad, shape[2])
            done += shape[2]

    def restart(self) -> None:
        """Forgets all frames: the next block is the first. They stay in the cache, where nothing attends them any more."""
        self.next_frame = 0
        if not self._finite:  # what isn't attended has to be finite all the same
            self.cache, self._finite = self._empty(), True

    @property
    def _static(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "layout": self.layout,
            "dtype": self.dtype,
            "implementation": self.implementation,
        }

    def _place(self, shape: tuple[int, ...], since: int = 0) -> tuple[Array, Context]:
        """What tells the program where in the video the block is."""
        grid = token_grid(shape[2:], self.config.patch_size)
        return rope_table(grid, self.config.head_dim, self.next_frame), self.layout.context(self.next_frame, since)

    def _advance(self, bad: Array, frames: int) -> None:
        self._raise_for(_first_bad(bad), self.next_frame, frames)
        self.next_frame += frames

    def _raise_for(self, bad: tuple[int, int], start: int, frames: int) -> None:
        step, stage = bad
        if step < 0:
            return
        self._finite, self.next_frame, self._unchecked = False, start, None
        n = len(self.table.sigma)
        where = "the pass over the finished block" if step == n else f"step {step + 1} of {n}"
        raise FloatingPointError(
            f"NaN or inf in the block of latent frames {start} to {start + frames - 1}, in {where}, first in "
            f"{stage_name(self.config, stage)}; try dtype='float32', and check the weights and the inputs for NaN"
        )
