"""Time by stage. Code says which stage it is in (`stage`); a profile, where one is being made, notes it, and `profile` makes one.

A stage is the host's time from its begin to its end: whoever opens one waits in it for what it starts on the device. Programs are
the same with a profile and without.
"""

import contextlib
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fps_jax.files import new_directory, write_bytes, write_json
from fps_jax.profiling.page import page

TRACED_BLOCKS = 3  # of a stream that are in the trace: it is held in memory until it is written
_MOST_SPANS = 20_000  # that are kept one by one; of those behind them the sums are
_COMPILING = (
    "/jax/core/compile/"  # jax.monitoring's events of tracing, lowering and compiling, or loading what was compiled
)


class Stage(Protocol):
    """What `stage` gives: a context, which takes notes of steps within it."""

    def __enter__(self) -> "Stage": ...
    def __exit__(self, *error: object) -> None: ...
    def step(self, done: int) -> None:
        """A step has ended, `done` so far. May be called from another thread."""


class _Unnoticed:
    """A stage that nobody measures."""

    def __enter__(self) -> "_Unnoticed":
        return self

    def __exit__(self, *error: object) -> None: ...

    def step(self, done: int) -> None: ...


_UNNOTICED = _Unnoticed()
_active: "_Profile | None" = None


def stage(name: str, block: int | None = None) -> Stage:
    """A context whose time is that of a stage, if a profile is being made; else one that does nothing.

    Args:
      name: of the stage. One within another's is taken out of its time.
      block: of a stream, which one, from 0.
    """
    profile = _active  # once: another thread may end it
    return _UNNOTICED if profile is None else _Span(profile, name, block)


@dataclass
class _Sum:
    """A stage's spans together. begin: of the first. later: seconds of those after it."""

    begin: float
    calls: int = 0
    seconds: float = 0.0
    compiling: float = 0.0
    later: float = 0.0


@dataclass
class _Profile:
    """What a run has shown so far.

    Attributes:
      compiling: intervals of time in which something compiled, apart from each other, rising.
      open: the stages that each thread is in, outermost first.
    """

    traced_blocks: int
    begin: float = 0.0
    end: float = 0.0
    sums: dict[str, _Sum] = field(default_factory=dict)
    spans: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    compiling: list[tuple[float, float]] = field(default_factory=list)
    open: dict[int, list["_Span"]] = field(default_factory=dict)
    traced: float | None = None
    tracing: bool = False
    lock: Any = field(default_factory=threading.RLock)

    def compiled(self, event: str, duration_secs: float, **_: Any) -> None:
        """A listener of jax.monitoring: events come as they end, inner ones before those around them."""
        if not event.startswith(_COMPILING):
            return
        end = time.perf_counter()
        begin = max(end - duration_secs, self.begin)
        with self.lock:
            while self.compiling and self.compiling[-1][0] >= begin:
                end = max(end, self.compiling.pop()[1])
            if self.compiling and self.compiling[-1][1] > begin:
                begin = self.compiling.pop()[0]
            self.compiling.append((begin, end))

    def compiling_in(self, begin: float, end: float) -> float:
        """Seconds of an interval in which something compiled."""
        seconds = 0.0
        with self.lock:
            for first, last in reversed(self.compiling):
                if last <= begin:
                    break
                seconds += max(0.0, min(last, end) - max(first, begin))
        return seconds

    def add(self, name: str, begin: float, seconds: float, compiling: float, span: dict[str, Any]) -> None:
        """Takes a stage's span that has ended."""
        with self.lock:
            total = self.sums.setdefault(name, _Sum(begin))
            total.calls += 1
            total.seconds += seconds
            total.compiling += compiling
            total.later += seconds if total.calls > 1 else 0.0
            if len(self.spans) < _MOST_SPANS:
                self.spans.append(span)
            else:
                self.left_out += 1

    def start_trace(self, folder: pathlib.Path) -> None:
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of a Python function: gigabytes, and it slows what it measures
        try:
            jax.profiler.start_trace(str(folder), profiler_options=options)
        except RuntimeError as error:
            raise ValueError(f"a trace can't be made ({error}); end the one that is under way") from None
        self.tracing = True

    def end_trace(self) -> None:
        """Ends the trace before the run does; that it is written then is a stage of its own."""
        if self.tracing:
            with _Span(self, "write trace", None):
                self.stop_trace()

    def stop_trace(self) -> None:
        import jax

        if self.tracing:
            self.tracing = False
            self.traced = time.perf_counter() - self.begin
            jax.profiler.stop_trace()

    def record(self, what: str) -> dict[str, Any]:
        """For JSON."""
        import jax

        import fps_jax

        whole = self.end - self.begin
        named = sum(one.seconds for one in self.sums.values())
        compiling = self.compiling_in(self.begin, self.end)
        device = jax.local_devices()[0]
        return {
            "what": what,
            "seconds": round(whole, 6),
            "compile_seconds": round(compiling, 6),
            "stages": {
                name: {
                    "calls": one.calls,
                    "seconds": round(one.seconds, 6),
                    "compile_seconds": round(one.compiling, 6),
                    "later_mean": round(one.later / (one.calls - 1), 6) if one.calls > 1 else None,
                }
                for name, one in sorted(self.sums.items(), key=lambda item: item[1].begin)
            },
            "other_seconds": round(max(0.0, whole - named), 6),
            "spans": self.spans,
            "spans_left_out": self.left_out,
            "trace_seconds": None if self.traced is None else round(self.traced, 6),
            "notes": {
                "seconds": "of the host's clock; of a stage, without the stages within it. A stage waits for its device",
                "compile_seconds": "of these, tracing, lowering and compiling, or loading compiled programs (jax.monitoring)",
                "later_mean": "of a stage's calls after the first",
                "steps": "each as [steps done, seconds since the one before, compile_seconds of these]",
                "trace_seconds": "from the beginning, that the jax.profiler trace in plugins/ covers",
            },
            "versions": {
                "fps_jax": fps_jax.__version__,
                "jax": jax.__version__,
                "python": sys.version.split()[0],
            },
            "device": f"{device.platform} {device.device_kind}",
        }


