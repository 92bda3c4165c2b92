"""Whose requests are answered."""

import socket

import pytest

from fps_jax.live.guard import Guard

GUARD = Guard(None, ["Box.example"])


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("localhost:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.3.4", True),
        (f"{socket.gethostname()}:80", True),
        ("BOX.example:8000", True),
        ("box.example.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("localhost@evil.example", False),
        ("localhost:8000/", False),
        ("", False),
        ("1.2.3", False),
    ],
)
def test_names_of_the_server_are_its_own_or_addresses(host, fine):
    for kind in ("http", "websocket"):
        assert (GUARD.refusal(kind, {b"host": host.encode()}) is None) == fine


@pytest.mark.parametrize(
    ("origin", "fine"),
    [
        ("http://localhost:8000", True),
        ("https://localhost:8000", True),
        ("http://localhost", False),
        ("http://127.0.0.1:8000", False),
        ("null", False),
        ("", False),
        ("http://localhost:8000.evil.example", False),
    ],
)
def test_a_websocket_is_for_pages_of_this_server(origin, fine):
    headers = {b"host": b"localhost:8000", b"origin": origin.encode()}
    assert (GUARD.refusal("websocket", headers) is None) == fine
    assert GUARD.refusal("http", headers) is None, "pages may be linked to"
