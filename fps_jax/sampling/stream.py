"""CausalPipeline: a prompt in, video out block after block, without end; and the session behind a stream.

Memory is constant in the length of the video: the cache is a ring, the VAE's is of a chunk, and nothing else is kept.
"""

import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from fps_jax.attention.cache import CacheLayout
from fps_jax.causal import CAUSAL_PRESETS, CausalConfig
from fps_jax.checkpoints.open import open_model
from fps_jax.choices import CausalPreset, Switch, check_choice, check_text
from fps_jax.config import WanConfig
from fps_jax.media.video import video_to_uint8
from fps_jax.models.vae import DecodeStream
from fps_jax.sampling.pipeline import WanPipeline
from fps_jax.sampling.request import Request
from fps_jax.sampling.rollout import Rollout, text_kv
from fps_jax.sampling.snapshot import load_session, save_session
from fps_jax.sizes import Shape3, check_integer, latent_grid, token_grid

log = logging.getLogger("fps_jax")

TRAINED_FRAMES = 21  # latent frames of the videos that Self-Forcing and CausVid were trained on


class Block(NamedTuple):
    """What a stream yields.

    Attributes:
      index: of the block in the stream, from 0.
      frames: the video's next frames: of the first latent frame of a video 1, of each other 4.
      latents: normalised.
      prompt: that the block was made by.
      seconds: what each stage took, by its name: 'denoise' (all steps, and the pass that fills the cache) and 'decode'.
    """

    index: int
    frames: UInt8[np.ndarray, "T H W 3"]
    latents: Float[np.ndarray, "16 m H/8 W/8"]
    prompt: str
    seconds: dict[str, float]


