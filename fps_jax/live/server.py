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

    from fps_jax.sampling.stream import Session

WEB = pathlib.Path(__file__).parent / "web"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
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


class _Viewer:
    """A connection, from hello to its end."""

    def __init__(self, live: Live, said: "asyncio.Queue[dict[str, Any] | bytes]"):
        self._live, self._said = live, said
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
        self._said.put_nowait({"type": "ready"} | ours)

    def _prompt(self, message: messages.Prompt) -> None:
        if self._stream is not None and self._stream.wanted:
            self._stream.switch(message.prompt, message.how)
            return
        loop, said = asyncio.get_running_loop(), self._said

        def tell(record: dict[str, Any] | bytes) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(said.put_nowait, record)

        assert self._codec is not None
        stream = Stream(self._live.make, message.prompt, fps=self._live.fps, codec=self._codec, tell=tell)
        if self._live.begin(stream):
            self._stream = stream
        else:
            text = "somebody else is watching, and the device makes one stream at a time; try again when they have left"
            self._said.put_nowait({"type": "refused", "text": text})


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
    said: asyncio.Queue[dict[str, Any] | bytes] = asyncio.Queue()
    viewer = _Viewer(live, said)
    sender = asyncio.create_task(_send(socket, said))
    try:
        while True:
            got = await socket.receive()
            if got["type"] == "websocket.disconnect":
                break
            try:
                viewer.take(messages.read(got.get("text")))
            except ValueError as error:
                said.put_nowait({"type": "error", "text": str(error)})
    finally:
        viewer.leave()
        sender.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await sender


async def _send(socket: "WebSocket", said: "asyncio.Queue[dict[str, Any] | bytes]") -> None:
    """What the stream says, in its order. Little piles up: the stream waits for a viewer that doesn't take it."""
    while True:
        record = await said.get()
        if isinstance(record, bytes):
            await socket.send_bytes(record)
        else:
            await socket.send_text(json.dumps(record))
