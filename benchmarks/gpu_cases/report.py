"""What a call prints at its end: what was wrong, and ratios to the same call's fastest dense attention beside those expected."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.gpu_cases.results import NOT_MEASURED, Results

_LINES = 40  # of the table, its head and what is left out of it: `tail -40` of a log shows all
_SHARES = {
    **{"tensor_any": "tensor cores", "special": "special functions", "issue": "issue slots"},
    **{"shared": "shared memory", "l2": "L2"},
}


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


def doubtful(results: Results) -> list[str]:
    """Kernels under test that gave wrong numbers in a case: what they take means nothing."""
    latest = results.latest().values()
    return sorted({k for r in latest if any(p.get("ok") is False for p in r["parts"]) for k in r["kernels"][-1:]})


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, float) else ("-" if value is None else str(value)[:12])


def _slower_configs(records: Iterable[dict[str, Any]]) -> set[str]:
    """Cases of a sweep that aren't the fastest right one of their size, density, scales and call: the table leaves them out."""
    sweeps: dict[tuple[Any, ...], list[tuple[bool, float, str]]] = {}
    for r in records:
        config = r["config"]
        if config.get("options") and (seconds := seconds_of(r)) is not None:
            is_wrong = any(p.get("ok") is False for p in r["parts"])
            key = (*(config.get(x) for x in ("size", "density", "scales")), r["call"])
            sweeps.setdefault(key, []).append((is_wrong, seconds, r["case"]))
    # A wrong one is always shown.
    return {case for sweep in sweeps.values() for is_wrong, _, case in sorted(sweep)[1:] if not is_wrong}


def _rows(results: Results) -> Iterator[str]:
    latest = results.latest()
    slower = _slower_configs(latest.values())
    for name, r in latest.items():
        if r["stage"] not in ("speed", "peers", "whole") or name in slower:
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
                f"{_number(ratio, '.2f'):>6} {'' if extra else r['expected']:>10}"
            )


def table(results: Results) -> str:
    """Bandwidths, correctness and everything that failed; last, where the end of a log shows them, 40 lines of speed at most."""
    latest = results.latest()
    lines = ["", f"On a GPU: {NOT_MEASURED} (toy sizes, interpret mode)" if results.toy else "On a GPU"]
    for name, r in latest.items():
        for p in r["parts"]:
            if "GB_s" in p or "TB_s" in p:
                rate = p.get("GB_s", p["TB_s"] * 1e3 if isinstance(p.get("TB_s"), float) else p.get("TB_s"))
                share = f", {_number(p['share_of_copy'], '.0%')} of copy" if "share_of_copy" in p else ""
                lines.append(f"{name}, {p['part']}: {_number(rate, '.0f')} GB/s{share}")
            if shares := [f"{what} {p[key]:.0f}%" for key, what in _SHARES.items() if isinstance(p.get(key), float)]:
                lines.append(f"{name}, busy: {', '.join(shares)}")
            if "not available" in p:
                lines.append(f"{name}: not available: {' '.join(str(p['not available']).split())[:70]}")
    right = sum(p.get("ok") is True for r in latest.values() for p in r["parts"])
    failed = wrong(results)
    lines.append(f"right: {right}; wrong or failed: {', '.join(failed) or 'none'}")
    lines += [f"  {name}: {str(latest[name].get('failed', 'wrong numbers'))[:110]}" for name in failed]
    rung = next((name for name in failed if latest[name]["family"] == "ladder"), None)
    if rung is not None:
        lines.append(f"ladder: the first rung that fails is '{rung}': look there before all others")
    if kernels := doubtful(results):
        lines.append(f"wrong, so that their speed means nothing: {', '.join(kernels)}")
    left_out = [name for name, r in latest.items() if r.get("unfinished")]
    if left_out:
        lines.append(f"left out: {len(left_out)} ({', '.join(left_out[:4])}{', ...' if len(left_out) > 4 else ''})")
    if hung := results.hung():
        lines.append("hung: " + ", ".join(f"{kernel} (in '{case}')" for kernel, case in hung.items()))
    rows = list(_rows(results))
    if rows:
        lines += ["", f"{'case':52} {'ok':5} {'ms':>12} {'TFLOP/s':>12} {'ratio':>6} {'expected':>10}"]
        # Most valuable first, as the plan has them.
        shown = len(rows) if len(rows) < _LINES else _LINES - 2
        lines += rows[:shown]
        if shown < len(rows):
            lines.append(f"({len(rows) - shown} more in {results.path.name})")
    return "\n".join(lines)
