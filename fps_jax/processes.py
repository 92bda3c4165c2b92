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
    print(_MARK + json.dumps(_plain(result)), flush=True)


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
    said: list[dict[str, Any]] = []
    read = 0

    def listen() -> None:
        nonlocal heard, read
        read, new = _results(out, read)
        for result in new:
            said.append(result)
            heard = time.monotonic()
            if hear is not None:
                hear(result)

    # To files: what a process that hangs had written is there, and no pipe to a grandchild keeps us waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=out, stderr=err, start_new_session=True
        )
        timed_out = gone = False
        try:
            while process.poll() is None and not timed_out:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, min(_LOOK, start + seconds - time.monotonic())))
                listen()
                late = time.monotonic() >= min(start + seconds, heard + silence)
                timed_out = late and process.poll() is None
        finally:
            gone = _end(process)
        listen()
        complaint = (_text(err) or _text(out))[-_TAIL:]
    return Ended(
        said=said,
        status=process.returncode,
        timed_out=timed_out,
        seconds=time.monotonic() - start,
        complaint=complaint,
        gone=gone,
    )


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
