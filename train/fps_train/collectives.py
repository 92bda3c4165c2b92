"""What a compiled program sends between devices, and how long that takes: every collective, as often as its loops go round."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fps_train.described import NODE, DeviceKind

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "f4e2m1fn": 4}  # of a type's name the first number is its bits, but for these
_ARRAY = re.compile(r"\b(pred|bf16|[suf][0-9]+[a-z0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?[\w.\-]+ = (?P<type>.+?) (?P<op>[a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_NAME = r"%?([\w.\-]+)"


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same axes. A program's count and bytes: once through, each loop at its number of rounds.

    Attributes:
      kind: 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all' or 'collective-permute'.
      axes: of the mesh, along which devices take part; () where they are no whole axes.
      sent: bytes that a device sends, by a ring: (n - 1) / n of the whole for a gather or scatter, twice that for an all-reduce.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    sent: float


def traffic(text: str, mesh: Mapping[str, int]) -> list[Traffic]:
    """The collectives of a compiled program, most bytes first.

    Args:
      text: the optimized HLO (`jax.stages.Compiled.as_text()`).
      mesh: axes and their sizes, in the order in which the devices are numbered.
    Raises: ValueError for a loop around a collective whose number of rounds isn't known.
    """
    computations, entry = _computations(text)
    found: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for kind, line, times in _collectives(computations, entry, 1):
        group = _group(line, mesh)
        counted = found.setdefault((kind, _axes(group, mesh)), [0, 0.0])
        counted[0] += times
        counted[1] += times * _sent(kind, line, len(group))
    rows = [Traffic(kind, axes, int(count), sent) for (kind, axes), (count, sent) in found.items()]
    return sorted(rows, key=lambda row: -row.sent)


def seconds(rows: Iterable[Traffic], mesh: Mapping[str, int], kind: DeviceKind) -> float:
    """Least time of these one after the other, on nodes of eight in which devices are numbered one after the other.

    A ring through several nodes leaves each as often as it has a network card there: with all eight GPUs of a node in it, what one
    sends goes out by all eight cards, and with one by its own. Pairs, and an all-to-all, have their own alone.
    """

    def speed(row: Traffic) -> float:
        near = _in_a_node(row.axes, mesh)
        if near is None:
            return kind.link
        return min(kind.link, kind.network * (1 if row.kind in ("collective-permute", "all-to-all") else near))

    return sum((row.sent / speed(row) for row in rows), 0.0)


def _in_a_node(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int | None:
    """Devices of a group along these axes that share a node, the fewest; None where no group leaves one."""
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    if not axes:  # no whole axes: which devices isn't known
        return None if ids.size <= NODE else 1
    along = [list(mesh).index(axis) for axis in axes]
    nodes = np.moveaxis(ids // NODE, along, range(len(along))).reshape(math.prod(mesh[axis] for axis in axes), -1)
    if (nodes == nodes[0]).all():
        return None
    return min(int(np.unique(group, return_counts=True)[1].min()) for group in nodes.T)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Instructions by the name of their computation, and the entry's name."""
    found: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        start = None if line.startswith(" ") else _COMPUTATION.match(line)
        if start:
            name = start["name"]
            found[name] = []
            entry = name if start["entry"] else entry
        elif name and line.startswith("  "):
            found[name].append(line.strip())
    return found, entry


def _collectives(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, str, int]]:
    """(kind, instruction, how often) of a computation and all that it calls."""
    for line in computations.get(name, ()):
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        op = match["op"]
        kind = op.removesuffix("-start")
        if kind in _KINDS:
            yield kind, line, times
        elif op == "while":
            body = re.search(f"body={_NAME}", line)
            assert body
            inside = list(_collectives(computations, body[1], 1))
            rounds = re.search(r"known_trip_count[^0-9]*(\d+)", line)
            if inside and not rounds:
                raise ValueError(f"a loop with collectives in it has no known number of rounds: {line[:120]}")
            yield from ((kind, own, times * count * int(rounds[1])) for kind, own, count in inside if rounds)
        elif op == "conditional":
            branches = line.partition("branch_computations={")[2].partition("}")[0]
            names = re.findall(_NAME, branches) or re.findall(f"(?:true|false)_computation={_NAME}", line)
            for branch in names:
                yield from _collectives(computations, branch, times)
        elif op in ("call", "async-start"):
            called = re.search(f"(?:to_apply|calls)={_NAME}", line)
            if called:
                yield from _collectives(computations, called[1], times)


def _group(line: str, mesh: Mapping[str, int]) -> list[int]:
    """The devices that one of the collective's groups holds, the one with device 0."""
    total = math.prod(mesh.values())
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return ids[tuple(slice(None) if axis in along else 0 for axis in sizes)].reshape(-1).tolist()
    ranges = re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", line)
    if ranges:
        shape, dims = (tuple(map(int, ranges[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if ranges[3]:
            ids = ids.transpose(tuple(map(int, ranges[3].split(","))))
        return ids.reshape(shape[0], -1)[0].tolist()
    listed = re.search(r"replica_groups=\{\{([0-9,]+)\}", line) or re.search(
        r"source_target_pairs=\{\{([0-9,]+)\}", line
    )
    return list(map(int, listed[1].split(","))) if listed else list(range(total))


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which a group's devices differ; () where it isn't all devices along them."""
    places = np.stack(np.unravel_index(np.array(group), tuple(mesh.values())))
    axes = tuple(axis for axis, places_along in zip(mesh, places, strict=True) if len(set(places_along.tolist())) > 1)
    return axes if math.prod(mesh[axis] for axis in axes) == len(group) else ()


def _sent(kind: str, line: str, devices: int) -> float:
    """Bytes that a device sends in one collective."""
    match = _INSTRUCTION.match(line)
    assert match
    sizes = [_bytes(*array) for array in _ARRAY.findall(match["type"])]
    if match["op"].endswith("-start") and kind != "all-to-all":
        # (operands, results): of a gather's and a scatter's the larger half is the whole
        half = len(sizes) // 2
        whole = max(sum(sizes[:half]), sum(sizes[half:]))
    else:
        whole = sum(sizes) * (devices if kind == "reduce-scatter" else 1)
    share = (devices - 1) / devices
    return whole * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def _bytes(kind: str, dims: str) -> float:
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind) or int(digits[0] if digits else 8)
    return math.prod(int(size) for size in dims.split(",") if size) * bits / 8
