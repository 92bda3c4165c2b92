"""What a page may say to the server: JSON over its WebSocket, checked here. docs/streaming.md lists both directions.

A message is an object with `type`. What is none is answered with a line, and the connection goes on.
"""

import json
from dataclasses import dataclass

from fps_jax.choices import Switch, check_choice, check_text

MAX_MESSAGE = 2**16  # bytes; a prompt is a few hundred
MAX_PROMPT = 8000  # characters; UMT5 reads 512 tokens
_MAX_CODECS = 16
_MAX_NUMBER = 1e9  # seconds, 30 years, and blocks; JSON has whole numbers that no float holds


@dataclass(frozen=True)
class Hello:
    """The first message. codecs: RFC 6381 names that the page can play, best first."""

    codecs: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """Begins a stream, or goes on with another prompt from the next block on (`Session.switch`)."""

    prompt: str
    how: Switch = "continue"


@dataclass(frozen=True)
class Buffered:
    """How far the page is: seconds that it has yet to show, when it had as many blocks."""

    seconds: float
    blocks: int


@dataclass(frozen=True)
class Pause:
    """No further block is asked for."""


@dataclass(frozen=True)
class Resume:
    """On with it."""


@dataclass(frozen=True)
class Stop:
    """The stream's end; a prompt begins another."""


Message = Hello | Prompt | Buffered | Pause | Resume | Stop
_PLAIN = {"pause": Pause, "resume": Resume, "stop": Stop}


def read(text: str | bytes | None) -> Message:
    """A message of a page. Raises ValueError, in one line, for what is none."""
    if not isinstance(text, str):
        raise ValueError("a message is text: JSON")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"not a message in JSON: {text[:60]!r}") from None
    if not isinstance(record, dict):
        raise ValueError("a message is an object with 'type'")
    kind = record.get("type")
    if kind == "hello":
        return _hello(record.get("codecs"))
    if kind == "prompt":
        return _prompt(record.get("prompt"), record.get("how", "continue"))
    if kind == "buffered":
        return _buffered(record.get("seconds"), record.get("blocks"))
    if not isinstance(kind, str) or kind not in _PLAIN:
        raise ValueError(f"type={kind!r:.40} is not one of hello, prompt, buffered, {', '.join(_PLAIN)}")
    return _PLAIN[kind]()


def _hello(codecs: object) -> Hello:
    if not isinstance(codecs, list) or len(codecs) > _MAX_CODECS or not all(isinstance(c, str) for c in codecs):
        raise ValueError(f"codecs is not a list of at most {_MAX_CODECS} names, such as avc1.64001f")
    return Hello(tuple(codecs))


def _prompt(prompt: object, how: object) -> Prompt:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("the prompt is empty; give a few words")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"the prompt has {len(prompt)} characters, more than {MAX_PROMPT}; give fewer words")
    check_text("prompt", prompt)
    check_choice("how", how, Switch)
    return Prompt(prompt, how)  # pyright: ignore[reportArgumentType]  # just checked


def _buffered(seconds: object, blocks: object) -> Buffered:
    fine = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= _MAX_NUMBER
    if not fine or not isinstance(blocks, int) or isinstance(blocks, bool) or not 0 <= blocks <= _MAX_NUMBER:
        raise ValueError(f"buffered needs seconds, a number, and blocks, a whole number, both in 0 to {_MAX_NUMBER:g}")
    return Buffered(float(seconds), blocks)  # pyright: ignore[reportArgumentType]  # just checked
