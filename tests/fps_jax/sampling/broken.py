"""Work that is broken off once, as by Ctrl-C."""

import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any


def break_off(monkeypatch: Any, module: Any, name: str, call: int = 1) -> None:
    """Has that call of `module.name` raise KeyboardInterrupt, and all others do what they do."""
    real, calls = getattr(module, name), []

    def broken_off(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, broken_off)


def break_off_at_line(call: Callable[[], Any], functions: Iterable[Any], line: int) -> Any:
    """Calls, and raises KeyboardInterrupt before that of the lines which run in these functions, if there is one.

    Returns: what the call does; None where it was broken off.
    """
    lines, codes = itertools.count(1), [function.__code__ for function in functions]

    def before_line(*_: Any) -> None:
        if next(lines) == line:
            raise KeyboardInterrupt

    tool, event = sys.monitoring.PROFILER_ID, sys.monitoring.events.LINE
    sys.monitoring.use_tool_id(tool, "break off")
    sys.monitoring.register_callback(tool, event, before_line)
    try:
        for code in codes:
            sys.monitoring.set_local_events(tool, code, event)
        return call()
    except KeyboardInterrupt:
        return None
    finally:
        for code in codes:
            sys.monitoring.set_local_events(tool, code, 0)
        sys.monitoring.free_tool_id(tool)
