"""Tabs of a real browser, headless, over its DevTools port: code that runs in them, keys and fingers."""

import contextlib
import itertools
import json
import pathlib
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.live_server import WAIT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--remote-debugging-port=0",
    ),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


class Tab:
    """A tab, by the DevTools protocol. wrong: exceptions and errors of the page."""

    def __init__(self, socket: ClientConnection):
        self._socket, self._numbers = socket, itertools.count(1)
        self.wrong: list[Any] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            got = json.loads(self._socket.recv(timeout=WAIT))
            if got.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.wrong.append(got["params"])
            if got.get("id") == number:
                assert "error" not in got, got["error"]
                return got["result"]

    def eval(self, code: str) -> Any:
        got = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def until(self, code: str) -> Any:
        """Waits until the page says something true."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            value = self.eval(code)
            if value:
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{code}: not in {WAIT:g} s; {self.eval(SEEN)}, {self.wrong}")

    def keys(self, *names: str) -> None:
        """Presses keys: a name of `KEYS`, with 'Shift+' before it, or characters, which are typed."""
        for name in names:
            key = name.removeprefix("Shift+")
            strokes = [KEYS[key]] if key in KEYS else [{"key": letter, "text": letter} for letter in key]
            for stroke in strokes:
                stroke = stroke | {"modifiers": 8 if name.startswith("Shift+") else 0}
                down = "keyDown" if "text" in stroke else "rawKeyDown"
                self.call("Input.dispatchKeyEvent", type=down, **stroke)
                self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)

    def tap(self, element: str) -> None:
        """A finger on the middle of an element, which has to be where it can be touched."""
        self.eval(f"{element}.scrollIntoView({{block: 'nearest'}}), 0")
        at = self.eval(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({element}.getBoundingClientRect())"
        )
        assert self.eval(f"{element}.contains(document.elementFromPoint({at[0]}, {at[1]}))"), f"{element} is covered"
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": at[0], "y": at[1]}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def phone(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=True)
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)


def _key(code: str, number: int, key: str = "", **more: Any) -> dict[str, Any]:
    return {"key": key or code, "code": code, "windowsVirtualKeyCode": number, **more}


KEYS = {
    "Tab": _key("Tab", 9),
    "Enter": _key("Enter", 13, text="\r"),
    "Space": _key("Space", 32, " ", text=" "),
    "Up": _key("ArrowUp", 38),
    "Right": _key("ArrowRight", 39),
    "All": _key("KeyA", 65, "a", commands=["selectAll"]),
}

SEEN = "[$('state').textContent, $('error').textContent, video.currentTime, video.readyState, player && player.blocks]"


@contextlib.contextmanager
def browser(folder: pathlib.Path) -> Iterator[Callable[..., Tab]]:
    """Opens tabs: a function of an address, and of code that runs in them first. folder: the browser's own."""
    assert CHROMIUM is not None
    arguments = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    with (
        subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
        ExitStack() as open_sockets,
    ):

        def open_tab(url: str, first: str = "") -> Tab:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
            with urllib.request.urlopen(request, timeout=WAIT) as answer:
                address = json.load(answer)["webSocketDebuggerUrl"]
            tab = Tab(open_sockets.enter_context(connect(address, max_size=None)))
            tab.call("Page.addScriptToEvaluateOnNewDocument", source=first)
            tab.call("Page.navigate", url=url)
            tab.until("document.readyState === 'complete' && typeof player !== 'undefined'")
            return tab

        try:
            port = _port(folder / "DevToolsActivePort", process)
            yield open_tab
        finally:
            open_sockets.close()
            process.terminate()
            process.wait(WAIT)


def _port(file: pathlib.Path, process: subprocess.Popen) -> int:
    end = time.monotonic() + WAIT
    while time.monotonic() < end and process.poll() is None:
        if file.exists() and file.read_text().count("\n"):
            return int(file.read_text().split("\n")[0])
        time.sleep(0.05)
    raise TimeoutError(f"chromium opened no DevTools port (status {process.poll()})")
