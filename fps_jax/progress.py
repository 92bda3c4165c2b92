"""How long work says how far it is: a function to call, a bar on the terminal that is one, and lines where there is no terminal."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

Progress = Callable[[int, int], None]  # (done, in all), of whatever is counted: steps, chunks of frames
Moved = Callable[[int], object]  # bytes read or written since the last call
LINE = 2.0  # seconds between lines; while nothing moves, twice as many after each, up to a minute
LONGEST = 60.0
_LOG = 30.0  # seconds between lines of an amount of work that takes hours


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
def _told(label: str, least: float | None = None) -> Iterator[Callable[[str, bool], None]]:
    """Whole lines on stderr. Yields tell(state, last): said now if it is the last, else not sooner than may be.

    least: seconds between two of them while something moves; None for `LINE`.
    """
    start = said = time.monotonic()
    wait, state = LINE, f"{label} ..."
    lock = threading.Lock()

    def say() -> None:
        nonlocal said
        said = time.monotonic()
        print(f"{state} {said - start:.0f} s", file=Quiet(sys.stderr), flush=True)

    def beat() -> None:
        nonlocal wait
        with lock:
            if time.monotonic() - said >= wait:
                wait = max(wait, min(2 * wait, LONGEST))
                say()

    def tell(now: str, last: bool) -> None:
        nonlocal wait, state
        with lock:
            state, wait = now, LINE if least is None else least
            if last or time.monotonic() - said >= wait:
                say()

    with repeated(beat, LINE / 2):
        yield tell


@contextlib.contextmanager
def waiting(label: str) -> Iterator[None]:
    """What is waited for, on stderr, where that is longer than two seconds; gone from a terminal when the block ends."""
    if not sys.stderr.isatty():
        with _told(label):
            yield
        return
    from tqdm import tqdm

    start = time.monotonic()
    shape = "{desc} ... {elapsed}"
    with tqdm(desc=label, file=Quiet(sys.stderr), dynamic_ncols=True, delay=LINE, leave=False, bar_format=shape) as bar:

        def beat() -> None:
            if time.monotonic() - start >= LINE:
                bar.refresh()

        try:
            with repeated(beat, 0.5):
                yield
        finally:
            if time.monotonic() - start >= LINE:
                bar.clear()  # closing it doesn't, where it was refreshed alone


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
    """A bar on stderr for what takes longer than two seconds; only on a terminal, so that logs hold whole lines."""
    from tqdm import tqdm

    out = Quiet(sys.stderr)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=2, leave=False, disable=None, file=out) as bar:
        yield bar.update


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
    with _told(label, _LOG) as tell:

        def advance(amount: int, note: str = "") -> None:
            nonlocal done
            done += amount
            share = done / max(total, 1)
            text = f"{label}: {done} of {total} {unit}s" if unit else f"{label}: {share:.0%}"
            if 0 < share < 1:
                note = f"{note}, {(time.monotonic() - start) * (1 / share - 1):.0f} s left".removeprefix(", ")
            tell(f"{text}{f' ({note})' if note else ''}", done >= total)

        yield advance
