"""The page in a real browser, headless, over its DevTools port: it plays, follows a prompt, pauses, saves, and leaves."""

import base64
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fps_jax import CausalConfig, CausalPipeline
from fps_jax.live.server import Live
from fps_jax.media.fragments import fragmented_mp4
from tests import live_browser
from tests.checkpoints import T2V
from tests.live_browser import CHROMIUM, Tab
from tests.live_server import Site, decoded, site

BOAT, STORM = "A boat sails.", "The storm clears."
SIZE = {"height": 32, "width": 48}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")


@pytest.fixture
def browser(tmp_path) -> Iterator[Callable[..., Tab]]:
    with live_browser.browser(tmp_path / "profile") as open_tab:
        yield open_tab


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


# The control that has the focus, if all of a ring around it can be seen.
FOCUS = """
(() => {
  const element = document.activeElement, style = getComputedStyle(element);
  if (style.outlineStyle === 'none' || !(parseFloat(style.outlineWidth) >= 2)) return `${element.tagName} has no ring`;
  const out = parseFloat(style.outlineOffset) + parseFloat(style.outlineWidth), box = element.getBoundingClientRect();
  for (let up = element.parentElement; up; up = up.parentElement) {
    if (getComputedStyle(up).overflow === 'visible') continue;
    const edge = up.getBoundingClientRect();
    if (box.left - out < edge.left || box.right + out > edge.right) return `the ring of ${element.textContent} is cut`;
  }
  return element.id || element.value || element.textContent;
})()
"""


def test_the_keyboard_alone_does_it_all(browser, running):
    tab = browser(running.url, HEAR)
    tab.until("!$('send').disabled")

    def press(*keys: str, to: str) -> None:
        tab.keys(*keys)
        assert tab.eval(FOCUS) == to

    press("Tab", to="prompt")
    press("Enter", to="prompt")  # the prompt that the box begins with
    tab.until("player && player.blocks > 0")
    press("All", STORM, "Tab", to="continue")
    press("Right", to="recache")
    press("Tab", to="send")
    press("Enter", to="send")
    tab.until(f"heard.some((m) => m.type === 'switching' && m.prompt === '{STORM}' && m.how === 'recache')")
    press("Shift+Tab", "Shift+Tab", "Up", "Up", to="prompt")  # to the text's beginning, and then to the prompt before
    assert tab.eval("$('prompt').value") == BOAT
    press("Enter", to="prompt")
    tab.until(f"heard.findLast((m) => m.type === 'switching').prompt === '{BOAT}'")
    tab.until("!$('save').disabled")
    press("Shift+Tab", to="save")
    press("Shift+Tab", "Shift+Tab", to="pause")
    press("Space", to="pause")
    tab.until("paused && video.paused")
    for name in ("stop", "save", "prompt", "recache", "send"):
        press("Tab", to=name)
    press("Tab", to=tab.eval("$('history').firstChild.textContent"))
    press("Enter", to="prompt")
    press("Shift+Tab", "Shift+Tab", "Shift+Tab", "Enter", to="pause")
    tab.until("!paused && !video.paused")
    press("Tab", "Space", to="stop")
    tab.until("heard.at(-1).type === 'ended' && $('stop').disabled")
    assert tab.eval(FOCUS) == "send", "what had the focus is disabled: the next thing to do has it"
    assert not tab.wrong


# What of the page doesn't fit a screen that is touched; innerWidth is no measure, as phones zoom out to all of the page.
TOO_SMALL = """
((width) => {
  const wrong = [], wide = document.documentElement.scrollWidth;
  if (wide > width) wrong.push(`${wide} pixels of width`);
  for (const box of document.querySelectorAll('body, body *')) {
    if (getComputedStyle(box).overflowX !== 'visible' && box.scrollWidth > box.clientWidth) wrong.push(`${box.id} scrolls`);
  }
  for (const target of document.querySelectorAll('button, fieldset label')) {
    const {height} = target.getBoundingClientRect();
    if (height < 40) wrong.push(`${target.textContent} has ${height} pixels of height`);
  }
  const size = parseFloat(getComputedStyle($('prompt')).fontSize);
  if (size < 16) wrong.push(`text of ${size} pixels, which makes a phone zoom in`);
  return wrong;
})
"""


def test_a_phone_shows_it_all_and_takes_taps(browser, running):
    tab = browser(running.url, HEAR)
    tab.phone(390, 844)
    tab.until("!$('send').disabled")
    tab.tap("$('send')")
    tab.until("video.currentTime > 0.1")
    box = tab.eval("video.getBoundingClientRect().toJSON()")
    assert box["top"] >= 0, "it is seen whole, with the button that began it"
    assert box["bottom"] <= 844
    assert (box["left"] + box["right"], box["width"] > 300) == (390, True)
    tab.tap("document.querySelector('[value=cut]').parentElement")
    tab.tap("[...$('history').querySelectorAll('button')].at(-1)")
    tab.tap("$('send')")
    tab.until(f"heard.some((m) => m.type === 'switching' && m.prompt === '{STORM}' && m.how === 'cut')")
    tab.tap("$('pause')")
    tab.until("paused && video.paused")
    tab.eval(
        "$('model').textContent = 'Self_Forcing_'.repeat(4); state('the next block follows the new prompt', 'on'); "
        "fail('nowhere/'.repeat(60)); remember('storm'.repeat(30), '1:00:00')"
    )
    for width, height in ((390, 844), (320, 568), (844, 390)):
        tab.phone(width, height)
        assert tab.eval(f"{TOO_SMALL}({width})") == [], f"{width} x {height}"
    tab.tap("$('pause')")
    tab.until("!paused && !video.paused")
    tab.tap("$('stop')")
    tab.until("heard.at(-1).type === 'ended'")
    assert not tab.wrong
