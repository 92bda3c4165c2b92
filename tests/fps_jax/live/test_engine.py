"""A stream's thread on its own: what becomes of errors, of prompts that come fast, and of what it held."""

import gc
import threading
import time
import weakref

import pytest

from fps_jax.live.engine import Stream
from tests.live_server import WAIT, Painted, decoded


class Told:
    """What a stream says."""

    def __init__(self):
        self.records, self.video = [], []
        self._changed = threading.Condition()

    def __call__(self, record):
        with self._changed:
            (self.video if isinstance(record, bytes) else self.records).append(record)
            self._changed.notify_all()

    def until(self, kind, **values):
        """The newest record of a type, with these values, as soon as there is one."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._found(kind, values), WAIT), self.records
            return self._found(kind, values)[-1]

    def _found(self, kind, values):
        return [r for r in self.records if r["type"] == kind and values.items() <= r.items()]


def stream(make, told, prompt="a") -> Stream:
    made = Stream(make, prompt, fps=16, codec="avc1", tell=told)
    made.start()
    return made


def wait_for(true) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            MemoryError("a stream of 32 x 48 pixels: no memory left on a device"),
            "a stream of 32 x 48 pixels: no memory le",
        ),
        (
            FloatingPointError("NaN or inf in the block of latent frames 3 to 5"),
            "NaN or inf in the block of latent frames",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_error_is_told_and_what_was_made_is_whole(error, text):
    class Broken(Painted):
        def __next__(self):
            if self.asked == 2:
                raise error
            return super().__next__()

    told = Told()
    assert stream(Broken, told).join(WAIT)
    assert told.until("error")["text"].startswith(text)
    assert told.records[-1] == {"type": "ended", "frames": 16}
    assert len(decoded(b"".join(told.video))) == 16


def test_a_session_that_cannot_begin_is_told():
    def make(prompt):
        raise ValueError("height=40 is not a positive multiple of 16")

    told = Told()
    assert stream(make, told).join(WAIT)
    assert told.until("error")["text"] == "height=40 is not a positive multiple of 16"
    assert told.records[-1] == {"type": "ended", "frames": 0}
    assert not told.video


def test_a_stream_with_an_end_has_one():
    told = Told()
    assert stream(lambda prompt: Painted(prompt, blocks=3), told).join(WAIT)
    assert told.records[-1] == {"type": "ended", "frames": 24}
    shades = [picture.mean() for _, picture in decoded(b"".join(told.video))]
    assert shades == pytest.approx([0] * 8 + [10] * 8 + [20] * 8, abs=2)


def test_of_prompts_that_come_while_one_is_encoded_the_newest_is():
    begun, go, made = threading.Event(), threading.Event(), []

    class Slow(Painted):
        def switch(self, prompt, how="continue"):
            if prompt == "bad":
                raise ValueError("prompt='bad' is no text")
            begun.set()
            go.wait(WAIT)
            super().switch(prompt, how)

    def make(prompt):
        made.append(Slow(prompt))
        return made[-1]

    told = Told()
    running = stream(make, told)
    running.switch("b", "continue")
    assert begun.wait(WAIT)
    running.switch("c", "cut")
    running.switch("d", "recache")
    go.set()
    told.until("switching", prompt="d", how="cut")
    running.switch("bad", "continue")
    told.until("error", text="prompt='bad' is no text")
    running.stop()
    assert running.join(WAIT)
    assert made[0].switches == [("b", "continue"), ("d", "cut")], "the strongest way of those that no block began with"


def test_nothing_is_said_after_the_end():
    """Of a prompt that was still being encoded, too."""
    begun = threading.Event()

    class Slow(Painted):
        def switch(self, prompt, how="continue"):
            begun.set()
            told.until("ended")
            if prompt == "bad":
                raise ValueError("prompt='bad' is no text")

    for prompt in ("b", "bad"):
        begun.clear()
        told = Told()
        running = stream(Slow, told)
        running.switch(prompt, "continue")
        assert begun.wait(WAIT)
        running.stop()
        assert running.join(WAIT)
        running.pause()
        running.resume()
        assert told.records[-1]["type"] == "ended"


def test_a_stream_that_is_stopped_while_it_waits_makes_nothing():
    hold, in_block, made = threading.Event(), threading.Event(), []

    class Slow(Painted):
        def __next__(self):
            in_block.set()
            hold.wait(WAIT)
            return super().__next__()

    def make(prompt):
        made.append(prompt)
        return Slow(prompt)

    first, told = stream(make, Told()), Told()
    assert in_block.wait(WAIT)
    first.stop()
    second = Stream(make, "b", fps=16, codec="avc1", tell=told)
    second.start(after=first)
    told.until("waiting")
    second.stop()
    hold.set()
    assert second.join(WAIT)
    assert made == ["a"]
    assert told.records == [{"type": "waiting"}, {"type": "ended", "frames": 0}]


def test_a_stream_waits_for_the_one_before_and_lets_go_of_its_session():
    """On the device there is never room for two."""
    hold, in_block, alive = threading.Event(), threading.Event(), []

    class Slow(Painted):
        def __next__(self):
            in_block.set()
            hold.wait(WAIT)
            return super().__next__()

    sessions = []

    def make(prompt):
        gc.collect()
        alive.append([ref() is not None for ref in sessions])
        session = Slow(prompt)
        sessions.append(weakref.ref(session))
        return session

    told = Told()
    first = stream(make, told)
    assert in_block.wait(WAIT)
    first.stop()
    second = Stream(make, "b", fps=16, codec="avc1", tell=told)
    second.start(after=first)
    assert len(alive) == 1
    assert not second.join(0.2)
    assert len(alive) == 1, "it waits"
    assert [record["type"] for record in told.records] == ["starting", "waiting"]
    hold.set()
    told.until("starting", prompt="b")
    assert first.join(WAIT)
    second.stop()
    assert second.join(WAIT)
    assert alive == [[], [False]]
    kinds = [record["type"] for record in told.records if record["type"] in ("starting", "ended")]
    assert kinds == ["starting", "ended"] * 2, "one viewer hears of one at a time"


def test_an_old_report_of_a_viewer_counts_for_nothing():
    told = Told()
    running = Stream(Painted, "a", fps=16, codec="avc1", tell=told)
    running.buffered(9, 5)
    assert running.ahead == 0, "of the stream before: this one has sent nothing"
    running._sent = [8, 8, 8]
    assert running.ahead == 1.5
    running.buffered(0.2, 2)
    assert running.ahead == 0.7
    running.buffered(9, 1)
    assert running.ahead == 0.7
    running.buffered(0.1, 99)
    assert running.ahead == 0.1
