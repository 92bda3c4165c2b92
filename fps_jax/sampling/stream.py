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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from fps_jax.causal import CausalConfig
from fps_jax.checkpoints.open import open_model
from fps_jax.choices import CausalPreset, KVCacheFormat, Switch, check_choice, strongest
from fps_jax.media.video import video_to_uint8
from fps_jax.models.vae import DecodeStream
from fps_jax.profiling.stages import stage
from fps_jax.sampling.given import given_latent_frames, given_latents
from fps_jax.sampling.pipeline import WanPipeline
from fps_jax.sampling.rollout import Rollout, text_kv
from fps_jax.sampling.snapshot import load_session, save_session
from fps_jax.sampling.stream_plan import StreamPlan, causal_of, check_prompt
from fps_jax.sizes import Shape3

log = logging.getLogger("fps_jax")


class Block(NamedTuple):
    """What a stream yields.

    Attributes:
      index: of the block in the stream, from 0.
      frames: the video's next frames: of the first latent frame of a video 1, of each other 4.
      latents: normalised.
      prompt: that the block was made by.
      seconds: what each stage took, by its name: 'denoise' (all steps, and the pass that fills the cache) and 'decode'.
      given: it was not made, but is of the frames that the stream was given.
    """

    index: int
    frames: UInt8[np.ndarray, "T H W 3"]
    latents: Float[np.ndarray, "16 m H/8 W/8"]
    prompt: str
    seconds: dict[str, float]
    given: bool = False


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
        cls,
        path: str | os.PathLike,
        *,
        causal: CausalConfig | CausalPreset | None = None,
        dtype: str = "bfloat16",
        show_progress: bool | None = None,
    ) -> "CausalPipeline":
        """Load a checkpoint.

        Args:
          path, dtype, show_progress: as of `WanPipeline.from_pretrained`.
          causal: how it makes its blocks, or the name of a preset; None for what the checkpoint says. No torch file says it.
        Raises: as `WanPipeline.from_pretrained`; ValueError where nothing says how blocks are made, or the model isn't t2v.
        """
        model = open_model(path)
        causal = causal_of(model.config, causal)  # told before the weights are read, which can take minutes
        return cls(WanPipeline.from_pretrained(model.directory, dtype=dtype, show_progress=show_progress), causal)

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
        kv_cache: KVCacheFormat = "same",
        given: Any = None,
    ) -> "Session":
        """A stream whose prompt may change while it runs.

        Args:
          prompt: a text.
          seed: of all noise. Noise is a function of seed, latent frame and step.
          blocks: how many to make; None for no end. A model without a window of its own then has one of 21 latent frames, as many
            as it was trained on; with `blocks` it attends all.
          height, width: pixels, multiples of 16; None for the checkpoint's own.
          tile: tokens of a tile, along frames a divisor of what enters and leaves the cache together; None for the proposed one.
          window: key tiles along rows and columns, within the frames that a block attends (FPSAttention); None for all.
          kv_cache: what is kept of the frames so far: 'same', keys and values in the compute dtype; 'fp8', their e4m3 codes and
            scales, half of bf16's bytes, and self-attention is then FP8 too.
          given: what the video begins with, and goes on from: frames `[T, H, W, 3]` (uint8, or floats in [0, 1]; another size is
            resized to cover the video's and cropped around its centre), a picture (array, PIL image or path), or latents
            `[16, f, H/8, W/8]` as `Block.latents`. They have to be whole blocks, and come out of the stream first, as the VAE
            shows them.
        Raises: ValueError for an argument that breaks a rule; OSError for a picture that can't be read.
        """
        return Session(
            self,
            prompt,
            seed=seed,
            blocks=blocks,
            height=height,
            width=width,
            tile=tile,
            window=window,
            kv_cache=kv_cache,
            given=given,
        )

    def load_session(self, path: str | os.PathLike) -> "Session":
        """A session that `Session.save` wrote, which goes on with the same bits where the weights are the same.

        Raises: FileNotFoundError; ValueError for a file that is none, is damaged, or is of another model or other settings.
        """
        return load_session(self, path)


