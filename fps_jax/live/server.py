"""The app: a page, and a WebSocket to each that is open. One of them at a time has a stream, as there is one device."""

import asyncio
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fps_jax.live import messages
from fps_jax.live.engine import Stream
from fps_jax.live.guard import Guard
from fps_jax.media.fragments import CODECS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.websockets import WebSocket

    from fps_jax.sampling.session import Session

WEB = pathlib.Path(__file__).parent / "web"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
_MOST_RECORDS, _MOST_BYTES = 4096, 2**26  # that wait for a page: far more than 4 seconds of video at any size
_MOST_TEXT = 500  # characters of an error, which may name a value of 64 KiB
_CLOSE = 5.0  # seconds that a page which doesn't read has to take the reason of its end
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


@dataclass
class Live:
    """What is shown to viewers, and who has the device.

    Attributes:
      make: a new session from a prompt.
      fps: frames a second.
      facts: for the page: 'model', 'prompt' (what its box begins with), 'examples', 'note'.
      current: the stream that has the device, or had it last; its thread may still be at its last block.
    """

    make: Callable[[str], "Session"]
    fps: float = 16
    facts: dict[str, Any] = field(default_factory=dict)
    current: Stream | None = None

    @property
    def busy(self) -> bool:
        """Whether somebody watches."""
        return self.current is not None and self.current.wanted

    def stop(self) -> Stream | None:
        """Ends the current stream, if there is one, when its block is done. Returns it, to be waited for."""
        if self.current is not None:
            self.current.stop()
        return self.current

    def begin(self, stream: Stream) -> bool:
        """Gives a stream the device, as soon as the last one has left it; False where somebody watches."""
        if self.busy:
            return False
        last, self.current = self.current, stream
        stream.start(after=last)
        return True


class _Outbox:
    """What is yet to be sent to a page. `overrun` is set, and nothing is held any more, when that is more than a page in use has.

    The stream waits for what a page says it has; one that lies, or makes mistakes without end, would fill the memory.
    """

    def __init__(self):
        self.overrun = asyncio.Event()
        self._waiting: asyncio.Queue[str | bytes] = asyncio.Queue()
        self._bytes = 0

    def put(self, record: dict[str, Any] | bytes) -> None:
        if self._waiting.qsize() >= _MOST_RECORDS or self._bytes >= _MOST_BYTES:
            self._waiting = asyncio.Queue()
            self.overrun.set()
        if self.overrun.is_set():
            return
        content = record if isinstance(record, bytes) else json.dumps(record)
        self._bytes += len(content)
        self._waiting.put_nowait(content)

    async def get(self) -> str | bytes:
        content = await self._waiting.get()
        self._bytes -= len(content)
        return content


class _Viewer:
    """A connection, from hello to its end."""

    def __init__(self, live: Live, outbox: _Outbox):
        self._live, self._outbox = live, outbox
        self._codec: str | None = None
        self._stream: Stream | None = None

    def take(self, message: messages.Message) -> None:
        """Does what the page asks. Raises ValueError, in one line, for what can't be done."""
        if isinstance(message, messages.Hello):
            self._hello(message)
        elif self._codec is None:
            raise ValueError("say hello first, with the codecs that you can play")
        elif isinstance(message, messages.Prompt):
            self._prompt(message)
        elif self._stream is None or not self._stream.wanted:
            if not isinstance(message, messages.Buffered | messages.Stop):  # late ones are no mistake
                raise ValueError("no stream is running; a prompt begins one")
        elif isinstance(message, messages.Buffered):
            self._stream.buffered(message.seconds, message.blocks)
        elif isinstance(message, messages.Pause):
            self._stream.pause()
        elif isinstance(message, messages.Resume):
            self._stream.resume()
        else:
            self._stream.stop()

    def leave(self) -> None:
        """The page is gone: the work ends when its block is done."""
        if self._stream is not None:
            self._stream.stop()

    def _hello(self, message: messages.Hello) -> None:
        self._codec = next((codec[:4] for codec in message.codecs if codec[:4] in CODECS), None)
        if self._codec is None:
            raise ValueError("this browser plays neither H.264 nor VP9 in mp4; try Chrome, Edge, Firefox or Safari")
        ours = self._live.facts | {"fps": self._live.fps, "busy": self._live.busy}
        self._outbox.put({"type": "ready"} | ours)

    def _prompt(self, message: messages.Prompt) -> None:
        if self._stream is not None and self._stream.wanted:
            self._stream.switch(message.prompt, message.how)
            return
        loop, outbox = asyncio.get_running_loop(), self._outbox

        def tell(record: dict[str, Any] | bytes) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(outbox.put, record)

        assert self._codec is not None
        stream = Stream(self._live.make, message.prompt, fps=self._live.fps, codec=self._codec, tell=tell)
        if self._live.begin(stream):
            self._stream = stream
        else:
            text = "somebody else is watching, and the device makes one stream at a time; try again when they have left"
            self._outbox.put({"type": "refused", "text": text})


def app(live: Live, names: Iterable[str] = ()) -> Guard:
    """The ASGI app. names: as of `Guard`."""
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route, WebSocketRoute

    def page(path: str) -> Callable[["Request"], "Response"]:
        name, kind = _FILES[path]
        content = (WEB / name).read_bytes()
        return lambda request: Response(content, media_type=kind, headers=_HEADERS)

    async def watch(socket: "WebSocket") -> None:
        await _watch(live, socket)

    routes = [Route(path, page(path)) for path in _FILES]
    return Guard(Starlette(routes=[*routes, WebSocketRoute("/watch", watch)]), names)


async def _watch(live: Live, socket: "WebSocket") -> None:
    await socket.accept()
    outbox = _Outbox()
    viewer = _Viewer(live, outbox)
    work = _listen(socket, viewer, outbox), _send(socket, outbox), outbox.overrun.wait()
    tasks = [asyncio.create_task(job) for job in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        viewer.leave()
        for task in tasks:
            task.cancel()
        listened, *_ = await asyncio.gather(*tasks, return_exceptions=True)
    if outbox.overrun.is_set():
        with contextlib.suppress(
            Exception
        ):  # it has left, or still doesn't read: the connection ends without the reason
            async with asyncio.timeout(_CLOSE):
                await socket.close(1008, "this page doesn't take what is sent, so it was closed")
    elif isinstance(listened, Exception):
        raise listened


async def _listen(socket: "WebSocket", viewer: _Viewer, outbox: _Outbox) -> None:
    """What the page says, until it leaves."""
    while True:
        got = await socket.receive()
        if got["type"] == "websocket.disconnect":
            return
        try:
            viewer.take(messages.read(got.get("text")))
        except ValueError as error:
            outbox.put({"type": "error", "text": str(error)[:_MOST_TEXT]})


async def _send(socket: "WebSocket", outbox: _Outbox) -> None:
    """What the stream says, in its order."""
    while True:
        content = await outbox.get()
        if isinstance(content, bytes):
            await socket.send_bytes(content)
        else:
            await socket.send_text(content)
