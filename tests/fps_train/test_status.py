"""How far a run is, in a log: a line at once, then not more often than it may, and the last."""

import itertools

import pytest

from fps_train import status

VALUES = {"loss": 0.12345, "seconds": 10.0, "tokens_per_second": 21840.0, "mfu": 0.412}


def test_a_log_has_a_line_now_and_then_with_what_is_left(capsys, monkeypatch):
    clock = itertools.chain([-500], itertools.count(10, 10))  # what compiling took is no part of what is left
    monkeypatch.setattr(status.time, "monotonic", lambda: float(next(clock)))
    with status.Status(0, 10, None) as told:
        for step in range(1, 11):
            told.step(step, VALUES)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {n} of 10" for n in (1, 4, 7, 10)]
    # Ten seconds a step: after four of ten, sixty are left.
    assert lines[1] == "step 4 of 10: loss 0.1235, 10 s a step, 21,840 tokens/s, MFU 41.2%, 0:01:00 left"
    assert lines[-1].endswith("0:00:00 left")


def test_a_log_says_what_is_waited_for(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    told = status.Status(0, 10, None)

    def said_within(seconds):
        nonlocal now
        for _ in range(seconds):
            now += 1
            told._beat()
        return capsys.readouterr().err.splitlines()

    assert said_within(300) == [f"step 1 of 10 ... {seconds} s" for seconds in range(2, 301, 2)]  # compiling
    # Nobody watches it any more: a line after 3 s, then ever rarer, up to a minute.
    gaps = [int(b.split()[-2]) - int(a.split()[-2]) for a, b in itertools.pairwise(said_within(400))]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 60
    told.step(1, VALUES | {"seconds": 0.3})
    capsys.readouterr()
    assert said_within(3) == ["step 2 of 10 ... 2 s"]  # another program
    told.step(2, VALUES)  # 10 seconds
    capsys.readouterr()
    assert said_within(39) == []  # what may be the next step
    assert said_within(1) == ["step 3 of 10 ... 40 s"]


def test_the_first_minutes_of_a_log_are_watched(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    told = status.Status(0, 1000, None)
    times = []
    for tenth in range(1, 3000):
        now = 1000 + tenth / 10
        told._beat()
        if tenth % 7 == 0:
            told.step(tenth // 7, VALUES | {"seconds": 0.7})
        if capsys.readouterr().err:
            times.append(now)
    assert max(b - a for a, b in itertools.pairwise([1000.0, *times, now])) < 2


def test_silence_is_silent(capsys):
    with status.Status(0, 1, False) as told:
        told.say("a line")
        told.step(1, VALUES)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "0:01:00"), (3599, "0:59:59"), (90061, "25:01:01")])
def test_clock(seconds, text):
    assert status._clock(seconds) == text
