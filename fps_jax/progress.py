"""How long work says how far it is: a function to call, a bar on the terminal that is one, and lines where there is no terminal."""

import contextlib
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

Progress = Callable[[int, int], None]  # (done, in all), of whatever is counted: steps, chunks of frames
Moved = Callable[[int], object]  # bytes read or written since the last call
# Whoever watches hears within two seconds that work goes on, also where other processes have the cores: a beat is late then.
LINE = 1.5  # seconds between lines, and before the first
WATCHED = 300.0  # seconds that it is so; of what takes longer, a log of hours isn't to hold as many
LONGEST = 60.0  # seconds between lines of work that stands, which grow from `LINE` to these
LOG = 30.0  # seconds between lines of work that moves, where it takes hours
_START = 1.6  # seconds of its process before a command says that it starts

_word: contextlib.ExitStack | None = None  # ends what `starting` says, while it may say anything
_heard: float | None = None  # when a command wrote last, to either stream; None where nobody watches them (`starting`)


class Quiet:
    """A stream that drops what can't be written: where nobody reads what is said of work (`| head`), the work goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def progress_bar(label: str, show: bool | None) -> Iterator[Progress]:
    """A `Progress` that moves a bar on stderr, whose clock goes on while nothing moves: a first step compiles for minutes.

    show: None for only on a terminal; True writes whole lines where there is none, so that a log holds no bar.
    """
    terminal = sys.stderr.isatty()
    if show is False or (show is None and not terminal):
        yield lambda done, total: None
        return
    with _bar(label) if terminal else _lines(label) as update:
        yield update


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(desc=label, dynamic_ncols=True, file=Quiet(sys.stderr)) as bar, repeated(bar.refresh, 1.0):

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextlib.contextmanager
def _lines(label: str) -> Iterator[Progress]:
    with _told(label) as tell:
        yield lambda done, total: tell(f"{label}: {done} of {total}", done >= total)


@contextlib.contextmanager
def _told(label: str, least: float | None = None, first: float | None = None) -> Iterator[Callable[[str, bool], None]]:
    """Whole lines on stderr. Yields tell(state, last): said now if it is the last, else not sooner than may be.

    Args:
      least: seconds between two of them while something moves, once it has been watched; None for `LINE`.
      first: seconds before the first; None for `LINE`.
    """
    start = said = moved = time.monotonic()
    wait, state = LINE if first is None else first, f"{label} ..."
    lock, out = threading.Lock(), Quiet(sys.stderr)

    def say() -> None:
        nonlocal said
        said = _hear()
        print(f"{state} {said - start:.0f} s", file=out, flush=True)

    def beat() -> None:
        nonlocal wait
        with lock:
            if silence(said) >= wait:
                say()
                wait = max(wait, still(said - moved))

    def tell(now: str, last: bool) -> None:
        nonlocal wait, state, moved
        with lock:
            moved = time.monotonic()
            state, wait = now, moving(moved - start, LINE if least is None else least)
            if last or max(moved - said, silence(said)) >= wait:
                say()

    with repeated(beat, LINE / 10):
        yield tell


def _hear() -> float:
    """Now, when something is said."""
    global _heard
    now = time.monotonic()
    if _heard is not None:
        _heard = now
    return now


def silence(said: float) -> float:
    """Seconds since a command wrote something, whoever of it; since `said` where nobody knows."""
    return time.monotonic() - (said if _heard is None else _heard)


def still(seconds: float) -> float:
    """Seconds to the next line of work that has stood for so many."""
    return LINE if seconds < WATCHED else min(seconds - WATCHED + 2 * LINE, LONGEST)


def moving(seconds: float, least: float) -> float:
    """Seconds between lines of work that moves and began so many ago. least: once it has been watched."""
    return LINE if seconds < WATCHED else least


@contextlib.contextmanager
def waiting(label: str, *, show: bool | None = True, first: float | None = None) -> Iterator[None]:
    """What is waited for, on stderr, where that takes long; gone from a terminal when the block ends.

    Args:
      show: as of `progress_bar`.
      first: seconds before it is said; None for `LINE`.
    """
    terminal = sys.stderr.isatty()
    if show is False or (show is None and not terminal):
        yield
        return
    with _clock(label, first) if terminal else _told(label, first=first):
        yield


@contextlib.contextmanager
def _clock(label: str, first: float | None) -> Iterator[None]:
    """A line on a terminal whose clock goes on. No tqdm: a command that starts shouldn't wait for it."""
    start, out = time.monotonic(), Quiet(sys.stderr)
    shown, said, first = 0, start, LINE if first is None else first

    def alone() -> bool:
        """Whether what it said last still stands there, at the end."""
        return shown > 0 and (_heard is None or _heard <= said)

    def beat() -> None:
        nonlocal shown, said
        if alone() or silence(start) >= first:
            said = _hear()
            text = f"{label} ... {said - start:.0f} s"
            shown = len(text)
            print(f"\r{text}", end="", file=out, flush=True)
            said = _hear()

    try:
        with repeated(beat, min(0.5, first / 5)):
            yield
    finally:
        if alone():
            print(f"\r{' ' * shown}\r", end="", file=out, flush=True)


