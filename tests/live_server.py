"""A live server on a free loopback port, its client, and sessions whose blocks cost nothing."""

import contextlib
import io
import json
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from websockets.sync.client import ClientConnection, connect

from fps_jax.live.serve import listen, server
from fps_jax.live.server import Live
from fps_jax.sampling.block import Block

WAIT = 60.0  # seconds that a test waits for what should take a moment


class Painted:
    """A session of grey blocks: block i has the shade 10 i. asked: how often a block was."""

    def __init__(self, prompt: str, frames: int = 8, blocks: int | None = None):
        self.prompt, self.size, self.blocks, self.asked = prompt, frames, blocks, 0
        self.switches: list[tuple[str, str]] = []
        self.pending: tuple[str, str] | None = None
        layout = types.SimpleNamespace(frames=4)
        self.rollout = types.SimpleNamespace(next_frame=0, layout=layout)

    def __iter__(self) -> "Painted":
        return self

    def __next__(self) -> Block:
        if self.asked == self.blocks:
            raise StopIteration
        self.pending = None
        shade = 10 * self.asked % 250
        block = Block(
            self.asked,
            np.full((self.size, 32, 48, 3), shade, np.uint8),
            np.zeros((16, 2, 4, 6), np.float32),
            self.prompt,
            {"denoise": 0.01, "decode": 0.01},
        )
        self.asked += 1
        self.rollout.next_frame += 2
        return block

    def switch(self, prompt: str, how: str = "continue") -> None:
        self.prompt = prompt
        self.pending = (prompt, how)
        self.switches.append(self.pending)

    def note(self, prompt: str) -> str | None:
        return None


class Client:
    """A page without a browser. said: all records so far. video: all bytes so far."""

    def __init__(self, socket: ClientConnection, codecs: list[str] | None = None):
        self.socket = socket
        self.said: list[dict[str, Any]] = []
        self.video: list[bytes] = []
        if codecs is not None:
            self.say(type="hello", codecs=codecs)
            self.until("ready")

    def say(self, **record: Any) -> None:
        self.socket.send(json.dumps(record))

    def receive(self, timeout: float = WAIT) -> dict[str, Any] | None:
        """The next record; None for bytes."""
        got = self.socket.recv(timeout=timeout)
        if isinstance(got, bytes):
            self.video.append(got)
            return None
        self.said.append(json.loads(got))
        return self.said[-1]

    def until(self, kind: str, seen: bool = False) -> dict[str, Any]:
        """The next record of a type. seen: a page that shows at once what it gets, and says so."""
        blocks, end = len(self.kind("block")), time.monotonic() + WAIT
        while time.monotonic() < end:
            record = self.receive()
            if record is not None and record["type"] == "block":
                blocks += 1
                if seen:
                    self.say(type="buffered", seconds=0, blocks=blocks)
            if record is not None and record["type"] == kind:
                return record
        raise TimeoutError(f"no {kind!r} in {WAIT:g} s; the last: {self.said[-5:]}")

    def silence(self, seconds: float = 0.5) -> None:
        """Holds that nothing is said for a while."""
        with contextlib.suppress(TimeoutError):
            record = self.receive(seconds)
            raise AssertionError(f"something was said: {record}")

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.said if record["type"] == kind]


class Site:
    """A server that runs. url: of its page."""

    def __init__(self, live: Live, port: int):
        self.live, self.port = live, port
        self.url = f"http://127.0.0.1:{port}/"

    @contextlib.contextmanager
    def client(self, codecs: list[str] | None = ["avc1.640028"], **options: Any) -> Iterator[Client]:  # noqa: B006
        with connect(f"ws://127.0.0.1:{self.port}/watch", max_size=None, max_queue=None, **options) as socket:
            yield Client(socket, codecs)


@contextlib.contextmanager
def site(live: Live, names: list[str] | None = None) -> Iterator[Site]:
    """The server in a thread, and its end."""
    with listen("127.0.0.1", 0) as sock:
        running = server(live, names or [])
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield Site(live, sock.getsockname()[1])
        finally:
            running.should_exit = True
            thread.join(WAIT)
            last = live.stop()
            assert last is None or last.join(WAIT)


def decoded(content: bytes) -> list[tuple[float, np.ndarray]]:
    """(seconds, picture) of each frame of a video."""
    with av.open(io.BytesIO(content)) as container:
        return [(float(f.time or 0), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
