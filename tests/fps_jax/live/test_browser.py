"""The page in a real browser, headless, over its DevTools port: it plays, follows a prompt, pauses, saves, and leaves."""

import base64
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

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from fps_jax import CausalConfig, CausalPipeline
from fps_jax.live.server import Live
from fps_jax.media.fragments import fragmented_mp4
from tests.checkpoints import T2V
from tests.live_server import WAIT, Site, decoded, site

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
BOAT, STORM = "A boat sails.", "The storm clears."
SIZE = {"height": 32, "width": 48}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")


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


SEEN = "[$('state').textContent, $('error').textContent, video.currentTime, video.readyState, player && player.blocks]"


@pytest.fixture
def browser(tmp_path) -> Iterator[Callable[..., Tab]]:
    """Opens tabs: a function of an address, and of code that runs in them first."""
    assert CHROMIUM is not None
    folder = tmp_path / "profile"
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


@pytest.fixture(scope="module")
def pipe() -> CausalPipeline:
    causal = CausalConfig(frames_per_block=2, window=4, steps=(1000, 500))
    return CausalPipeline.from_pretrained(T2V, causal=causal, dtype="float32")


@pytest.fixture(scope="module")
def running(pipe) -> Iterator[Site]:
    facts = {"model": "tiny", "prompt": BOAT, "note": "Of no use.", "examples": [STORM]}
    with site(Live(lambda prompt: pipe.session(prompt, seed=3, **SIZE), facts=facts)) as server:
        next(pipe.session(BOAT, seed=3, **SIZE))  # compiles
        yield server


# The blocks that the page heard of, in window.heard.
HEAR = """
window.heard = [];
const Real = WebSocket;
window.WebSocket = class extends Real {
  constructor(url) {
    super(url);
    this.addEventListener('message', (event) => {
      if (typeof event.data === 'string') window.heard.push(JSON.parse(event.data));
    });
  }
};
"""
NO_H264 = "MediaSource.isTypeSupported = (kind) => kind.includes('vp09');"
FILE = """
(async () => {
  const bytes = new Uint8Array(await (await recording.file()).arrayBuffer());
  let text = '';
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
})()
"""


@pytest.mark.parametrize("codec", ["avc1", "vp09"])
def test_the_page_plays_what_the_server_makes(browser, running, pipe, tmp_path, codec):
    tab = browser(running.url, HEAR + (NO_H264 if codec == "vp09" else ""))
    tab.until("$('state').textContent === 'ready' && !$('send').disabled")
    assert tab.eval("$('prompt').value") == BOAT
    assert tab.eval("[$('model').textContent, $('note').textContent, $('history').textContent]") == [
        "tiny",
        "Of no use.",
        f"{STORM}example",
    ]
    tab.eval("$('send').click()")
    tab.until("video.currentTime > 0.3 && video.getVideoPlaybackQuality().totalVideoFrames > 3")
    assert tab.eval("[video.videoWidth, video.videoHeight]") == [SIZE["width"], SIZE["height"]]

    tab.eval("$('prompt').value = ' '; $('send').click()")  # refused, and the stream goes on
    tab.until("$('error').textContent.includes('the prompt is empty')")
    tab.eval(f"$('prompt').value = '{STORM}'; document.querySelector('[value=recache]').click(); $('send').click()")
    tab.until(f"heard.some((m) => m.type === 'block' && m.prompt === '{STORM}')")
    assert tab.eval("$('error').hidden")

    tab.eval("document.body.dispatchEvent(new KeyboardEvent('keydown', {code: 'Space', bubbles: true}))")
    tab.until("$('state').textContent === 'paused' && video.paused")
    blocks, shown = tab.eval("[player.blocks, video.currentTime]")
    time.sleep(0.7)
    assert tab.eval("[heard.filter((m) => m.type === 'block').length - player.blocks, video.currentTime]") == [0, shown]
    assert tab.eval("player.blocks") - blocks <= 1, "the one that was being made"
    tab.eval("$('pause').click()")
    tab.until(f"!video.paused && player.blocks > {blocks} && video.currentTime > {shown + 0.3}")
    assert tab.eval("$('block').textContent * 1 > 1 && $('cache').value === 4 && $('stages').children.length === 3")

    tab.eval("$('stop').click()")
    tab.until("heard.at(-1).type === 'ended' && player.source.readyState === 'ended' && video.ended")
    frames = tab.eval("heard.at(-1).frames")
    assert tab.eval("video.duration") == pytest.approx(frames / 16)
    quality = tab.eval(
        "(({totalVideoFrames, droppedVideoFrames}) => [totalVideoFrames, droppedVideoFrames])"
        "(video.getVideoPlaybackQuality())"
    )
    assert quality[0] == frames, f"all {frames} were decoded; {quality[1]} came too late to be seen"
    assert not tab.wrong

    blocks = tab.eval("heard.filter((m) => m.type === 'block')")
    got = decoded(base64.b64decode(tab.eval(FILE)))
    want = own_frames(pipe, blocks, tmp_path) if codec == "avc1" else None
    assert [time for time, _ in got] == pytest.approx([i / 16 for i in range(frames)])
    if want is not None:
        assert len(want) == frames
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(got, want, strict=True))
    assert not running.live.busy