class _Span:
    """A stage, measured."""

    def __init__(self, profile: _Profile, name: str, block: int | None):
        self._profile, self._name, self._block = profile, name, block
        self._inner = self._inner_compiling = 0.0
        self._steps: list[tuple[int, float]] = []
        self._annotation: Any = None

    def __enter__(self) -> "_Span":
        import jax

        profile = self._profile
        if self._block is not None and self._block >= profile.traced_blocks:
            profile.end_trace()
        self._annotation = jax.profiler.TraceAnnotation(self._name)
        self._annotation.__enter__()
        self._around = profile.open.setdefault(threading.get_ident(), [])
        self._around.append(self)
        self._begin = time.perf_counter()
        return self

    def step(self, done: int) -> None:
        self._steps.append((done, time.perf_counter()))

    def __exit__(self, *error: Any) -> None:
        end, profile = time.perf_counter(), self._profile
        self._annotation.__exit__(*error)
        self._around.remove(self)
        seconds, compiling = end - self._begin, profile.compiling_in(self._begin, end)
        if self._around:
            outer = self._around[-1]
            outer._inner += seconds
            outer._inner_compiling += compiling
        own, own_compiling = seconds - self._inner, max(0.0, compiling - self._inner_compiling)
        span = {
            "stage": self._name,
            **({} if self._block is None else {"block": self._block}),
            "begin": round(self._begin - profile.begin, 6),
            "seconds": round(own, 6),
            "compile_seconds": round(own_compiling, 6),
            **({"steps": self._timed_steps()} if self._steps else {}),
        }
        profile.add(self._name, self._begin, own, own_compiling, span)

    def _timed_steps(self) -> list[list[float]]:
        before, timed = self._begin, []
        for done, at in list(self._steps):
            timed.append([done, round(at - before, 6), round(self._profile.compiling_in(before, at), 6)])
            before = at
        return timed


@contextlib.contextmanager
def profile(
    folder: str | os.PathLike | None, what: str = "", *, overwrite: bool = False, traced_blocks: int = TRACED_BLOCKS
) -> Iterator[None]:
    """Measures what runs in the block, and writes it when the block ends well.

    Args:
      folder: new or empty: gets profile.json (seconds by stage, step and block, compilation apart), profile.html (the same to look
        at, in one file) and a trace of `jax.profiler` (for XProf or TensorBoard). None measures nothing.
      what: the title.
      overwrite: replace a folder that isn't empty.
      traced_blocks: of a stream, how many the trace covers; all before them, and all of a run that is no stream, are in it.
    Raises: as `fps_jax.files.new_directory`; ValueError where a profile or a trace is under way already.
    """
    global _active
    if folder is None:
        yield
        return
    if _active is not None:
        raise ValueError("a profile is being made already; end it before another one")
    import jax

    with new_directory(folder, overwrite=overwrite) as fresh:
        jax.local_devices()  # starts the backend, which is no stage
        made = _Profile(traced_blocks)
        made.start_trace(fresh)
        made.begin = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(made.compiled)
        _active = made
        try:
            yield
            made.end = time.perf_counter()
        finally:
            _active = None
            jax.monitoring.unregister_event_duration_listener(made.compiled)
            made.stop_trace()
        record = made.record(what)
        write_json(record, fresh / "profile.json")
        write_bytes(fresh / "profile.html", page(record).encode())
