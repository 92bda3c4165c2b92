"""Runs a command in a process of its own, ends it and all it started at its time, and keeps what it said until then.

For what can hang: a kernel that waits for ever also keeps the process that launched it. The command says a result as a line of JSON
(`say`); what else it prints is kept for its failure only.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MARK = "RESULT "
_TAIL = 1500  # characters of an error that are kept
_LOOK = 0.1  # seconds between two looks at what was said


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command went.

    Attributes:
      said: its results.
      status: its exit status; negative for a signal.
      timed_out: it was ended at its time.
      seconds: that it took.
      complaint: the end of its stderr, or of stdout where that is empty.
      gone: False where it outlives SIGKILL, as in a driver call that never returns.
    """

    said: list[dict[str, Any]]
    status: int | None
    timed_out: bool
    seconds: float
    complaint: str
    gone: bool


def say(result: Mapping[str, Any]) -> None:
    """What a command that `run` started has to tell it."""
    sys.stdout.write(_MARK + json.dumps(_plain(result)) + "\n")  # in one call: two threads may have something to say
    sys.stdout.flush()


class Running:
    """A command under way in a process of its own, which can be heard, told a word, and ended with all that it started.

    Args: as of `run`. `listens`: it reads from stdin what `tell` says; otherwise stdin is this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: str | os.PathLike | None = None,
        listens: bool = False,
    ):
        # To files: what a process that hangs had written is there, and no pipe to a grandchild keeps us waiting.
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self._start, self._read, self._heard = time.monotonic(), 0, 0
        self._said: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE if listens else None,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )

    def hear(self) -> list[dict[str, Any]]:
        """The results that came since the last time; after `end` those that came until then."""
        if not self._out.closed:
            self._read, new = _results(self._out, self._read)
            self._said += new
        unheard, self._heard = self._said[self._heard :], len(self._said)
        return unheard

    def tell(self, line: str) -> None:
        """Writes a line to its stdin; nothing where it has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after that long at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll() is not None

    def end(self, *, timed_out: bool = False) -> Ended:
        """Ends it, and what it started. `timed_out`: what the record says of why."""
        gone = _end(self._process)
        self._read, new = _results(self._out, self._read)
        self._said += new
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with self._out, self._err:
            complaint = (_text(self._err) or _text(self._out))[-_TAIL:]
        return Ended(
            said=self._said,
            status=self._process.returncode,
            timed_out=timed_out,
            seconds=time.monotonic() - self._start,
            complaint=complaint,
            gone=gone,
        )


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    seconds: float = math.inf,
    silence: float = math.inf,
    hear: Callable[[dict[str, Any]], None] | None = None,
    folder: str | os.PathLike | None = None,
) -> Ended:
    """Runs the command, at most for `seconds`, and for `silence` seconds without a word.

    Args:
      environment: added to this process's.
      hear: called with each result as it comes.
      folder: to run it in; None for this process's.
    """
    start = heard = time.monotonic()
    timed_out = ended = False
    process = Running(command, environment=environment, folder=folder)

    def listen() -> None:
        nonlocal heard
        for result in process.hear():
            heard = time.monotonic()
            if hear is not None:
                hear(result)

    try:
        while not ended and not timed_out:
            ended = process.wait(max(0.0, min(_LOOK, start + seconds - time.monotonic())))
            listen()
            timed_out = not ended and time.monotonic() >= min(start + seconds, heard + silence)
        if ended:
            listen()
    finally:
        finished = process.end(timed_out=timed_out)
    return finished


def _end(process: subprocess.Popen) -> bool:
    """Ends the process and what it started; False where it outlives that."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        return False
    return True


def _results(file: Any, start: int) -> tuple[int, list[dict[str, Any]]]:
    """(where to go on, results) of the whole lines from byte `start`. By pread: the process writes at the same file position."""
    content = os.pread(file.fileno(), os.fstat(file.fileno()).st_size - start, start)
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.decode(errors="replace").splitlines()
    return start + len(whole), [json.loads(line[len(_MARK) :]) for line in lines if line.startswith(_MARK)]


def _text(file: Any) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _plain(value: Any) -> Any:
    """value as JSON can hold it: NumPy's numbers as Python's, tuples as lists, what is not finite in words."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
