"""What is in the clips: each decoded once, in threads, and remembered."""

import json
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from fps_jax.files import write_bytes
from fps_jax.progress import amount_bar
from fps_train.precompute.buckets import Rule
from fps_train.precompute.clips import Clip, ClipError, Dropped
from fps_train.precompute.frames import Probe, content_hash, probe


class Scanned(NamedTuple):
    """A clip, the hash of its file, and what decoding showed."""

    clip: Clip
    content: str
    probe: Probe


def scan(clips: Sequence[Clip], rule: Rule, memory: pathlib.Path | None) -> tuple[list[Scanned], list[Dropped]]:
    """Decode every clip as far as it can matter.

    Args:
      memory: a file of what earlier scans found, brought up to date also if this one is interrupted; a clip is known by its file's
        path, size and time of change. None for none.
    """
    known = {} if memory is None else _read(memory)
    found: dict[str, Any] = {}
    scanned, dropped = [], []

    def look(clip: Clip) -> tuple[str, Any] | ClipError:
        try:
            stat = clip.path.stat()
            name = f"{clip.path} {stat.st_size} {stat.st_mtime_ns} {rule.fps} {rule.limit}"
            if name in known:
                return name, known[name]
            if not stat.st_size:
                raise ClipError("the file is empty")
            seen = probe(clip.path, is_image=clip.is_image, fps=rule.fps, limit=rule.limit)
            return name, [content_hash(clip.path), *seen]
        except ClipError as error:
            return error
        except OSError as error:
            return ClipError("can't be read", error.strerror or str(error))

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        with amount_bar("look at clips", len(clips), unit="clip") as advance:
            for clip, what in zip(clips, pool.map(look, clips), strict=True):
                advance(1)
                if isinstance(what, ClipError):
                    dropped.append(Dropped(source=clip.source, reason=str(what), detail=what.detail))
                    continue
                found[what[0]] = what[1]
                content, *seen = what[1]
                scanned.append(Scanned(clip, content, Probe(*seen)))
    finally:
        pool.shutdown(cancel_futures=True)
        if memory is not None and not found.keys() <= known.keys():
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(memory, json.dumps({**known, **found}).encode(errors="surrogatepass"))
    return scanned, dropped


def _read(memory: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(memory.read_bytes())
    except (OSError, ValueError):  # it only saves time
        return {}
