"""Files and directories appear whole or not at all: written beside their final name, then renamed."""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole. Raises OSError that names the file; what stood there before then still does."""
    with new_file(path) as beside:
        beside.write_bytes(content)


def write_json(record: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a JSON file whole. Raises OSError as `write_bytes`, ValueError for NaN or inf."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A path to write a file at, which takes the name `path` when the block ends well and vanishes when it doesn't.

    For what is too large to be handed to `write_bytes`. Raises OSError that names the file.
    """
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # a full disk may only be noticed here
        beside.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"can't write {str(path)!r}: {reason}; choose another path or make room") from error
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


def check_space(parent: pathlib.Path, nbytes: int) -> None:
    """Raises OSError where a directory has no room for `nbytes` and a margin for small files: before hours of work, not after."""
    free = shutil.disk_usage(parent).free
    if free < nbytes + (16 << 20):
        raise OSError(
            28, f"not enough disk space: needs {nbytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free", str(parent)
        )
