"""What is said of work under way: a clock that goes on, lines in a log."""

import io
import itertools
import os
import subprocess
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
    monkeypatch.setattr(progress, "LINE", 0.1)
    with progress.progress_bar("denoise", True) as update:
        time.sleep(0.5)  # nothing moves: a line every 0.1 s
        for done in range(1, 51):
            update(done, 50)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("denoise ... ")
    assert lines[-1].startswith("denoise: 50 of 50 ")
    assert 3 <= len(lines) <= 8  # not one for each of fifty steps in no time
    assert not set("\r\x1b█") & set(stream.getvalue())


def test_lines_of_work_that_stands_are_close_while_watched_then_rare():
    said, times = 0.0, []
    while said < 3600:
        said += progress.still(said)
        times.append(said)
    gaps = [after - before for before, after in itertools.pairwise([0.0, *times])]
    assert max(gap for gap, end in zip(gaps, times, strict=True) if end <= 300) < 2
    assert gaps == sorted(gaps)
    assert gaps[-1] == 60
    assert len(times) < 300  # an hour's


def test_what_moves_is_told_soon_while_watched_then_now_and_then(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", Stream(False))
    times = []
    monkeypatch.setattr(sys.stderr, "write", lambda text: times.append(now) if text.strip() else None)
    with progress.amount_bar("encode clips", 7000) as advance:
        for tenth in range(6000):
            now = tenth / 10
            advance(1)
    gaps = [(before, after - before) for before, after in itertools.pairwise([0.0, *dict.fromkeys(times)])]
    assert max(gap for begin, gap in gaps if begin < 298) < 2
    assert min(gap for begin, gap in gaps if begin > 300) > 29


def test_an_amount_is_told_in_whole_lines_in_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Stream(False))
    monkeypatch.setattr(progress, "LOG", 0.0)
    monkeypatch.setattr(progress, "WATCHED", 0.0)
    with progress.amount_bar("encode clips", 8) as advance:
        advance(2, "1 of 4 clips")
        advance(6, "4 of 4 clips")
    with progress.amount_bar("encode texts", 2, unit="text") as advance:
        advance(2)
    lines = [line.rsplit(" ", 2)[0] for line in stream.getvalue().splitlines()]  # without the clock
    assert lines == [
        "encode clips: 25% (1 of 4 clips, 0 s left)",
        "encode clips: 100% (4 of 4 clips)",
        "encode texts: 2 of 2 texts",
    ]
    assert not set("\r\x1b█") & set(stream.getvalue())


def test_a_bars_clock_goes_on_while_nothing_moves(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Stream(True))
    with progress.amount_bar("encode clips", 8):
        before = stream.getvalue()
        time.sleep(1.2)
        assert len(stream.getvalue()) > len(before)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_waited_for_is_told_when_it_takes_long(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal))
    with progress.waiting("block 1"):
        time.sleep(0.7)
    assert stream.getvalue() == ""
    monkeypatch.setattr(progress, "LINE", 0.1)
    with progress.waiting("block 2"):
        time.sleep(0.7)
        assert "block 2 ... " in stream.getvalue()
    if terminal:
        assert not stream.getvalue().split("\r")[-1].strip()  # gone


_SLOW = (
    "import sys, time\n"
    "from fps_jax import progress\n"
    "progress._START = float(sys.argv[1])\n"
    "from fps_jax.errors import run_cli\n"
    "def main(arguments):\n"
    "    assert not arguments\n"
    "    time.sleep(0.4)\n"
    "    print('a table')\n"
    "    time.sleep(0.4)\n"
    "sys.argv[1:] = []\n"
    "sys.exit(run_cli(main))\n"
)


def test_a_command_that_starts_slowly_says_so_until_its_own_first_word():
    done = subprocess.run([sys.executable, "-c", _SLOW, "0.1"], capture_output=True, text=True, check=True)
    assert done.stdout == "a table\n"
    assert done.stderr == "starting ... 0 s\n"  # once: the next would be 1.5 s later, and the table comes before


