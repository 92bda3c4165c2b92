"""One call of the benchmark on a GPU at a time: two would time each other, and write over each other's results."""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Iterator

LOCK = pathlib.Path(tempfile.gettempdir()) / "fps_benchmarks_gpu.lock"


class BusyError(Exception):
    """Another call has the machine's GPU; says which."""


@contextlib.contextmanager
def alone(command: str, path: pathlib.Path | None = None) -> Iterator[None]:
    """The machine's GPU for this call; the system gives it back however the process ends.

    Within a call, families take turns (`runner`). fps-tune, and what isn't of this project, aren't asked.

    Args:
      command: what the lock file says of its holder, beside its process. path: of the lock file, LOCK by default.
    Raises: BusyError where another call has it, OSError where the file can't be written.
    """
    path = LOCK if path is None else path
    # Not truncated before the lock is ours: it says who has it.
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(file.read(300).strip() or "of a moment ago") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}: {command}\n")
        file.flush()
        yield
        file.seek(0)
        file.truncate()
