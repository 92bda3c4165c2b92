"""The short table: ratios to the fastest dense attention of the same call, and what was wrong."""

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu_cases.results import NOT_MEASURED, Results


def _seconds(record: dict[str, Any]) -> float | None:
    """Of a case with one number; None where it was not measured."""
    values = [p["seconds"] for p in record["parts"] if isinstance(p.get("seconds"), float)]
    return values[0] if values else None


def fastest_baseline(records: Iterable[dict[str, Any]], size: str, call: str | None = None) -> tuple[str, float] | None:
    """(case, seconds) of the fastest 16-bit dense attention at a size, in one call or in any; None where none was measured."""
    found = {
        r["case"]: seconds
        for r in records
        if r["case"].startswith("baseline")
        and r["config"].get("size") == size
        and not r["case"].endswith(" again")
        and call in (None, r["call"])
        and (seconds := _seconds(r)) is not None
    }
    best = min(found, key=found.__getitem__, default=None)
    return None if best is None else (best, found[best])


def wrong(results: Results) -> list[str]:
    """Correctness cases that failed or gave wrong results."""
    return [
        name
        for name, r in results.latest().items()
        if r["stage"] == "correct" and ("failed" in r or any(p.get("ok") is False for p in r["parts"]))
    ]


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, float) else ("-" if value is None else str(value))


def _speed_lines(results: Results) -> Iterable[str]:
    yield f"{'attention forward':40} {'ms':>12} {'TFLOP/s':>12} {'of limit':>12} {'ratio':>6}"
    for name, r in results.latest().items():
        if r["stage"] not in ("speed", "peers") or "quantization" in name:
            continue
        best = fastest_baseline(results.records, r["config"].get("size", ""), r["call"])
        for p in r["parts"]:
            title = f"{name}{', ' + p['part'] if 'part' in p else ''}"
            if "not available" in p:
                yield f"{title:40} not available: {p['not available'][:60]}"
                continue
            seconds = p.get("seconds")
            ratio = best[1] / seconds if best and isinstance(seconds, float) else None
            ms = seconds * 1e3 if isinstance(seconds, float) else seconds
            yield (
                f"{title:40} {_number(ms, '12.3f'):>12} {_number(p.get('tflops'), '12.0f'):>12} "
                f"{_number(p.get('share_of_limit'), '12.1%'):>12} {_number(ratio, '.2f'):>6}"
            )
        if "failed" in r:
            yield f"{name:40} {r['failed']}"


def table(results: Results) -> str:
    """A page: speed beside the fastest baseline of the same call, quantization, drift, correctness."""
    lines = ["", f"On a GPU: {NOT_MEASURED} (toy sizes, interpret mode)" if results.toy else "On a GPU"]
    latest = results.latest()
    if any(r["stage"] in ("speed", "peers") for r in latest.values()):
        lines += _speed_lines(results)
    for name, r in latest.items():
        for p in r["parts"] if "speed quantization" in name else []:
            rate, unit = (p["GB_s"], "GB/s") if "GB_s" in p else (p["TB_s"], "TB/s")
            share = f", {_number(p['share_of_copy'], '.0%')} of copy" if "share_of_copy" in p else ""
            lines.append(f"{name + ', ' + p['part']:40} {_number(rate, '.1f')} {unit}{share}")
    for r in results.records:
        if r["case"].endswith(" again"):
            before = [b for b in results.records if b["call"] == r["call"] and r["case"] == f"{b['case']} again"]
            pair = _seconds(before[-1]) if before else None, _seconds(r)
            if pair[0] and pair[1]:
                lines.append(f"drift in the call of {r['call']}: {r['case']} took {pair[1] / pair[0] - 1:+.1%}")
    correct = [r for r in latest.values() if r["stage"] == "correct"]
    if correct:
        right = sum(p.get("ok") is True for r in correct for p in r["parts"])
        lines.append(f"correct: {right} right; wrong or failed: {', '.join(wrong(results)) or 'none'}")
    if hung := results.hung():
        lines.append("hung: " + ", ".join(f"{kernel} (in '{case}')" for kernel, case in hung.items()))
    if wrong(results) and any("speed fp8" in n or "speed bf16" in n for n in latest):
        lines.append("SPEED MEANS NOTHING where the kernel is wrong: see the cases named above")
    return "\n".join(lines)
