"""A socket to listen on, and the server on it until Ctrl-C."""

import contextlib
import os
import socket
import sys
from typing import Any

from fps_jax.live.messages import MAX_MESSAGE
from fps_jax.live.server import Live, app

_LAST_BLOCK = 10.0  # seconds that the block at work has to end after Ctrl-C


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Held before a model is loaded, so that a port that is taken is told at once.

    Raises: OSError, in one line, for a port that is taken or can't be had, and a host that isn't this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise OSError(
            f"host={host!r} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all of its own"
        ) from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except OSError as error:
        sock.close()
        raise OSError(
            f"host={host!r}, port={port} can't be listened on ({error.strerror}); give another --port, 0 for a free one"
        ) from None
    return sock


def url(host: str, sock: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{sock.getsockname()[1]}/"


def server(live: Live, names: list[str]) -> Any:
    """A uvicorn.Server of the app. names: as of `Guard`."""
    import uvicorn

    config = uvicorn.Config(
        app(live, names),
        log_level="warning",
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE,
        ws_per_message_deflate=False,  # a video doesn't get smaller
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def serve(live: Live, sock: socket.socket, names: list[str]) -> None:
    """Answers until Ctrl-C, then waits for the block that is being made, but not for long."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended all connections, and raises it when it is done
        server(live, names).run(sockets=[sock])
    last = live.stop()
    if last is not None and not last.join(_LAST_BLOCK):
        # A block of minutes, in compiled code that nothing interrupts: Python can't end beside it, and there is nothing to lose.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