def own_frames(pipe, blocks: list[dict[str, Any]], folder: pathlib.Path) -> list[tuple[float, np.ndarray]]:
    """What a file has that is written of the same session, whose prompt changed where the page says."""
    session = pipe.session(BOAT, seed=3, **SIZE)
    with fragmented_mp4(folder / "own.mp4") as writer:
        for block in blocks:
            if block["prompt"] != session.prompt:
                session.switch(block["prompt"], "recache")
            writer.push(next(session).frames)
    return decoded((folder / "own.mp4").read_bytes())


def test_a_closed_tab_ends_the_work_and_the_next_gets_the_device(browser, running):
    first = browser(running.url, HEAR)
    first.until("!$('send').disabled")
    first.eval("$('send').click()")
    first.until("player && player.blocks > 0")
    second = browser(running.url, HEAR)
    second.until("$('veil').textContent.includes('Somebody else is watching')")
    second.eval("$('send').click()")
    second.until("$('error').textContent.includes('the device makes one stream at a time')")
    stream = running.live.current
    first.call("Page.close")
    assert stream.join(30), "nobody watches"
    second.eval("$('send').click()")
    second.until("player && player.blocks > 0 && video.currentTime > 0.1")
    second.eval("$('stop').click()")
    second.until("heard.at(-1).type === 'ended'")


def test_memory_of_the_page_is_bounded(browser, running):
    """Of a long stream what was shown leaves the player, and the last blocks are saved, from a keyframe on."""
    tab = browser(running.url, HEAR)
    tab.until("!$('send').disabled")
    tab.eval("$('send').click()")
    tab.until("player && player.blocks > 1")
    two = tab.eval("recording.parts[0].size + recording.parts[1].size")
    tab.eval(f"KEEP.saved = {two}; KEEP.behind = 0.5")
    tab.until("player.blocks > 4 && video.currentTime > 2 && video.buffered.start(0) > 0.4")
    tab.eval("$('stop').click()")
    tab.until("heard.at(-1).type === 'ended'")
    held = "recording.dropped && recording.parts.length >= 1 && recording.size <= KEEP.saved"
    assert tab.eval(f"{held} && recording.size === recording.parts.reduce((n, part) => n + part.size, 0)")
    last = tab.eval("recording.parts.length") - 1  # the last part is the last frame
    first = tab.eval("heard.filter((m) => m.type === 'block')")[-last]["frames"][0]
    frames = tab.eval("heard.at(-1).frames")
    got = decoded(base64.b64decode(tab.eval(FILE)))
    assert len(got) == frames - first, "whole blocks"


def test_start_just_after_stop_begins_another_stream(browser, running):
    tab = browser(running.url, HEAR)
    tab.until("!$('send').disabled")
    tab.eval("$('send').click()")
    tab.until("player && player.blocks > 0")
    tab.eval("$('stop').click(); $('send').click()")
    tab.until("heard.filter((m) => m.type === 'starting').length === 2")
    tab.until(
        "player && player.blocks > 9 && video.currentTime > 0.5"
    )  # 10 blocks are 5 seconds: it reports what it has
    assert tab.eval("running && !$('stop').disabled && !$('pause').disabled")

    tab.eval("player.push(new Uint8Array(64).fill(255).buffer, false)")  # from here on the browser can't play it
    tab.until("$('error').textContent.includes('can\\'t play it')")
    blocks = tab.eval("player.blocks")
    tab.until(f"player.blocks > {blocks + 9}")
    tab.eval("$('stop').click()")
    tab.until("heard.at(-1).type === 'ended'")
    assert len(decoded(base64.b64decode(tab.eval(FILE)))) == tab.eval("heard.at(-1).frames"), "saved whole"
    assert not tab.wrong


def test_a_browser_that_cannot_play_is_told(browser, running):
    tab = browser(running.url, HEAR + "MediaSource.isTypeSupported = () => false;")
    tab.until("$('error').textContent.includes('plays neither H.264 nor VP9')")
    assert tab.eval("$('send').disabled")
    thrown = "MediaSource.prototype.addSourceBuffer = () => { throw new DOMException('no such codec', 'NotSupportedError'); };"
    tab = browser(running.url, HEAR + thrown)
    tab.until("!$('send').disabled")
    tab.eval("$('send').click()")
    tab.until("$('error').textContent.includes('(no such codec); the stream goes on and can be saved')")
    tab.until("player.blocks > 9")
    tab.eval("$('stop').click()")
    tab.until("heard.at(-1).type === 'ended'")
    assert len(decoded(base64.b64decode(tab.eval(FILE)))) == tab.eval("heard.at(-1).frames")
    assert not tab.wrong
