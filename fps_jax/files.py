"""Files and directories appear whole or not at all: written beside their final name, then renamed."""

import contextlib
import errno
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

MAX_JSON = 64_000_000  # UMT5's tokenizer.json, the largest that there is, has 17 million
_PARTIAL = ".partial"  # in the name of what isn't whole yet
_ROOM = "make room, or choose another path"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = 255  # bytes of a file's name, on the file systems of Linux and macOS


def check_regular(path: str | os.PathLike, most: int | None = None) -> None:
    """Raises ValueError for what isn't a regular file (a pipe would keep its reader waiting, a device may never end), or has more
    than `most` bytes; FileNotFoundError for nothing.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} doesn't exist") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file; give a file that holds its bytes")
    if most is not None and status.st_size > most:
        raise ValueError(f"{path} has {status.st_size:,} bytes, more than the {most:,} that such a file may have")


def read_json(path: str | os.PathLike, fix: str = "copy or download it again") -> dict[str, Any]:
    """A JSON object of at most `MAX_JSON` bytes. fix: what the message tells to do about a damaged one.

    Raises: ValueError that names the file; FileNotFoundError.
    """
    check_regular(path, MAX_JSON)
    try:
        content = json.loads(pathlib.Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {fix}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object; {fix}")
    return content


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole. Raises OSError that names the file; what stood there before then still does."""
    with new_file(path) as beside:
        beside.write_bytes(content)


def write_json(record: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a JSON file whole. Raises OSError as `write_bytes`, ValueError for NaN or inf."""
    write_bytes(path, json_bytes(record))


def json_bytes(record: dict[str, Any]) -> bytes:
    """What `write_json` writes. Raises ValueError for NaN or inf."""
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def append_bytes(path: str | os.PathLike, content: bytes, fix: str = _ROOM) -> None:
    """Append to a file, which is made where there is none, all or nothing.

    fix: what the message tells to do where the disk is full.
    Raises: OSError that names the file; what stood there before then still does, and nothing more.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                while content:
                    content = content[file.write(content) :]  # a disk that fills takes a part, and refuses the rest
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {fix}", str(path)) from error


def write_together(contents: dict[pathlib.Path, bytes]) -> None:
    """Write several files, all or none: all are whole beside their names before the first is renamed, in order.

    Raises: OSError that names a file; what was there before then still is, all of it, and nothing else.
    """
    beside = {path: _beside(path) for path in contents}
    old: dict[pathlib.Path, pathlib.Path] = {}
    placed: list[pathlib.Path] = []
    path = None
    try:
        for path, content in contents.items():
            beside[path].write_bytes(content)
            _flush(beside[path])
        for path in contents:
            if os.path.lexists(path):
                aside = _beside(path)
                path.replace(aside)
                old[path] = aside
            beside[path].replace(path)
            placed.append(path)
        for aside in old.values():
            with contextlib.suppress(OSError):
                aside.unlink()
    except BaseException as error:
        for done in placed:
            with contextlib.suppress(OSError):
                done.unlink(missing_ok=True)
        for done, aside in old.items():
            with contextlib.suppress(OSError):
                aside.replace(done)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise
    finally:
        for file in beside.values():
            with contextlib.suppress(OSError):
                file.unlink()


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}{_PARTIAL}{path.suffix}")


def is_unfinished(name: str, of: str) -> bool:
    """Whether `name` is of a file that was to become `of` in the same folder, and that a killed process left behind."""
    whole = pathlib.PurePath(of)
    return (
        re.fullmatch(rf"\.{re.escape(whole.stem)}\.[0-9a-f]{{8}}{_PARTIAL}{re.escape(whole.suffix)}", name) is not None
    )


