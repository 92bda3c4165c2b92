"""The short table: ratios to the fastest dense attention of the same call, what was expected, and what was wrong."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.gpu_cases.results import NOT_MEASURED, Results

_ROWS = 40  # lines of the table, so that the end of a log holds it


def seconds_of(record: dict[str, Any]) -> float | None:
    """Of a case's first timed part; None where nothing was measured."""
    values = [p["seconds"] for p in record["parts"] if isinstance(p.get("seconds"), float)]
    return values[0] if values else None


def fastest_dense(records: Iterable[dict[str, Any]], size: str, call: str) -> tuple[str, float] | None:
    """(case, seconds) of the fastest 16-bit dense attention at a size in a call; None where none was measured."""
    found: dict[str, float] = {}
    for r in records:
        if r["case"].startswith("dense ") and r["config"].get("size") == size and r["call"] == call:
            seconds = seconds_of(r)
            if seconds is not None:
                found[r["case"]] = seconds
    best = min(found, key=found.__getitem__, default=None)
    return None if best is None else (best, found[best])


def wrong(results: Results) -> list[str]:
    """Cases that failed or gave wrong results; not those that a call left out."""
    return [
        name
        for name, r in results.latest().items()
        if not r.get("unfinished") and ("failed" in r or any(p.get("ok") is False for p in r["parts"]))
    ]


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, float) else ("-" if value is None else str(value)[:12])


def _rows(results: Results) -> Iterator[str]:
    for name, r in results.latest().items():
        if r["stage"] not in ("speed", "peers", "whole"):
            continue
        best = fastest_dense(results.records, r["config"].get("size", ""), r["call"])
        for p in r["parts"]:
            if "seconds" not in p:
                continue
            extra = "" if p.get("part") in (None, "kernel", "velocity", "denoise") else f", {p['part']}"
            seconds = p["seconds"]
            ratio = p.get("ratio", best[1] / seconds if best and isinstance(seconds, float) and "tflops" in p else None)
            ms = seconds * 1e3 if isinstance(seconds, float) else seconds
            ok = {True: "yes", False: "WRONG"}.get(p.get("ok"), "")
            yield (
                f"{name + extra:52.52} {ok:5} {_number(ms, '.3f'):>12} {_number(p.get('tflops'), '.0f'):>12} "
                f"{_number(ratio, '.2f'):>6} {r['expected']:>10}"
            )


def table(results: Results) -> str:
    """At most 40 lines of speed, then correctness, and everything that failed."""
    lines = ["", f"On a GPU: {NOT_MEASURED} (toy sizes, interpret mode)" if results.toy else "On a GPU"]
    rows = list(_rows(results))
    if rows:
        lines.append(f"{'case':52} {'ok':5} {'ms':>12} {'TFLOP/s':>12} {'ratio':>6} {'expected':>10}")
        lines += rows[-_ROWS:]
        if len(rows) > _ROWS:
            lines.append(f"({len(rows) - _ROWS} more in {results.path.name})")
    for name, r in results.latest().items():
        for p in r["parts"]:
            if "GB_s" in p or "TB_s" in p:
                rate = p.get("GB_s", p["TB_s"] * 1e3 if isinstance(p.get("TB_s"), float) else p.get("TB_s"))
                share = f", {_number(p['share_of_copy'], '.0%')} of copy" if "share_of_copy" in p else ""
                lines.append(f"{name}, {p['part']}: {_number(rate, '.0f')} GB/s{share}")
            if "not available" in p:
                lines.append(f"{name}: not available: {' '.join(str(p['not available']).split())[:70]}")
    latest = results.latest().values()
    right = sum(p.get("ok") is True for r in latest for p in r["parts"])
    lines.append(f"right: {right}; wrong or failed: {', '.join(wrong(results)) or 'none'}")
    for name in wrong(results):
        r = results.latest()[name]
        lines.append(f"  {name}: {' '.join(str(r.get('failed', 'wrong numbers')).split())[:110]}")
    left_out = [name for name, r in results.latest().items() if r.get("unfinished")]
    if left_out:
        lines.append(f"left out: {len(left_out)} ({', '.join(left_out[:4])}, ...)")
    if hung := results.hung():
        lines.append("hung: " + ", ".join(f"{kernel} (in '{case}')" for kernel, case in hung.items()))
    return "\n".join(lines)