class _Watched:
    """A stream that notes when it is written to. first: called before; the first time it ends what is said until then."""

    def __init__(self, stream: TextIO, first: Callable[[], object]):
        self._stream, self._first = stream, first

    def write(self, text: str) -> int:
        self._note()
        return self._stream.write(text)

    def _note(self) -> None:
        self._first()
        _hear()

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "writelines"):  # what writes past `write`
            self._note()
        return getattr(self._stream, name)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Says that a command starts, where its imports and the opening of its files take long, until it says something itself.

    Both streams are stood in for while the block runs, so that all else here knows when anything was said last: what begins to be
    waited for in silence is told the sooner.
    """
    global _heard, _word
    streams = sys.stdout, sys.stderr
    if None in streams:  # a process without them
        yield
        return
    _heard = time.monotonic()
    with contextlib.ExitStack() as word, contextlib.ExitStack() as both:
        _word = word
        word.enter_context(waiting("starting", first=max(_START - _age(), 0.1)))  # on the stream itself
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            watched = _Watched(stream, word.close)
            setattr(sys, name, watched)
            both.callback(_restore, name, watched, stream)
        try:
            yield
        finally:
            _heard = _word = None


def started() -> None:
    """Ends what `starting` says. For a process of several that says nothing more, as another one speaks for all."""
    if _word is not None:
        _word.close()


def _age() -> float:
    """Seconds since this process began, up to one: so many pass on a busy machine before it can say anything. Else 0."""
    try:
        started = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # proc(5): starttime
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # no Linux
        return 0.0
    return min(max(age, 0.0), 1.0)


def _restore(name: str, watched: _Watched, stream: TextIO) -> None:
    if getattr(sys, name) is watched:  # whoever put another there keeps it
        setattr(sys, name, stream)


@contextlib.contextmanager
def repeated(call: Callable[[], object], seconds: float) -> Iterator[None]:
    """Calls it again and again from another thread while the block runs."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            call()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def bytes_bar(label: str, total: int) -> Iterator[Moved]:
    """What takes long, on stderr: a bar that is gone when the block ends, or lines where that is no terminal."""
    if not sys.stderr.isatty():
        with _told(label) as tell:
            yield _share(label, total, tell)
        return
    from tqdm import tqdm

    start, out = time.monotonic(), Quiet(sys.stderr)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=LINE, leave=False, file=out) as bar:

        def beat() -> None:
            if time.monotonic() - start >= LINE:
                bar.refresh()

        try:
            with repeated(beat, 0.5):
                yield bar.update
        finally:
            bar.clear()  # closing it doesn't, where it was refreshed alone


def _share(label: str, total: int, tell: Callable[[str, bool], None]) -> Moved:
    done = 0

    def moved(amount: int) -> None:
        nonlocal done
        done += amount
        tell(f"{label}: {done / max(total, 1):.0%}", False)

    return moved


@contextlib.contextmanager
def amount_bar(label: str, total: int, *, unit: str | None = None) -> Iterator[Callable[..., None]]:
    """Progress with the time left, on stderr: a bar whose clock goes on, or a line every half minute where that is no terminal.

    Yields advance(amount, note=""). unit: what is counted; None for something that only a share of is shown.
    """
    if not sys.stderr.isatty():
        with _amount_lines(label, total, unit) as advance:
            yield advance
        return
    from tqdm import tqdm

    shape = None if unit else "{desc}: {percentage:3.0f}%|{bar:20}| {postfix} [{elapsed}<{remaining}]"
    with (
        tqdm(
            desc=label, file=Quiet(sys.stderr), total=total, unit=unit or "", dynamic_ncols=True, bar_format=shape
        ) as bar,
        repeated(bar.refresh, 1.0),
    ):

        def advance(amount: int, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(amount)

        yield advance


@contextlib.contextmanager
def _amount_lines(label: str, total: int, unit: str | None) -> Iterator[Callable[..., None]]:
    start, done = time.monotonic(), 0
    with _told(label, LOG) as tell:

        def advance(amount: int, note: str = "") -> None:
            nonlocal done
            done += amount
            share = done / max(total, 1)
            text = f"{label}: {done} of {total} {unit}s" if unit else f"{label}: {share:.0%}"
            if 0 < share < 1:
                note = f"{note}, {(time.monotonic() - start) * (1 / share - 1):.0f} s left".removeprefix(", ")
            tell(f"{text}{f' ({note})' if note else ''}", done >= total)

        yield advance