def _flush(file: pathlib.Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # a full disk may only be noticed here


def _cannot_write(path: Any, error: OSError) -> OSError:
    return OSError(f"can't write {str(path)!r}: {error.strerror or error}; choose another path or make room")


def check_name(path: str | os.PathLike, option: str) -> None:
    """Raises ValueError for the name of an output file that a disk, or a record in JSON, can't take."""
    path = pathlib.Path(path)
    try:
        length = len(str(path.name).encode()) + len(f".12345678{_PARTIAL}.")
    except UnicodeEncodeError:
        raise ValueError(f"{option}={str(path)!r} is not valid text (UTF-8); choose another name") from None
    if length > _NAME:
        raise ValueError(
            f"{option}={path.name[:40]!r}... is {length - _NAME} bytes too long for a file's name; choose a shorter one"
        )


def check_folder(path: str | os.PathLike, option: str) -> None:
    """Raises OSError for a folder of output, there or to be made, that can't be: before hours of work, not after."""
    place = pathlib.Path(path).absolute()
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{option}={str(path)!r} is a file; give a folder")
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PermissionError(f"{option}={str(path)!r} can't be made in {str(there)!r}; give another folder")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A path to write a file at, which takes the name `path` when the block ends well and vanishes when it doesn't.

    For what is too large to be handed to `write_bytes`. Raises OSError that names the file.
    """
    path = pathlib.Path(path)
    beside = _beside(path)
    try:
        yield beside
        _flush(beside)
        beside.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike, *, overwrite: bool = False, sources: tuple[str | os.PathLike, ...] = ()
) -> Iterator[pathlib.Path]:
    """A directory to write into, which takes the name `path` when the block ends well and vanishes when it doesn't.

    What was at `path` before is only removed when the new directory stands in its place.

    Args:
      path: final name; parents that don't exist are made, and removed again on failure.
      overwrite: replace a non-empty directory.
      sources: directories that are read from; `path` may be neither one of them, nor inside one, nor around one.
    Raises: FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError or ValueError about `path`.
    """
    final = pathlib.Path(path).expanduser().resolve()
    for source in sources:
        place = pathlib.Path(source).expanduser().resolve()
        if final == place or place in final.parents or final in place.parents:
            raise ValueError(f"destination {path} and source {source} overlap; give a destination outside the source")
    if final.exists() and not final.is_dir():
        raise FileExistsError(f"destination {path} is a file; give a directory")
    if final.is_dir() and any(final.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"destination {path} exists and is not empty; give another or --overwrite (overwrite=True)"
            )
        if final == pathlib.Path.home() or final == pathlib.Path.cwd() or final in pathlib.Path.cwd().parents:
            raise ValueError(
                f"destination {path} is the home or the working directory, or around it; it is not overwritten"
            )
    if final == pathlib.Path.cwd() or os.path.ismount(final):
        what = "the working directory" if final == pathlib.Path.cwd() else "a mount point"
        raise ValueError(f"destination {path} is {what}, which can't be renamed; give a new directory in it")
    made = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    except OSError as error:
        raise type(error)(f"destination {path}: {final.parent} can't be written ({error.strerror})") from None
    try:
        yield fresh
        umask = os.umask(0)
        os.umask(umask)
        fresh.chmod(0o777 & ~umask)  # mkdtemp's 0700 is for secrets
        _swap(fresh, final)
    except OSError as error:
        if error.errno in _FULL and str(error.filename or fresh).startswith(str(fresh)):
            raise OSError(error.errno, f"{os.strerror(error.errno)}; {_ROOM}", str(path)) from error
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the checkpoint stands there
            for parent in made:
                parent.rmdir()


def _swap(fresh: pathlib.Path, final: pathlib.Path) -> None:
    if not final.exists():
        fresh.rename(final)
        return
    aside = fresh.with_suffix(".old")
    final.rename(aside)
    try:
        fresh.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def check_space(parent: pathlib.Path, nbytes: int, fix: str = _ROOM) -> None:
    """Raises OSError where a directory has no room for `nbytes` and a margin for small files: before hours of work, not after.

    parent: may be yet to be made.
    """
    there = next(path for path in (parent.absolute(), *parent.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(there).free, nbytes + (16 << 20)
    if free < needed:
        amounts = f"needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"not enough disk space: {amounts}; {fix}", str(parent))
