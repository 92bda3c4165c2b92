"""Who may talk to the server: pages that it gave out itself, under a name of its own.

A browser lets any page open a WebSocket to this machine, but says whose page it is (Origin). And a page elsewhere can have its own
name point here (DNS rebinding), but then that name is the Host. Both are held against what the server is called. Other programs
say no Origin; they could as well lie.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Any

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")


class Guard:
    """An ASGI app in front of another one: answers 403 to requests under another name, and WebSockets of others' pages."""

    def __init__(self, app: Any, names: Iterable[str] = ()):
        """names: what the server is called beside localhost, this machine's name and any IP address, which no DNS gives away."""
        self._app = app
        self._names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            refusal = self.refusal(scope["type"], dict(scope["headers"]))
            if refusal is not None:
                await _refuse(scope["type"], refusal, send)
                return
        await self._app(scope, receive, send)

    def refusal(self, kind: str, headers: dict[bytes, bytes]) -> str | None:
        """Why a request isn't answered; None where it is. headers: names in lower case."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._ours(host):
            return f"host {host[:100]!r} is none of this server's names; open it by its address, or give --allow-host"
        origin = headers.get(b"origin")
        if kind == "websocket" and origin is not None:
            whose = origin.decode("latin-1").lower()
            if whose not in (f"http://{host}", f"https://{host}"):
                return f"the page of {whose[:100]!r} is not this server's"
        return None

    def _ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True


async def _refuse(kind: str, why: str, send: Any) -> None:
    if kind == "websocket":  # before it is accepted: the server makes it a 403
        await send({"type": "websocket.close", "code": 1008, "reason": why[:100]})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": f"{why}\n".encode()})