@dataclasses.dataclass
class _Undecoded:
    """A block whose latents are made and counted, until its frames are handed out. seconds: of its denoising.

    video: float32 in [-1, 1], once the VAE has gone on past it.
    """

    index: int
    latents: Array | np.ndarray
    prompt: str
    seconds: float
    given: bool
    video: np.ndarray | None = None


class Session(Iterator[Block]):
    """A stream: an iterator of `Block`. Between blocks its prompt may be changed, and it may be written down.

    What is broken off (Ctrl-C, no memory) leaves no gap: the next call goes on with that block.

    Attributes:
      rollout, decoder: where the latents and the frames come from.
      made: latent frames so far, those before a cut among them.
      index: blocks so far, of those given and those made.
      blocks: of both, when the stream ends; None for no end.
      given: latents that are still to be given to the rollout, a block at a call; None once all are. given_frames: how many there
        were, latent frames.
      finished: (first latent frame, latents) of the blocks that the next one attends behind the sink.
      arguments: what it was made with, but for the prompt and what it was given: `CausalPipeline.session(prompt, **arguments)`.
    """

    def __init__(
        self,
        pipeline: CausalPipeline,
        prompt: str,
        *,
        seed: int,
        blocks: int | None,
        height: int | None,
        width: int | None,
        tile: Shape3 | None,
        window: tuple[int, int] | None,
        kv_cache: KVCacheFormat = "same",
        given: Any = None,
        given_frames: int | None = None,
    ):
        """given_frames: of a session that was saved, how many latent frames it was given; they come from elsewhere."""
        wan, causal = pipeline.wan, pipeline.causal
        size = (height, width)
        count = given_latent_frames(given, wan.config, causal) if given_frames is None else given_frames
        plan = StreamPlan.build(
            wan.config,
            causal,
            prompt,
            seed=seed,
            blocks=blocks,
            given=count,
            size=size,
            tile=tile,
            window=window,
            kv_cache=kv_cache,
        )
        if blocks is None and causal.window is None:
            log.info("a stream without end: a block attends the last %d latent frames", plan.layout.frames)
        self.latent_shape = plan.latent_shape
        self.pipeline, self.seed = pipeline, int(seed)
        self.blocks = None if blocks is None else int(blocks) + (len(causal.blocks(count)) if count else 0)
        self.arguments = {
            "seed": self.seed,
            "blocks": None if blocks is None else int(blocks),
            "height": None if height is None else int(height),
            "width": None if width is None else int(width),
            "tile": None if tile is None else tuple(int(n) for n in tile),
            "window": None if window is None else tuple(int(n) for n in window),
            "kv_cache": kv_cache,
        }
        self._prompt = prompt
        self._pending: tuple[str, Switch, Array] | None = None
        self._applying: tuple[str, Switch, Array] | None = None  # of `_pending`, what a block is beginning with
        self._changing = threading.Lock()
        self._working = threading.RLock()  # a block is made, or the session is written down
        self._going = threading.Event()
        self._going.set()
        self.given_frames = count
        self.given = None if given is None else given_latents(given, wan, plan.latent_shape)
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
        pending = self._pending  # once: another thread may apply it
        return None if pending is None else pending[:2]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the session down, to go on with `CausalPipeline.load_session`: a .npz, about as large as the cache.

        Raises: OSError naming the path; ValueError while a block waits whose decoding was broken off.
        """
        with self._working:  # not beside a block that another thread is making
            if self._undecoded is not None:
                raise ValueError(
                    f"block {self._undecoded.index} is not decoded yet; take it with next() before you save"
                )
            save_session(self, path)

    @property
    def prompt(self) -> str:
        """Of the next block. Setting it is `switch(prompt, "continue")`."""
        pending = self.pending
        return self._prompt if pending is None else pending[0]

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self.switch(prompt)

    def switch(self, prompt: str, how: Switch = "continue") -> None:
        """Another prompt from the next block on. Another thread may call it while a block is made.

        Of several before a block begins the newest is it, in the strongest of their ways (continue, recache, cut): a cut that
        another prompt follows is a cut still.

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
            earlier = self._pending
            if earlier is not None and earlier is not self._applying:
                pending = (prompt, strongest((earlier[1], how)), pending[2])
            self._pending = pending

    def pause(self) -> None:
        """Has the next block wait until `resume`, in the thread that asks for it; another one calls both.

        Whoever asks for blocks in the thread that would pause them has only not to ask. A block that is being made is finished, and
        a paused session can be saved.
        """
        self._going.clear()

    def resume(self) -> None:
        """Ends a pause."""
        self._going.set()

    def __next__(self) -> Block:
        self._going.wait()
        with self._working:
            return self._next()

    def _next(self) -> Block:
        if self._undecoded is None:
            if self.blocks is not None and self.index == self.blocks:
                raise StopIteration
            if self._pending is not None:
                with stage("switch prompt"):
                    self._apply(self._pending)
            with stage("denoise" if self.given is None else "give", self.index):
                self._undecoded = self._denoise() if self.given is None else self._give(self.given)
        made = self._undecoded
        started, latents = time.perf_counter(), np.asarray(made.latents)
        with stage("decode", made.index):
            if made.video is None:
                made.video = self.decoder.push(latents)
            frames = video_to_uint8(np.clip(0.5 * made.video + 0.5, 0, 1))
        seconds = {"denoise": made.seconds, "decode": time.perf_counter() - started}
        self._undecoded = None
        return Block(made.index, frames, latents[0], made.prompt, seconds, made.given)

    def _denoise(self) -> _Undecoded:
        """The next block's latents. The rollout and what is counted here move together, or not at all."""
        started = time.perf_counter()
        shape, steps = self.rollout.next_shape(), len(self.pipeline.causal.steps)
        noise = block_noise(self.seed, self.made, steps, shape)
        return self._counted(self.rollout.block(noise[0], noise[1:]), started, given=False)

    def _give(self, given: np.ndarray) -> _Undecoded:
        """The first block of what is given, as `_denoise`."""
        started = time.perf_counter()
        frames = self.rollout.next_shape()[2]
        self.rollout.give(given[:, :, :frames])
        rest = given[:, :, frames:]
        self.given = rest if rest.shape[2] else None
        return self._counted(given[:, :, :frames], started, given=True)

    def _counted(self, latents: Array | np.ndarray, started: float, *, given: bool) -> _Undecoded:
        """A block that the rollout has finished."""
        made = _Undecoded(self.index, latents, self._prompt, time.perf_counter() - started, given)
        frames = latents.shape[2]
        self.finished.append((self.rollout.next_frame - frames, latents))
        self.finished = [part for part in self.finished if part[0] + part[1].shape[2] > self._since]
        self.made += frames
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
        with self._changing:
            if self._pending is not None:
                pending = self._pending
            self._applying = pending
        try:
            self._change(*pending)
        except BaseException:
            self._applying = None
            raise
        with self._changing:  # a newer one may have come meanwhile
            self._prompt, self._applying = pending[0], None
            self._pending = None if self._pending is pending else self._pending

    def _change(self, prompt: str, how: Switch, text: Array) -> None:
        self.rollout.text = self._kv(text)
        if how == "cut":
            self._drop_given()
            self.rollout.restart()
            self.decoder.restart()
            self.finished.clear()
        elif how == "recache" and self.finished:
            latents = np.concatenate([part for _, part in self.finished], axis=2)
            self.rollout.recache(latents, self.finished[0][0])

    def _drop_given(self) -> None:
        """What is still to be given belongs to the video that ends."""
        if self.given is None:
            return
        if self.blocks is not None:
            begin = self.rollout.next_frame
            self.blocks -= sum(start >= begin for start, _ in self.rollout.causal.blocks(begin + self.given.shape[2]))
        self.given = None


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
