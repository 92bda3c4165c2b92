"""The tuned table: which config was measured fastest for which calls, in a JSON file. Imports no jax."""

import contextlib
import functools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

from pallas_kernels.sm90.call_shape import CallShape
from pallas_kernels.sm90.config import SHARED_MEMORY, ForwardConfig

TUNED_TABLE = pathlib.Path(__file__).parents[1] / "tuned_sm90.json"
TABLE_VARIABLE = "FPS_TUNED_TABLE"  # names another file, where that one can't be written
_TABLE_VERSION = 1
_ALIKE = 1.01  # from call to call one config's times differ by that much


@dataclass(frozen=True, kw_only=True)
class TuningKey:
    """What a config is tuned for. `density`: 'sparse' or 'dense'; `scales`: of K in a key block, 0 without quantization."""

    head_dim: int
    density: str
    scales: int

    @classmethod
    def of(cls, call: CallShape) -> "TuningKey":
        """The key of a call."""
        density = "dense" if call.table_density > 0.5 else "sparse"
        return cls(head_dim=call.head_dim, density=density, scales=call.scales)


def choose_config(call: CallShape) -> ForwardConfig:
    """The tuned config of a call's key, or a safe one where none was measured: no cluster, as many stages as fit, up to 4.

    With V's scales in groups always the safe one: some of the others spill with them.
    """
    tuned = None if call.value_groups else tuned_table().get(TuningKey.of(call))
    if tuned is not None and call.blocks_per_tile % tuned.cluster == 0:
        return tuned
    for stages in (4, 2):
        config = ForwardConfig(stages=stages)
        if call.shared_memory_bytes(config) <= SHARED_MEMORY:
            return config
    raise ValueError(f"head dim {call.head_dim} with {call.operand_bytes}-byte operands doesn't fit shared memory")


@dataclass(frozen=True, kw_only=True)
class TunedEntry:
    """What was measured for a key.

    Attributes:
      config: the fastest.
      seconds: of one call, median.
      tflops: TFLOP/s of useful work: 4 * head dim for each head and attended pair of tokens, padding left out.
      measured_on: where and when: 'gpu', 'jax', 'date', and the call ('grid', 'heads', ...). Keys may differ in it.
    Raises: ValueError for a time or rate that is no positive number, TypeError for a `measured_on` without the GPU's name.
    """

    config: ForwardConfig
    seconds: float
    tflops: float
    measured_on: Mapping[str, Any]

    def __post_init__(self):
        for name in ("seconds", "tflops"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} is not a positive number")
        if not isinstance(self.measured_on, Mapping) or not isinstance(self.measured_on.get("gpu"), str):
            raise TypeError(f"measured_on={self.measured_on!r} doesn't name the 'gpu'")


def tuned_table() -> Mapping[TuningKey, ForwardConfig]:
    """The configs measured fastest; empty until the autotuner has run on a GPU. Raises as `read_tuned_table`."""
    return {key: entry.config for key, entry in tuned_entries().items()}


def tuned_entries() -> Mapping[TuningKey, TunedEntry]:
    """The tuned table that this process uses, with times and rates. Read once. Raises as `read_tuned_table`."""
    return _read_once(table_path())


def table_path() -> pathlib.Path:
    """The file of the tuned table: the one that FPS_TUNED_TABLE names, else the package's own."""
    named = os.environ.get(TABLE_VARIABLE)
    return pathlib.Path(named).absolute() if named else TUNED_TABLE


def read_tuned_table(path: pathlib.Path) -> dict[TuningKey, TunedEntry]:
    """The entries of a file that `write_tuned_table` wrote.

    Raises: FileNotFoundError or OSError for a file that can't be opened, ValueError for anything else in it; each names the file.
    """
    cure = f"unset {TABLE_VARIABLE} if that names it, or remove the file and run fps-tune"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _TABLE_VERSION:
            raise ValueError(f"version={content['version']!r} is not {_TABLE_VERSION}, which this release reads")
        return {
            TuningKey(**entry["key"]): TunedEntry(
                config=ForwardConfig(**entry["config"]),
                seconds=entry["seconds"],
                tflops=entry["tflops"],
                measured_on=entry["measured_on"],
            )
            for entry in content["entries"]
        }
    except FileNotFoundError:
        raise FileNotFoundError(
            f"tuned table {str(path)!r} doesn't exist; run fps-tune to write it, or unset {TABLE_VARIABLE}"
        ) from None
    except OSError as error:
        raise OSError(f"tuned table {str(path)!r} can't be read: {error.strerror}; {cure}") from None
    except KeyError as error:
        raise ValueError(f"tuned table {str(path)!r} is broken: it has no {error}; {cure}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"tuned table {str(path)!r} is broken: {error}; {cure}") from None


_read_once = functools.cache(read_tuned_table)


def write_tuned_table(table: Mapping[TuningKey, TunedEntry], *, path: pathlib.Path) -> None:
    """Writes a tuned table, as `read_tuned_table` reads it. Raises OSError that names the file, which then is as it was."""
    entries = [{"key": asdict(key), **asdict(entry)} for key, entry in table.items()]
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps({"version": _TABLE_VERSION, "entries": entries}, indent=1) + "\n")
        beside.replace(path)
    except OSError as error:
        raise OSError(f"can't write {str(path)!r}: {error.strerror}; choose another path or make room") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    _read_once.cache_clear()


def fastest(measured: Iterable[Mapping[str, Any]]) -> dict[TuningKey, TunedEntry]:
    """The fastest right config of each key, of what `fps_jax.tuning.autotune.sweep` yields. Wrong or untimed ones are out.

    All measurements of a key must be of one call: a shorter one would win whatever its config. Of a config that was measured more
    than once the median counts, and of configs within a percent of the fastest the one that differs least from the default.
    """
    groups: dict[tuple[TuningKey, ForwardConfig], list[Mapping[str, Any]]] = {}
    for one in measured:
        if one.get("ok") and isinstance(one.get("seconds"), float):
            groups.setdefault((TuningKey(**one["key"]), ForwardConfig(**one["config"])), []).append(one)
    entries: dict[TuningKey, list[TunedEntry]] = {}
    for (key, config), ones in groups.items():
        median = {name: statistics.median(one[name] for one in ones) for name in ("seconds", "tflops")}
        entries.setdefault(key, []).append(TunedEntry(config=config, measured_on=ones[-1]["measured_on"], **median))
    best = {}
    for key, found in entries.items():
        least = min(entry.seconds for entry in found)
        best[key] = min(
            (e for e in found if e.seconds <= least * _ALIKE), key=lambda e: (_switches(e.config), e.seconds)
        )
    return best


def _switches(config: ForwardConfig) -> int:
    """How many settings aren't the default."""
    return sum(value != default for value, default in zip(astuple(config), astuple(ForwardConfig()), strict=True))
