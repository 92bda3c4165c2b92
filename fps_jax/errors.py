"""Command lines fail in one line: `error: ...` on stderr, exit status 2, a traceback only with `--debug`."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import select
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from fps_jax.foreign import option_answer
from fps_jax.interrupts import interrupt_on_sigterm
from fps_jax.progress import starting

# What a user can cause and cure. Anything else is a defect of ours and says so.
_EXPECTED = (ValueError, NotImplementedError, OSError, MemoryError, EOFError, FloatingPointError)


_LONGEST = 500  # characters of a message: a line of a terminal or three, whatever a file holds


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks, at most `_LONGEST` characters; an OSError's reason has its file name."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        files = [str(name) for name in (error.filename, error.filename2) if name]
        text = " ".join([*(f"{name}:" for name in files), error.strerror])
    if len(text) > _LONGEST:  # where and what come first, the fix last
        text = f"{text[: _LONGEST - 155]} ... {text[-150:]}"
    return text.encode(errors="backslashreplace").decode() or type(error).__name__


def run_cli(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> int:
    """Runs `main(arguments)` and returns the exit status: 0, 2 for any error, 130 for Ctrl-C.

    Where the reader of stdout has seen enough (`| head`), the status is 0, as what was asked for was seen. Of any other pipe that
    broke it is an error.

    `--debug` anywhere among the arguments is taken out, and lets the traceback through before the one line. `--version` alone says
    the version. Without `argv` this is a process of its own: SIGTERM is as Ctrl-C, so that nothing half-written stays, and where it
    takes long before a command says something, stderr has it that it starts.
    """
    if argv is None:
        interrupt_on_sigterm()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    if arguments == ["--version"]:
        from fps_jax import __version__

        print(f"fps-jax {__version__}")
        return 0
    try:
        with starting() if argv is None else contextlib.nullcontext():
            main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except KeyboardInterrupt:
        _say("error: interrupted")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            sys.stdout = None
            return 0
        if debug:
            traceback.print_exc()
        hint = "" if isinstance(error, _EXPECTED) else f" ({type(error).__name__}: a defect; --debug shows where)"
        _say(f"error: {one_line(error)}{hint}")
        return 2
    finally:
        if _has_no_reader(sys.stderr):
            sys.stderr = (
                None  # what is left in it can't be written when Python ends either, and would be the exit status
            )
    return 0


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _has_no_reader(stream: Any) -> bool:
    """Whether a stream is a pipe or a socket whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # none, or one in memory
        return False


def parse(kind: Any, argv: list[str], *, prog: str, description: str | None = None, default: Any = None) -> Any:
    """`tyro.cli(kind, args=argv)`, with tyro's boxed report of wrong arguments folded into one ValueError.

    default: an instance of `kind`, whose values are those of options that aren't given.
    """
    import tyro

    _check_lists(kind, argv)
    report = io.StringIO()
    own: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(report), _no_color():
            return tyro.cli(kind, args=argv, prog=prog, description=description, **own)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        said = _in_order(_unboxed(report.getvalue()))
        raise ValueError(f"{_foreign(said, kind, argv)}{said} (see {prog} --help)") from None


def _in_order(said: str) -> str:
    """Choices sorted: tyro takes those of an option that may be None from a set, in another order in each process."""
    return re.sub(r"(?<=Expected one of \()[^()]*", lambda found: ", ".join(sorted(found[0].split(", "))), said)


@contextlib.contextmanager
def _no_color() -> Iterator[None]:
    """Heeds NO_COLOR (https://no-color.org), which tyro doesn't know; a dumb terminal it does."""
    before = os.environ.get("TERM")
    if not os.environ.get("NO_COLOR"):
        yield
        return
    os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        os.environ.pop("TERM")
        if before is not None:
            os.environ["TERM"] = before


def _foreign(said: str, kind: Any, argv: list[str]) -> str:
    """What stands for an option that was taken from another program; nothing for other errors."""
    ours = {field.name for one in _dataclasses(kind) for field in dataclasses.fields(one)}
    for word, after in itertools.pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        if not name.startswith("--") or not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", said):
            continue
        size = re.fullmatch(r"(\d+)[*x](\d+)", value if equals else after)
        if name == "--size" and size and {"height", "width"} <= ours:  # generate.py's, width first
            return f"{name} {size[0]}: use --height {size[2]} --width {size[1]}; "
        if "Unrecognized" in said and (told := option_answer(name, ours)):
            return f"{name}: {told}; "
    return ""


def _dataclasses(kind: Any) -> list[Any]:
    return [one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one)]


def _check_lists(kind: Any, argv: list[str]) -> None:
    """Raises ValueError for an option of any number of values that is given twice: the last alone would count."""
    kinds = _dataclasses(kind)
    lists = {f"--{f.name}".replace("_", "-") for one in kinds for f in dataclasses.fields(one) if _is_list(f.type)}
    names = [word.partition("=")[0].replace("_", "-") for word in argv]
    twice = next((name for name in names if name in lists and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} was given twice; give it once, several values after each other")


def _is_list(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _is_list(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):  # a list, or None where it isn't given
        return any(map(_is_list, get_args(annotation)))
    return get_origin(annotation) is Sequence or (get_origin(annotation) is tuple and get_args(annotation)[-1] is ...)


def _unboxed(report: str) -> str:
    """The words in a box that rich draws: without frame, title and pointer to help."""
    # The title is in the frame or, where the terminal has ASCII only, above a rule.
    lines = report.strip().splitlines()[1:]
    inside = [line.strip().strip("│|").strip() for line in lines]
    words = " ".join(line for line in inside if line.strip("╰─╯- "))
    # What a dataclass says of its values is enough; its name is nothing to a person.
    return re.sub(r"^Error parsing \w+: ", "", " ".join(words.split(" For full helptext")[0].split()))
