"""Files appear whole or not at all: written beside their final name, then renamed."""

import contextlib
import json
import os
import pathlib
import secrets
from typing import Any


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole. Raises OSError that names the file; what stood there before then still does."""
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk may only be noticed here
        beside.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"can't write {str(path)!r}: {reason}; choose another path or make room") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_json(record: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a JSON file whole. Raises OSError as `write_bytes`, ValueError for NaN or inf."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")
