"""A stream of block diffusion while it runs: what it has made, whom it follows next, and what of it is still to be decoded."""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array

from fps_jax.choices import KVCacheFormat, Switch, check_choice, strongest
from fps_jax.media.video import video_to_uint8
from fps_jax.models.vae import DecodeStream
from fps_jax.profiling.stages import stage
from fps_jax.sampling.block import Begun, Block, Place
from fps_jax.sampling.block_noise import block_noise
from fps_jax.sampling.given import given_latent_frames, given_latents
from fps_jax.sampling.rollout import Rollout, device_of, text_kv
from fps_jax.sampling.room import enough_memory, memory_limit
from fps_jax.sampling.snapshot import save_session
from fps_jax.sampling.stream_plan import StreamPlan, check_prompt
from fps_jax.sizes import Shape3

if TYPE_CHECKING:
    from fps_jax.sampling.pipeline import WanPipeline
    from fps_jax.sampling.stream import CausalPipeline

log = logging.getLogger("fps_jax")


class Session(Iterator[Block]):
    """A stream: an iterator of `Block`. Between blocks its prompt may be changed, and it may be written down.

    What is broken off (Ctrl-C, no memory) leaves no gap: the next call goes on with that block. `ahead` gives the same blocks, and
    has the device begin the next one while the frames of this one are used. Where the device has no memory left for what is to be
    done, MemoryError says in one line what would take less.

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
        pipeline: "CausalPipeline",
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
        self._enough_memory = functools.partial(_enough_memory, wan, plan, kv_cache)
        with self._enough_memory():
            self.given = None if given is None else given_latents(given, wan, plan.latent_shape)
            text = self._kv(wan.encode_prompt(prompt))
            self.rollout = Rollout(wan.config.dit, wan.params["dit"], text, plan.layout, dtype=wan.dtype)
        self.decoder = DecodeStream(wan.config.vae, wan.params["vae"])
        self.made = self.index = 0
        self.finished: list[tuple[int, Array | np.ndarray]] = []
        self._begun: tuple[Begun, ...] = ()  # of the two that `ahead` has begun at most, the older first

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

        Raises: OSError naming the path; ValueError while a block is begun that wasn't handed out: one whose decoding was broken
          off, or that `ahead` began.
        """
        with self._working:  # not beside a block that another thread is making
            if self._begun:
                raise ValueError(
                    f"block {self._begun[0].index} is not decoded yet; take it with next() before you save"
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
        Raises: ValueError for a prompt that is none; the stream is then as it was. MemoryError as next().
        """
        check_choice("how", how, Switch)
        check_prompt(prompt)
        with self._enough_memory():
            pending = (prompt, how, self.pipeline.wan.encode_prompt(prompt))
        with self._changing:
            earlier = self._pending
            if earlier is not None and earlier is not self._applying:
                pending = (prompt, strongest((earlier[1], how)), pending[2])
            self._pending = pending

    def note(self, prompt: str) -> str | None:
        """What whoever wrote a prompt should know of it, as `WanPipeline.prompt_note`; it is followed all the same."""
        return self.pipeline.wan.prompt_note(prompt)

    def pause(self) -> None:
        """Has the next block wait until `resume`, in the thread that asks for it; another one calls both.

        Whoever asks for blocks in the thread that would pause them has only not to ask. A block that is being made is finished, and
        a paused session can be saved, where no block is begun.
        """
        self._going.clear()

    def resume(self) -> None:
        """Ends a pause."""
        self._going.set()

    def __next__(self) -> Block:
        self._going.wait()
        with self._working, self._enough_memory():
            if not self._begun and not self._begin(check=True):
                raise StopIteration
            return self._hand_out(self._finish())

    def ahead(self, before: Callable[[], object] | None = None) -> Iterator[Block]:
        """The same blocks, each begun once the device was told to decode the one before it: it works while their frames are used.

        A change of prompt is of the next block to begin, so of the second after the one that was handed out last.

        Args:
          before: called when a block is about to begin, with `begun_frames` before it; may change the prompt.
        Raises: as next(), of a block that can't begin once the one before it is handed out. After that, or where the loop is left,
          next() or another `ahead` goes on without a gap.
        """
        while True:
            self._going.wait()
            failed = None
            with self._working, self._enough_memory():
                if not self._begun and not self._begin(check=False, before=before):
                    return
                with stage("decode", self._begun[0].index):
                    self._decode(self._begun[0])
                if len(self._begun) == 1:
                    try:
                        with self._enough_memory():
                            self._begin(check=False, before=before)
                    except Exception as error:  # of the next block: this one is made
                        failed = error
                block = self._hand_out(self._finish())
            yield block
            if failed is not None:
                raise failed

    @property
    def begun_frames(self) -> int:
        """Frames of the blocks that are begun and not handed out."""
        return sum(one.frames for one in self._begun)

    def _begin(self, *, check: bool, before: Callable[[], object] | None = None) -> bool:
        """Begins a block; False where there are no more. check: waits until it is denoised."""
        if self.blocks is not None and self.index == self.blocks:
            return False
        if before is not None:
            before()
        if self._pending is not None:
            with stage("switch prompt"):
                self._apply(self._pending)
        place, begun = self._place, self._begun
        try:
            with stage("denoise" if self.given is None else "give", self.index):
                made = self._denoise(check) if self.given is None else self._give(self.given)
            self._begun = (*begun, made)
        except BaseException:  # Ctrl-C between any two lines of it: as if it had never begun
            self._go_back(place, begun)
            raise
        return True

    @property
    def _place(self) -> Place:
        return Place(self.rollout.next_frame, self.made, self.index, self.finished, self.given)

    def _go_back(self, place: Place, begun: tuple[Begun, ...]) -> None:
        self.rollout.next_frame, self.made, self.index, self.finished, self.given = place
        self._begun = begun

    def _decode(self, made: Begun) -> None:
        """Has the device decode a block, once it is denoised."""
        if made.seconds is None:
            with stage("denoise", made.index):
                try:
                    self.rollout.check()
                except FloatingPointError:  # as if it had never begun
                    self._go_back(made.before, ())
                    raise
            made.seconds = time.perf_counter() - made.started
        if len(made.decoding) < made.latents.shape[2]:
            self.decoder.begin(np.asarray(made.latents), made.decoding)

    def _finish(self) -> Block:
        """The oldest block that is begun, whole."""
        made, started = self._begun[0], time.perf_counter()
        with stage("decode", made.index):
            self._decode(made)
            assert made.seconds is not None
            video = self.decoder.frames(made.decoding)
            frames = video_to_uint8(np.clip(0.5 * video + 0.5, 0, 1))
        seconds = {"denoise": made.seconds, "decode": time.perf_counter() - started}
        return Block(made.index, frames, np.asarray(made.latents)[0], made.prompt, seconds, made.given)

    def _hand_out(self, block: Block) -> Block:
        self._begun = self._begun[1:]
        return block

    def _denoise(self, check: bool) -> Begun:
        started, before = time.perf_counter(), self._place
        shape, steps = self.rollout.next_shape(), len(self.pipeline.causal.steps)
        noise = block_noise(self.seed, self.made, steps, shape)
        latents = self.rollout.block(noise[0], noise[1:], check=check)
        return self._counted(latents, before, started, done=check, given=False)

    def _give(self, given: np.ndarray) -> Begun:
        started, before = time.perf_counter(), self._place
        frames = self.rollout.next_shape()[2]
        self.rollout.give(given[:, :, :frames])
        rest = given[:, :, frames:]
        self.given = rest if rest.shape[2] else None
        return self._counted(given[:, :, :frames], before, started, done=True, given=True)

    def _counted(self, latents: Array | np.ndarray, before: Place, started: float, *, done: bool, given: bool) -> Begun:
        """A block that the rollout has begun, or is done with."""
        count, start = latents.shape[2], before.next_frame
        frames = 4 * count - (3 if start == 0 else 0)  # of a video's first latent frame comes one
        seconds = time.perf_counter() - started if done else None
        made = Begun(self.index, latents, self._prompt, given, frames, started, before, seconds)
        self.finished = [
            part for part in (*self.finished, (start, latents)) if part[0] + part[1].shape[2] > self._since
        ]
        self.made += count
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
        try:
            self._applying = pending
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
            self.finished = []
        elif how == "recache" and self.finished:
            latents = np.concatenate([part for _, part in self.finished], axis=2)
            self.rollout.recache(latents, self.finished[0][0])

    def _drop_given(self) -> None:
        """What is still to be given belongs to the video that ends."""
        if self.given is None:
            return
        begin, blocks = self.rollout.next_frame, self.blocks
        if blocks is not None:
            blocks -= sum(start >= begin for start, _ in self.rollout.causal.blocks(begin + self.given.shape[2]))
        self.blocks, self.given = blocks, None


def _enough_memory(wan: "WanPipeline", plan: StreamPlan, kv_cache: KVCacheFormat) -> Any:
    """Raises MemoryError, in one line, where XLA finds no room for what of a stream is done in the block."""

    def fix() -> str:
        n = plan.layout.causal.frames_per_block
        ways = [f"a window below {plan.layout.frames} latent frames"] if plan.layout.frames > n else []
        ways += ["kv_cache='fp8'"] if kv_cache == "same" else []
        return f"use {' or '.join([*ways, 'a smaller height and width'])}"

    _, _, _, rows, columns = plan.latent_shape
    what = f"a stream of {8 * rows} x {8 * columns} pixels"
    return enough_memory(what, lambda: memory_limit(device_of(wan.params["dit"])), fix)