@dataclasses.dataclass
class CausalPipeline:
    """A Wan2.1 checkpoint that was made causal (Self-Forcing, CausVid), and makes video block after block.

    Attributes:
      wan: the checkpoint itself.
      causal: its blocks, steps and window.
    """

    wan: WanPipeline
    causal: CausalConfig

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, causal: CausalConfig | CausalPreset | None = None, dtype: str = "bfloat16"
    ) -> "CausalPipeline":
        """Load a checkpoint.

        Args:
          path, dtype: as of `WanPipeline.from_pretrained`.
          causal: how it makes its blocks, or the name of a preset; None for what the checkpoint says. No torch file says it.
        Raises: as `WanPipeline.from_pretrained`; ValueError where nothing says how blocks are made, or the model isn't t2v.
        """
        model = open_model(path)
        causal = causal_of(model.config, causal)  # told before the weights are read, which can take minutes
        return cls(WanPipeline.from_pretrained(model.directory, dtype=dtype), causal)

    @classmethod
    def of(cls, wan: WanPipeline, causal: CausalConfig | CausalPreset | None = None) -> "CausalPipeline":
        """The same from a pipeline that is loaded. Raises ValueError as `from_pretrained`."""
        return cls(wan, causal_of(wan.config, causal))

    def save_pretrained(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write the checkpoint in our format, with how it makes its blocks: it is then loaded without `causal`.

        Raises: as `WanPipeline.save_pretrained`.
        """
        config = dataclasses.replace(self.wan.config, causal=self.causal)
        dataclasses.replace(self.wan, config=config).save_pretrained(path, overwrite=overwrite)

    def stream(self, prompt: str, *, seed: int = 0, blocks: int | None = None, **options: Any) -> Iterator[Block]:
        """The video, block after block, made as they are taken.

        Args:
          prompt, seed, blocks, options: as of `session`.
        Raises: as `session`; FloatingPointError that names block, step and layer of a NaN or inf.
        """
        return self.session(prompt, seed=seed, blocks=blocks, **options)

    def session(
        self,
        prompt: str,
        *,
        seed: int = 0,
        blocks: int | None = None,
        height: int | None = None,
        width: int | None = None,
        tile: Shape3 | None = None,
        window: tuple[int, int] | None = None,
    ) -> "Session":
        """A stream whose prompt may change while it runs.

        Args:
          prompt: a text.
          seed: of all noise. Noise is a function of seed, latent frame and step.
          blocks: how many; None for no end. A model without a window of its own then has one of 21 latent frames, as many as it
            was trained on; with `blocks` it attends all.
          height, width: pixels, multiples of 16; None for the checkpoint's own.
          tile: tokens of a tile, along frames a divisor of what enters and leaves the cache together; None for the proposed one.
          window: key tiles along rows and columns, within the frames that a block attends (FPSAttention); None for all.
        Raises: ValueError for an argument that breaks a rule.
        """
        return Session(self, prompt, seed, blocks, (height, width), tile, window)

    def load_session(self, path: str | os.PathLike) -> "Session":
        """A session that `Session.save` wrote, which goes on with the same bits where the weights are the same.

        Raises: FileNotFoundError; ValueError for a file that is none, is damaged, or is of another model or other settings.
        """
        return load_session(self, path)


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """What a stream will be, known from a checkpoint's config before its weights are read.

    Attributes:
      latent_shape: of one latent frame, `(1, 16, 1, H/8, W/8)`.
      layout: of the cache.
    """

    latent_shape: tuple[int, ...]
    layout: CacheLayout

    @classmethod
    def build(
        cls,
        config: WanConfig,
        causal: CausalConfig,
        prompt: str,
        *,
        seed: int = 0,
        blocks: int | None = None,
        size: tuple[int | None, int | None] = (None, None),
        tile: Shape3 | None = None,
        window: tuple[int, int] | None = None,
    ) -> "StreamPlan":
        """Checks the arguments of `CausalPipeline.session`; size: height and width. Raises ValueError as that does."""
        if blocks is not None and (not isinstance(blocks, Integral) or isinstance(blocks, bool) or blocks < 1):
            raise ValueError(f"blocks={blocks!r} is not a whole number of 1 or more; None is a stream without end")
        check_prompt(prompt)
        check_integer("seed", seed)
        for name, sizes in (("tile", tile), ("window", window)):
            for n in () if sizes is None else sizes:
                check_integer(name, n)
        request = Request(prompt=prompt, seed=seed, height=size[0], width=size[1], num_frames=1).filled(config)
        assert request.height is not None
        assert request.width is not None
        num_frames = None
        if blocks is not None:
            num_frames = causal.frames_per_block * (int(blocks) - causal.first_frame_alone) + causal.first_frame_alone
        elif causal.window is None:
            n = causal.frames_per_block
            causal = dataclasses.replace(causal, window=max(TRAINED_FRAMES // n, 2) * n)
        latent_shape = (1, config.dit.out_channels, *latent_grid(int(request.height), int(request.width), 1))
        space = token_grid(latent_shape[2:], config.dit.patch_size)[1:]
        return cls(latent_shape, CacheLayout.build(causal, space, num_frames=num_frames, tile=tile, window=window))


def causal_of(config: WanConfig, causal: CausalConfig | CausalPreset | None) -> CausalConfig:
    """How a checkpoint of this config makes its blocks: as `causal` says, or as the checkpoint itself does.

    Raises: ValueError where neither says it, and for a model that isn't t2v.
    """
    if isinstance(causal, str):
        check_choice("causal", causal, CausalPreset)
        causal = CAUSAL_PRESETS[causal]
    if causal is not None and not isinstance(causal, CausalConfig):
        raise ValueError(f"causal={causal!r} is not a CausalConfig or the name of a preset")
    if config.task != "t2v":
        raise ValueError(f"this is a {config.task} model; block diffusion is for t2v models")
    causal = causal or config.causal
    if causal is None:
        names = " or ".join(f"causal={name!r}" for name in CAUSAL_PRESETS)
        raise ValueError(f"this checkpoint doesn't say how it makes blocks; give {names}, or a CausalConfig (--preset)")
    return causal


@dataclasses.dataclass
class _Undecoded:
    """A block whose latents are made and counted, until its frames are handed out. seconds: of its denoising.

    video: float32 in [-1, 1], once the VAE has gone on past it.
    """

    index: int
    latents: Array
    prompt: str
    seconds: float
    video: np.ndarray | None = None


class Session(Iterator[Block]):
    """A stream: an iterator of `Block`. Between blocks its prompt may be changed, and it may be written down.

    What is broken off (Ctrl-C, no memory) leaves no gap: the next call goes on with that block.

    Attributes:
      rollout, decoder: where the latents and the frames come from.
      made: latent frames so far, those before a cut among them.
      index: blocks so far.
      finished: (first latent frame, latents) of the blocks that the next one attends behind the sink.
      arguments: what it was made with, but for the prompt: `CausalPipeline.session(prompt, **arguments)`.
    """

    def __init__(
        self,
        pipeline: CausalPipeline,
        prompt: str,
        seed: int,
        blocks: int | None,
        size: tuple[int | None, int | None],
        tile: Shape3 | None,
        window: tuple[int, int] | None,
    ):
        wan, causal = pipeline.wan, pipeline.causal
        plan = StreamPlan.build(
            wan.config, causal, prompt, seed=seed, blocks=blocks, size=size, tile=tile, window=window
        )
        if blocks is None and causal.window is None:
            log.info("a stream without end: a block attends the last %d latent frames", plan.layout.frames)
        self.latent_shape = plan.latent_shape
        self.pipeline, self.seed, self.blocks = pipeline, int(seed), None if blocks is None else int(blocks)
        self.arguments = {
            "seed": self.seed,
            "blocks": self.blocks,
            "height": None if size[0] is None else int(size[0]),
            "width": None if size[1] is None else int(size[1]),
            "tile": None if tile is None else tuple(int(n) for n in tile),
            "window": None if window is None else tuple(int(n) for n in window),
        }
        self._prompt = prompt
        self._pending: tuple[str, Switch, Array] | None = None
        self._changing = threading.Lock()
        text = self._kv(wan.encode_prompt(prompt))
        self.rollout = Rollout(wan.config.dit, wan.params["dit"], text, plan.layout, dtype=wan.dtype)
        self.decoder = DecodeStream(wan.config.vae, wan.params["vae"])
        self.made = self.index = 0
        self.finished: list[tuple[int, Array | np.ndarray]] = []
        self._undecoded: _Undecoded | None = None

    def _kv(self, text: Array) -> Any:
        wan = self.pipeline.wan
        return text_kv(wan.config.dit, wan.params["dit"], text, dtype=wan.dtype)

    @property
    def followed(self) -> str:
        """The prompt of the last block."""
        return self._prompt

    @property
    def pending(self) -> tuple[str, Switch] | None:
        """The prompt that the next block begins with, and how; None where it goes on with `followed`."""
        return None if self._pending is None else self._pending[:2]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the session down, to go on with `CausalPipeline.load_session`: a .npz, about as large as the cache.

        Raises: OSError naming the path; ValueError while a block waits whose decoding was broken off.
        """
        if self._undecoded is not None:
            raise ValueError(f"block {self._undecoded.index} is not decoded yet; take it with next() before you save")
        save_session(self, path)

    @property
    def prompt(self) -> str:
        """Of the next block. Setting it is `switch(prompt, "continue")`."""
        return self._prompt if self._pending is None else self._pending[0]

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self.switch(prompt)

    def switch(self, prompt: str, how: Switch = "continue") -> None:
        """Another prompt from the next block on; the newest one wins. Another thread may call it while a block is made.

        Args:
          how: 'continue' leaves the cache as it is, made under the old prompt. 'recache' computes what the next block attends again
            under the new one (LongLive, arXiv 2509.22622), apart from a sink that has left the window behind. 'cut' begins another
            video.
        Raises: ValueError for a prompt that is none; the stream is then as it was.
        """
        check_choice("how", how, Switch)
        check_prompt(prompt)
        pending = (prompt, how, self.pipeline.wan.encode_prompt(prompt))
        with self._changing:
            self._pending = pending

    def __next__(self) -> Block:
        if self._undecoded is None:
            if self.blocks is not None and self.index == self.blocks:
                raise StopIteration
            if self._pending is not None:
                self._apply(self._pending)
            self._undecoded = self._denoise()
        made = self._undecoded
        started, latents = time.perf_counter(), np.asarray(made.latents)
        if made.video is None:
            made.video = self.decoder.push(latents)
        frames = video_to_uint8(np.clip(0.5 * made.video + 0.5, 0, 1))
        seconds = {"denoise": made.seconds, "decode": time.perf_counter() - started}
        self._undecoded = None
        return Block(made.index, frames, latents[0], made.prompt, seconds)

    def _denoise(self) -> "_Undecoded":
        """The next block's latents. The rollout and what is counted here move together, or not at all."""
        started = time.perf_counter()
        shape, steps = self.rollout.next_shape(), len(self.pipeline.causal.steps)
        noise = block_noise(self.seed, self.made, steps, shape)
        latents = self.rollout.block(noise[0], noise[1:])
        made = _Undecoded(self.index, latents, self._prompt, time.perf_counter() - started)
        self.finished.append((self.rollout.next_frame - shape[2], latents))
        self.finished = [part for part in self.finished if part[0] + part[1].shape[2] > self._since]
        self.made += shape[2]
        self.index += 1
        return made

    @property
    def _since(self) -> int:
        """The first latent frame behind the sink that the next block attends."""
        causal = self.rollout.causal
        _, end = causal.block(self.rollout.next_frame)
        return 0 if causal.window is None or end <= causal.window else end - (causal.window - causal.sink)

    def _apply(self, pending: tuple[str, Switch, Array]) -> None:
        """Does the change. One that is broken off is still to be made, and is then made whole."""
        prompt, how, text = pending
        self.rollout.text = self._kv(text)
        if how == "cut":
            self.rollout.restart()
            self.decoder.restart()
            self.finished.clear()
        elif how == "recache" and self.finished:
            latents = np.concatenate([part for _, part in self.finished], axis=2)
            self.rollout.recache(latents, self.finished[0][0])
        with self._changing:  # a newer one may have come meanwhile
            self._prompt, self._pending = prompt, None if self._pending is pending else self._pending


def check_prompt(prompt: Any) -> None:
    """Raises ValueError for what is no text, or an empty one."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt={prompt!r} is not a text; give a few words")
    check_text("prompt", prompt)


def block_noise(seed: int, start: int, steps: int, shape: tuple[int, ...]) -> Float[Array, "n+1 1 16 m H W"]:
    """What a block starts from, and what is added after each of its steps; after the last, zeros.

    A function of seed, latent frame and step alone: whatever the block's size, and wherever a session was taken up again.

    Args:
      start: latent frame, counted from the beginning of the stream.
      shape: of the block's latents, `(1, 16, m, H/8, W/8)`.
    """
    with jax.threefry_partitionable(True):
        return _block_noise(jax.random.key(seed, impl="threefry2x32"), jnp.int32(start), steps, shape)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _block_noise(key, start, steps, shape):
    def draw(step, frame):
        own = jax.random.fold_in(jax.random.fold_in(key, start + frame), step)
        return jax.random.normal(own, (shape[1], *shape[3:]), jnp.float32)

    frames = jnp.arange(shape[2], dtype=jnp.int32)
    drawn = jax.vmap(lambda step: jax.vmap(lambda frame: draw(step, frame), out_axes=1)(frames))(
        jnp.arange(steps, dtype=jnp.int32)
    )
    return jnp.concatenate([drawn, jnp.zeros_like(drawn[:1])])[:, None]
