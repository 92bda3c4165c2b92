"""Several processes as one run, on one host or on many: how they find each other, and how they end.

JAX's own runtime does the work: its coordination service, which process 0 holds, lets the others in, sees who dies, and agrees on
the step at which a run that is asked to stop is saved. jax is imported when `start` is called.
"""

import atexit
import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from fps_jax.progress import started
from fps_train.host_options import HostOptions

HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead, and the others end
_GRACE = 60  # seconds that jax would go on trying after `timeout`, when we have given up already
_WORDS = 3  # seconds for the last words to get through to stderr
_LAST = 3  # seconds that process 0 stays after an error: whoever has the same one should say that, not that process 0 is gone
_LOST = "another process of this run ended or can't be reached, see its own output; --resume goes on from the newest checkpoint"
# What XLA writes, with a stack trace, before it aborts because the coordination service said so.
_FATAL = re.compile(rb"^F\d{4} .*distributed service detected fatal errors")
# Waits for the last words, where stderr goes through a process of its own.
_drain: Callable[..., None] | None = None
# What a collective says that lost a peer; and so as a ValueError, which jit makes of what XLA for CPUs finds at once.
_BROKEN = re.compile(r"gloo|nccl|connection closed|connection reset|coordination service|UNAVAILABLE", re.IGNORECASE)
_BROKEN_AT_ONCE = re.compile(r"[A-Z_]+: (Gloo|NCCL) ")


def start(options: HostOptions) -> None:
    """Joins the others, before anything else is asked of jax.

    Raises: ValueError where nothing tells who the others are. Ends the process, with one line and status 2, where not all of them
      are there after `options.timeout` seconds.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of what XLA itself says of a lost peer, one line is ours
    _one_line_for_fatal()
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # GPUs have NCCL
    number, count = options.process_id, options.num_processes
    who = "" if number is None else f"process {number} of {count} "
    where = "" if options.coordinator_address is None else f" at {options.coordinator_address}"

    def give_up():
        if options.detect:
            why = "not all processes of the job came together; is each of them running, and does the network let them through?"
        elif number == 0:
            why = f"not all of the other {(count or 1) - 1} came to it{where}"
        else:
            why = f"found no coordinator{where} with all processes; that is process 0, its port must be open to the others"
        _exit(f"{who}waited {options.timeout} s: {why}")

    # jax's own end of the wait is an abort, which no caller can catch.
    timer = threading.Timer(options.timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            options.coordinator_address,
            count,
            number,
            cluster_detection_method=None if options.detect else "deactivate",
            initialization_timeout=options.timeout + _GRACE,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        if options.detect and isinstance(error, ValueError):
            raise ValueError(
                f"hosts.detect found no Slurm step, Open MPI or Kubernetes job ({first}); start with srun or mpirun, or give "
                "--hosts.coordinator-address, --hosts.num-processes and --hosts.process-id"
            ) from None
        raise ValueError(f"{who}can't join the others{where}: {first}") from None
    finally:
        timer.cancel()
    if jax.process_index():
        started()  # process 0 speaks for all
    sizes = {device.process_index: 0 for device in jax.devices()}
    for device in jax.devices():
        sizes[device.process_index] += 1
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"process {i} has {size}" for i, size in sorted(sizes.items()))
        raise ValueError(f"processes have different numbers of devices ({each}); give all the same")


def leave(status: int) -> None:
    """Ends this process's part. With another status than 0 it ends the process: the others see that, and end too."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return
    if status:
        if jax.process_index() == 0:
            time.sleep(_LAST)
        _exit(None, status)
    jax.distributed.shutdown()


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Raises ConnectionError, in one line, where a collective in the block lost a peer."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError is the first
        if not lost_peer(error):
            raise
        first = str(error).strip().splitlines()[0][:200]  # NCCL says here what else may be wrong
        raise ConnectionError(f"{_LOST} ({first})") from error


def lost_peer(error: Exception) -> bool:
    """Whether an error is a collective's that lost a peer."""
    import jax

    if jax.process_count() == 1:
        return False
    if isinstance(error, ValueError):
        return _BROKEN_AT_ONCE.match(str(error)) is not None
    return isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None


def _exit(line: str | None, status: int = 2) -> None:
    """At once: an ordinary end would wait for the others."""
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if _drain is not None:
        # All is said: where XLA aborts in these moments, its report would go past the process that takes it out.
        _drain(os.open(os.devnull, os.O_WRONLY))
    os._exit(status)


def _one_line_for_fatal() -> None:
    """From here on stderr goes through a process of its own, which says `_LOST` for XLA's report of a lost peer.

    XLA aborts in a thread of its own: nothing in this process can say anything any more then.
    """
    global _drain
    read, write = os.pipe()
    direct = os.dup(2)
    child = os.fork()  # no thread has been started yet
    if child:
        os.close(read)
        os.dup2(write, 2)
        os.close(write)
        # A container ends all that is in it with its first process, which may be this one.
        _drain = functools.partial(_wait_for_words, child)
        atexit.register(_drain, direct)
        return
    with contextlib.suppress(BaseException):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the last words are still to come
        os.close(write)
        _filter(read, 2)
    os._exit(0)


def _wait_for_words(child: int, after: int) -> None:
    """Until the process that stderr goes through has written all and ended, or `_WORDS` have passed.

    after: where stderr goes from now on.
    """
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.dup2(after, 2)  # closes the pipe, which the child reads to its end
        until = time.monotonic() + _WORDS
        while os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() < until:
            time.sleep(0.01)


def _filter(source: int, target: int) -> None:
    """Copies lines; of XLA's report of a lost peer and what follows only `_LOST`, and that once."""
    fatal = told = False
    with os.fdopen(source, "rb") as lines:
        for line in lines:
            fatal = fatal or _FATAL.search(line) is not None
            if not fatal:
                told = told or _LOST.encode() in line
                os.write(target, line)
    if fatal and not told:
        os.write(target, f"error: {_LOST}\n".encode())
