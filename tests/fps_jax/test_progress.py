"""What is said of work under way: a clock that goes on, lines in a log."""

import io
import sys
import time

import pytest

from fps_jax import progress


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(("show", "terminal", "said"), [(None, False, False), (False, True, False), (None, True, True)])
def test_only_a_terminal_is_told_unasked(monkeypatch, show, terminal, said):
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal))
    with progress.progress_bar("denoise", show) as update:
        update(1, 2)
        update(2, 2)
    assert bool(stream.getvalue()) == said


def test_a_log_has_whole_lines_and_hears_of_work_that_stands(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Stream(False))
    monkeypatch.setattr(progress, "_LINE", 0.1)
    with progress.progress_bar("denoise", True) as update:
        time.sleep(0.5)  # nothing moves: a line after 0.1 s, another 0.2 s later
        for done in range(1, 51):
            update(done, 50)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("denoise ... ")
    assert lines[-1].startswith("denoise: 50 of 50 ")
    assert 3 <= len(lines) <= 8  # not one for each of fifty steps in no time
    assert not set("\r\x1b█") & set(stream.getvalue())


def test_the_clock_of_a_bar_goes_on_while_nothing_moves(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Stream(True))
    with progress.progress_bar("denoise", None):
        before = len(stream.getvalue())
        deadline = time.monotonic() + 30
        while len(stream.getvalue()) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(stream.getvalue()) > before
