"""Orbax and TensorStore on a disk that is full or forbidden.

One OSError, and nothing that their threads say or write after it.
"""

import contextlib
import errno
import logging
import os
import pathlib
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

_STILL = 0.3  # seconds in which nothing new appears
_PATIENCE = 5.0

_hooked = threading.Lock()


def quiet_orbax() -> Any:
    """The module `orbax.checkpoint`, which is imported late: it takes two seconds, and most commands only read config.json."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells every step of a save, and what it raises too
    _ignore_late_writes()
    import orbax.checkpoint

    return orbax.checkpoint


@contextlib.contextmanager
def orbax_writes(directory: str | os.PathLike, full: str = "No space left on device") -> Iterator[None]:
    """A block in which Orbax writes below a directory.

    A write that fails leaves others under way: the block ends when they have, so that what is removed then stays removed.

    Args:
      directory: what an error names.
      full: what is said of a disk without room.
    Raises: OSError that names the directory, for a disk that is full or can't be written; what the block raises otherwise.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        for signs, number, reason in (
            (("No space left", "RESOURCE_EXHAUSTED: Error writing local file"), errno.ENOSPC, full),
            (("quota exceeded",), errno.EDQUOT, full),
            (("File too large",), errno.EFBIG, full),  # a limit of the process (ulimit -f) or of the file system
            (("Permission denied",), errno.EACCES, "can't be written"),
            (("Read-only file system",), errno.EROFS, "can't be written"),
        ):
            if any(sign in text for sign in signs) or (isinstance(error, OSError) and error.errno == number):
                _settle(pathlib.Path(directory))
                raise OSError(number, reason, str(directory)) from error
        raise


def _settle(directory: pathlib.Path) -> None:
    """Returns when no file has come, gone or grown for a while; writes can't be waited for by name once one has failed."""
    end = time.monotonic() + _PATIENCE
    before, since = None, time.monotonic()
    while time.monotonic() < end and time.monotonic() - since < _STILL:
        now = _listing(directory)
        if now != before:
            before, since = now, time.monotonic()
        time.sleep(0.02)


def _listing(directory: pathlib.Path) -> set[tuple[str, int]]:
    seen = set()
    for folder, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                seen.add((path := os.path.join(folder, name), os.stat(path).st_size))
    return seen


def _ignore_late_writes() -> None:
    """Has Python say nothing of a write that ends after another one failed: no one waits for it, and its asyncio loop is closed.

    TensorStore's own threads print that, whenever they come to it; the error itself is raised where it belongs.
    """
    with _hooked:
        told = sys.unraisablehook
        if getattr(told, "is_of_late_writes", False):
            return

        def hook(unraisable: Any) -> None:
            closed = unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"
            if not (closed and _in_asyncio(unraisable.exc_traceback)):
                told(unraisable)

        hook.is_of_late_writes = True  # pyright: ignore[reportFunctionMemberAccess]
        sys.unraisablehook = hook
        # The same of those that fail too, beside the first, and of those that never began.
        logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and "orbax" in record.getMessage()))
        warnings.filterwarnings("ignore", r"coroutine '\w*serialize.* was never awaited", RuntimeWarning)


def _in_asyncio(trace: Any) -> bool:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "asyncio" in trace.tb_frame.f_code.co_filename
