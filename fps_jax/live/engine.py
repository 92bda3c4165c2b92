"""One viewer's stream: a thread that owns the session and makes blocks, as far ahead of the viewer as is useful and no further."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fps_jax.choices import Switch, strongest
from fps_jax.errors import one_line
from fps_jax.media.fragments import Fragments, mime_type, split_head

if TYPE_CHECKING:
    from fps_jax.sampling.block import Block
    from fps_jax.sampling.session import Session

AHEAD = 4.0  # seconds of video that a viewer may have yet to see before the next block waits

Tell = Callable[[dict[str, Any] | bytes], None]


class Stream:
    """Makes blocks until it is stopped. What it has to say goes to `tell`, from its own threads: records, and bytes of video.

    Each block is a record and then bytes; all bytes, joined, are an mp4. The last record is of type 'ended'. Nothing
    but 'waiting' is said before the stream that had the device has said that.
    """

    def __init__(self, make: Callable[[str], "Session"], prompt: str, *, fps: float, codec: str, tell: Tell):
        """make: a new session from a prompt, called in the stream's thread. fps, codec: as of `Fragments`."""
        self._make, self._fps, self._codec, self._tell = make, fps, codec, tell
        self._first = prompt
        self._after: Stream | None = None
        self._changed = threading.Condition()  # guards all that follows
        self._session: Session | None = None
        self._wish: tuple[str, Switch] | None = None
        self._paused = self._stopped = self._ended = False
        self._sent: list[int] = []  # frames of each block that the viewer hasn't said it has
        self._had = 0  # blocks that it has
        self._buffered = 0.0
        self._threads = [
            threading.Thread(target=target, name=f"fps-live {name}", daemon=True)
            for name, target in (("blocks", self._run), ("prompts", self._switch_prompts))
        ]

    def start(self, after: "Stream | None" = None) -> None:
        """after: a stream that has the device still, stopped, whose end is waited for."""
        self._after = after
        for thread in self._threads:
            thread.start()

    def switch(self, prompt: str, how: Switch) -> None:
        """Another prompt, which is encoded while blocks go on.

        Of several before a block begins the newest is it, in the strongest of their ways, as of those that a script of fps-stream
        has due: who cut meant to be rid of the old video, and a word more in the prompt doesn't bring it back.
        """
        with self._changed:
            self._wish = (prompt, how if self._wish is None else strongest((self._wish[1], how)))
            self._changed.notify_all()

    def pause(self) -> None:
        with self._changed:
            self._paused = True
            self._tell_before_end({"type": "paused"})

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._tell_before_end({"type": "resumed"})
            self._changed.notify_all()

    def buffered(self, seconds: float, blocks: int) -> None:
        """The viewer has `seconds` of video to show, of the first `blocks` blocks."""
        with self._changed:
            sent = self._had + len(self._sent)
            blocks = min(blocks, sent)
            if sent and blocks >= self._had:  # else an older message, or one about the stream before
                del self._sent[: blocks - self._had]
                self._had, self._buffered = blocks, seconds
                self._changed.notify_all()

    def stop(self) -> None:
        """Ends it when the block that is being made is done. Returns at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def wanted(self) -> bool:
        """Whether it goes on: nobody has stopped it, and its last block isn't made."""
        return not (self._stopped or self._ended)

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end of a stream that was started. Whether it is there."""
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def ahead(self) -> float:
        """Seconds of video that the viewer has yet to see, on the way to it or there."""
        return self._buffered + sum(self._sent) / self._fps

    def _wanted(self) -> bool:
        """Waits until a block is wanted; False if none will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not (self._paused or self.ahead > AHEAD))
            return not self._stopped

    def _has_device(self) -> bool:
        """Waits for the stream that has it; False where nobody wants this one any more."""
        if self._after is not None and not self._after.join(0):
            self._tell({"type": "waiting"})
            self._after.join()
        self._after = None
        return not self._stopped

    def _tell_before_end(self, record: dict[str, Any]) -> None:
        with self._changed:
            if not self._ended:
                self._tell(record)

    def _run(self) -> None:
        packed = Fragments(self._fps, self._codec)
        try:
            if self._has_device():
                self._tell({"type": "starting", "prompt": self._first})
                session = self._make(self._first)
                with self._changed:
                    self._session = session
                    self._changed.notify_all()
                self._note(session, self._first)
                while self._wanted():
                    block = next(session, None)
                    if block is None:
                        break
                    self._send(session, block, packed)
        except Exception as error:  # whatever it was, the viewer is told, and the next stream can begin
            self._tell({"type": "error", "text": one_line(error)})
        finally:
            with self._changed:
                self._session, self._ended = None, True
                self._changed.notify_all()
            session = None  # the cache's memory is free before anybody hears of the end
            rest = b""
            with contextlib.suppress(Exception):  # the encoder's, of which the viewer has been told
                rest = packed.close()
            if rest:
                self._tell(rest)
            self._tell({"type": "ended", "frames": packed.frames})

    def _send(self, session: "Session", block: "Block", packed: Fragments) -> None:
        first, begun = packed.frames, time.perf_counter()
        content = packed.push(block.frames)
        seconds = block.seconds | {"encode": time.perf_counter() - begun}
        if not first:
            head, content = split_head(content)
            height, width = block.frames.shape[1:3]
            self._tell({"type": "video", "mime": mime_type(head), "height": height, "width": width, "fps": self._fps})
            self._tell(head)
        rollout = session.rollout
        record = {
            "type": "block",
            "block": block.index,
            "frames": [first, packed.frames],
            "prompt": block.prompt,
            "seconds": {name: round(took, 4) for name, took in seconds.items()},
            "frames_per_second": round(len(block.frames) / sum(seconds.values()), 2),
            "cache": {"frames": min(rollout.next_frame, rollout.layout.frames), "of": rollout.layout.frames},
            "memory": memory(),
        }
        with self._changed:
            self._sent.append(len(block.frames))
            self._tell(record)
            self._tell(content)

    def _switch_prompts(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopped or self._ended or (self._wish is not None and self._session is not None)
                )
                if self._stopped or self._ended:
                    return
                session, wish, self._wish = self._session, self._wish, None
                assert session is not None
                assert wish is not None
                prompt, how = wish
            try:
                session.switch(prompt, how)
            except Exception as error:  # the stream goes on with the prompt that it has
                self._tell_before_end({"type": "error", "text": one_line(error)})
            else:
                self._tell_before_end({"type": "switching", "prompt": prompt, "how": how})
                self._note(session, prompt)
            del session

    def _note(self, session: "Session", prompt: str) -> None:
        note = session.note(prompt)
        if note is not None:
            self._tell_before_end({"type": "note", "text": note})


def memory() -> dict[str, int]:
    """Bytes that this process holds: 'device', where its kind tells, and 'host', where the system tells."""
    import jax

    held = {}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_in_use" in stats:
        held["device"] = int(stats["bytes_in_use"])
    with contextlib.suppress(OSError):
        import resource

        with open("/proc/self/statm") as file:
            held["host"] = int(file.read().split()[1]) * resource.getpagesize()
    return held
