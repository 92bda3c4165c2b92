"""Work that is broken off once, as by Ctrl-C."""

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