def test_a_command_that_starts_fast_says_nothing_of_it():
    done = subprocess.run([sys.executable, "-c", _SLOW, "9"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("a table\n", "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("terminal", [False, True])
def test_the_first_word_on_either_stream_ends_the_start(monkeypatch, stream, terminal):
    out, err = Stream(terminal), Stream(terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(progress, "_START", 0.0)
    with progress.starting():
        time.sleep(0.3)
        told = err.getvalue()
        print("own", file=getattr(sys, stream))
        said = err.getvalue()
        time.sleep(0.3)
        assert err.getvalue() == said
    assert "starting ... 0 s" in told
    assert (sys.stdout, sys.stderr) == (out, err)
    if terminal:  # gone before the word
        assert not said.removeprefix(told).removesuffix("own\n").split("\r")[-1].strip()
        assert "\r" in said.removeprefix(told)
    assert out.getvalue() == ("own\n" if stream == "stdout" else "")


def test_a_process_that_another_one_speaks_for_says_no_more_that_it_starts(monkeypatch):
    progress.started()  # also where nothing was said
    monkeypatch.setattr(sys, "stderr", err := Stream(False))
    monkeypatch.setattr(progress, "_START", 0.0)
    monkeypatch.setattr(progress, "LINE", 0.1)
    with progress.starting():
        time.sleep(0.3)
        progress.started()
        said = err.getvalue()
        time.sleep(0.3)
    assert "starting ... 0 s" in said
    assert err.getvalue() == said


@pytest.mark.parametrize("terminal", [False, True])
def test_what_begins_in_silence_is_told_the_sooner(monkeypatch, terminal):
    """Two waits of a second each are two seconds for whoever looks on."""
    monkeypatch.setattr(sys, "stdout", Stream(terminal))
    monkeypatch.setattr(sys, "stderr", err := Stream(terminal))
    monkeypatch.setattr(progress, "LINE", 0.8)
    with progress.starting():
        print("own")
        with progress.waiting("noise"):
            time.sleep(0.5)
        with progress.waiting("encode"):
            time.sleep(0.55)
        assert "encode ... " in err.getvalue()
        print("own", file=sys.stderr)
        said = err.getvalue()
        with progress.waiting("denoise"):
            time.sleep(0.5)
        assert err.getvalue() == said
    assert "noise" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the age of a process isn't asked for")
def test_the_seconds_before_a_command_could_say_anything_count():
    code = "import time; time.sleep(0.5); from fps_jax import progress; print(progress._age())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 <= float(done.stdout) <= 1


def test_a_start_without_a_word_leaves_the_streams_as_they_were(monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := Stream(True))
    monkeypatch.setattr(sys, "stderr", err := Stream(True))
    with pytest.raises(ValueError, match="no"), progress.starting():
        raise ValueError("no")
    assert (sys.stdout, sys.stderr) == (out, err)
    assert (out.getvalue(), err.getvalue()) == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_work_goes_on_where_nobody_reads_of_it(monkeypatch, terminal):
    class Broken(Stream):
        def write(self, text=""):
            raise BrokenPipeError(32, "Broken pipe")

        flush = write

    monkeypatch.setattr(sys, "stderr", Broken(terminal))
    monkeypatch.setattr(progress, "LINE", 0.0)
    with progress.progress_bar("denoise", True) as update:
        update(1, 2)
        update(2, 2)
    with progress.bytes_bar("read", 2) as moved:
        moved(2)


@pytest.mark.parametrize(("closed", "status"), [("stdout", 0), ("stderr", 0), ("both", 0), ("other", 2)])
def test_the_exit_status_where_a_pipe_is_closed(closed, status):
    """`| head` ends what prints and is no error; a closed stderr ends nothing; any other pipe is a failure."""
    code = (
        "import os, sys\n"
        "from fps_jax.errors import run_cli\n"
        "from fps_jax.progress import progress_bar\n"
        "def main(_):\n"
        "    with progress_bar('work', True) as bar:\n"
        "        bar(1, 1)\n"
        "    if sys.argv[1] == 'stdout':\n"
        "        print('x' * 100_000, flush=True)\n"
        "    if sys.argv[1] == 'other':\n"
        "        read, write = os.pipe()\n"
        "        os.close(read)\n"
        "        os.write(write, b'x')\n"
        "    os.write(int(sys.argv[2]), b'done')\n"
        "sys.exit(run_cli(main, []))\n"
    )
    read, write = os.pipe()
    os.close(read)
    here, there = os.pipe()
    out = write if closed in ("stdout", "both") else subprocess.DEVNULL
    err = write if closed in ("stderr", "both") else subprocess.DEVNULL
    done = subprocess.run(
        [sys.executable, "-c", code, closed, str(there)], stdout=out, stderr=err, pass_fds=[there], check=False
    )
    os.close(there)
    os.close(write)
    with open(here, "rb") as told:
        assert told.read() == (b"done" if closed in ("stderr", "both") else b"")
    assert done.returncode == status


def test_the_clock_of_a_bar_goes_on_while_nothing_moves(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Stream(True))
    with progress.progress_bar("denoise", None):
        before = len(stream.getvalue())
        deadline = time.monotonic() + 30
        while len(stream.getvalue()) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(stream.getvalue()) > before
