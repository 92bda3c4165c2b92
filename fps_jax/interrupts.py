"""Ctrl-C while the main thread waits in compiled code, where no Python handler of it runs: seen from any thread."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_sigterm() -> None:
    """Has SIGTERM do in this process what Ctrl-C does: what is half-written is removed on the way out."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], bool]]:
    """A function that says whether a SIGINT or SIGTERM that means KeyboardInterrupt came since the block began.

    It means that by Python's own handler of SIGINT, or by that of `interrupt_on_sigterm`. Whoever set another one, to stop a server
    or to ask for another run say, deals with the signal in a way of their own, and the block goes on.

    Python's own handlers wait for the main thread to come back from where it is; the interpreter's C handler writes the signal's
    number to a pipe at once, and that is what is read here. In another thread than the main one, where signals can't be watched, it
    is always False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    ours = [number for number in _SIGNALS if signal.getsignal(number) in (signal.default_int_handler, _interrupt)]
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    came = [False]

    def interrupted() -> bool:
        with contextlib.suppress(OSError):
            numbers = os.read(read, 4096)
            came[0] |= any(number in numbers for number in ours)
            if before != -1:  # an event loop's, which wants to know too
                os.write(before, numbers)
        return came[0]

    try:
        yield interrupted
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        interrupted()
        os.close(read)
        os.close(write)
