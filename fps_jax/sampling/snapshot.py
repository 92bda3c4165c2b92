"""A session on disk: what it takes to go on with the same bits, in a .npz without pickles."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import zipfile
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fps_jax.attention.cache import KVCache
from fps_jax.files import check_regular, new_file
from fps_jax.models.vae import decode_chunk

if TYPE_CHECKING:
    from fps_jax.sampling.session import Session
    from fps_jax.sampling.stream import CausalPipeline

_VERSION = 3
_RECORD_BYTES = 2**20  # a prompt and a dozen numbers
_HEADER_BYTES = 2**16  # of an array in the file, at most
_KINDS: dict[str, Any] = {
    "causal": dict,
    "dtype": str,
    "prompt": str,
    "pending": list | None,
    "arguments": dict,
    "index": int,
    "made": int,
    "next_frame": int,
    "finished": list,
    "blocks": int | None,
    "given": int,
    "waiting": int,
}
# Of `CausalPipeline.session`, that a session is made anew with.
_ARGUMENTS = {"seed", "blocks", "height", "width", "tile", "window", "kv_cache"}
_SINCE_1: dict[str, Any] = {"given": 0, "waiting": 0}  # what version 1 didn't know
_SINCE_2: dict[str, Any] = {"kv_cache": "same"}  # arguments that version 2 didn't know


def save_session(session: "Session", path: str | os.PathLike) -> None:
    """Writes a session between two blocks; the file appears whole. Raises OSError naming the path."""
    rollout, pending = session.rollout, session.pending
    record = {
        "version": _VERSION,
        "causal": dataclasses.asdict(session.pipeline.causal),
        "dtype": str(rollout.dtype),
        "prompt": session.followed,
        "pending": pending,
        "arguments": session.arguments,
        "index": session.index,
        "made": session.made,
        "next_frame": rollout.next_frame,
        "finished": [start for start, _ in session.finished],
        "blocks": session.blocks,
        "given": session.given_frames,
        "waiting": 0 if session.given is None else session.given.shape[2],
    }
    arrays: dict[str, Any] = _cache_arrays(rollout.cache)
    arrays |= {f"vae.{i}": x for i, x in enumerate(session.decoder.cache or ())}
    arrays |= {f"finished.{i}": latents for i, (_, latents) in enumerate(session.finished)}
    if session.given is not None:
        arrays["given"] = session.given
    text = np.frombuffer(json.dumps(record).encode(), np.uint8)
    with new_file(path) as fresh, open(fresh, "wb") as file:
        np.savez(file, allow_pickle=False, record=text, **{name: _bits(np.asarray(x)) for name, x in arrays.items()})


def load_session(pipeline: "CausalPipeline", path: str | os.PathLike) -> "Session":
    """A session that goes on where it was saved, with the same bits if the weights are the same.

    Raises: FileNotFoundError; ValueError, in one line, for a file that is none, is damaged, or of another model or other settings.
    """
    path = pathlib.Path(path)
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as file:
            record = _read_record(file)
            session = _begin(pipeline, record)
            _restore(session, record, file)
            return session
    except FileNotFoundError:
        raise FileNotFoundError(f"session={str(path)!r} doesn't exist") from None
    except (
        zipfile.BadZipFile,
        KeyError,
        TypeError,
        EOFError,
        IsADirectoryError,
        UnicodeDecodeError,
        RecursionError,
    ) as error:
        raise ValueError(f"session={str(path)!r} is damaged or no saved session ({error})") from None
    except ValueError as error:
        raise ValueError(f"session={str(path)!r}: {error}") from None


def _read_record(file: zipfile.ZipFile) -> dict[str, Any]:
    record = json.loads(_read(file, "record", None, np.dtype(np.uint8)).tobytes().decode())
    if not isinstance(record, dict) or record.get("version") not in range(1, _VERSION + 1):
        raise ValueError(f"it is no session of version 1 to {_VERSION}")
    if record["version"] == 1:
        record: dict[str, Any] = _SINCE_1 | {"blocks": record["arguments"]["blocks"]} | record
    if record["version"] < 3 and isinstance(record["arguments"], dict):
        record = record | {"arguments": _SINCE_2 | record["arguments"]}
    for name, kind in _KINDS.items():
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise ValueError(f"{name} is a {type(record[name]).__name__} where its record has another type")
    if not all(0 <= record[name] < 2**31 for name in ("index", "made", "next_frame", "given", "waiting")):
        raise ValueError("index, made, next_frame, given and waiting are not all 0 or more, and below 2**31")
    if set(record["arguments"]) != _ARGUMENTS:
        raise ValueError(f"its arguments are {', '.join(sorted(map(str, record['arguments'])))[:200]}")
    if record["pending"] is not None and len(record["pending"]) != 2:
        raise ValueError(f"pending has {len(record['pending'])} entries where a prompt and a way belong")
    return record


def _begin(pipeline: "CausalPipeline", record: dict[str, Any]) -> "Session":
    """A fresh session with the saved one's settings, which have to be this pipeline's."""
    ours = json.loads(json.dumps(dataclasses.asdict(pipeline.causal)))
    for name, value in ours.items():
        if record["causal"].get(name) != value:
            raise ValueError(f"it was made with {name}={record['causal'].get(name)!r}, and this pipeline has {value!r}")
    if record["dtype"] != str(pipeline.wan.dtype):
        raise ValueError(f"it was made in {record['dtype']}; load the pipeline with dtype={record['dtype']!r}")
    arguments: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in record["arguments"].items()}
    given = record["given"]
    if given:
        pipeline.causal.check_frames(given, "given")
    from fps_jax.sampling.session import Session

    return Session(pipeline, record["prompt"], given_frames=given, **arguments)


def _restore(session: "Session", record: dict[str, Any], file: zipfile.ZipFile) -> None:
    rollout, wan = session.rollout, session.pipeline.wan
    index, made, next_frame = (record[name] for name in ("index", "made", "next_frame"))
    if (session.blocks is None) != (record["blocks"] is None) or (session.blocks or 0) < (record["blocks"] or 0):
        raise ValueError(f"blocks={record['blocks']} of it all, where {session.blocks} were asked for")
    session.blocks = record["blocks"]
    if session.blocks is not None and index > session.blocks:
        raise ValueError(f"index={index} is more than its {session.blocks} blocks")
    if next_frame:
        rollout.causal.check_frames(next_frame, "next_frame")
    waiting, given = record["waiting"], None
    if waiting:
        if waiting > record["given"]:
            raise ValueError(f"waiting={waiting} is more than the given={record['given']} latent frames")
        rollout.causal.check_frames(next_frame + waiting, "next_frame and waiting")
        shape = (*session.latent_shape[:2], waiting, *session.latent_shape[3:])
        given = _read(file, "given", shape, np.dtype(np.float32))
    kept = {name: _read(file, name, x.shape, x.dtype) for name, x in _cache_arrays(rollout.cache).items()}
    finished, end = [], None
    for i, start in enumerate(record["finished"]):
        begin, end = rollout.causal.block(start if end is None or start == end else -1)
        shape = (*session.latent_shape[:2], end - begin, *session.latent_shape[3:])
        finished.append((start, _read(file, f"finished.{i}", shape, np.dtype(np.float32))))
    if next_frame:
        z = jax.ShapeDtypeStruct((1, 1, *session.latent_shape[3:], wan.config.vae.z_dim), jnp.float32)
        decode = functools.partial(decode_chunk, wan.config.vae, cache=None)
        _, shapes = jax.eval_shape(decode, wan.params["vae"], z)
        cache = [_read(file, f"vae.{i}", x.shape, x.dtype) for i, x in enumerate(shapes)]
        session.decoder.cache = tuple(map(jnp.asarray, cache))
    if end not in (None, next_frame):
        raise ValueError(f"its finished blocks end at latent frame {end}, and the next begins at {next_frame}")
    del rollout.cache  # before its successor is on the device: there may be no room for two
    fields = {name.removeprefix("cache."): jnp.asarray(x) for name, x in kept.items()}
    rollout.cache = rollout.on_device(KVCache(**fields))
    rollout.next_frame, session.index, session.made, session.finished = next_frame, index, made, finished
    session.given = given
    if record["pending"] is not None:
        session.switch(*record["pending"])


def _cache_arrays(cache: KVCache) -> dict[str, Any]:
    """What there is of a cache, by its names in the file."""
    return {f"cache.{name}": x for name, x in cache._asdict().items() if x is not None}


def _bits(x: np.ndarray) -> np.ndarray:
    """bf16 as the whole numbers that its bits are: NumPy's files don't know it."""
    return x.view(np.uint16) if x.dtype == jnp.bfloat16 else x


def _read(file: zipfile.ZipFile, name: str, shape: tuple[int, ...] | None, dtype: np.dtype) -> np.ndarray:
    """An array whose size and dtype are known before it is read; shape None: of any length, up to a record's."""
    info = file.getinfo(f"{name}.npy")
    most = _RECORD_BYTES if shape is None else math.prod(shape) * dtype.itemsize
    if info.file_size > most + _HEADER_BYTES:
        raise ValueError(f"{name} has {info.file_size} bytes where {most} belong: another model, or another size")
    try:
        with file.open(info) as member:
            x = np.lib.format.read_array(member, allow_pickle=False)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # zlib's, zipfile's RuntimeErrors, NumPy's of headers that claim more than there is, and others
        raise ValueError(f"{name} is damaged ({str(error)[:200] or type(error).__name__})") from None
    stored = np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype
    if x.dtype != stored or (shape is not None and x.shape != shape):
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)} where {stored} {list(shape or ())} belongs: another model or size"
        )
    return x.view(dtype)
