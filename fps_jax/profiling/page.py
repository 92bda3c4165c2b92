"""A profile to look at: one HTML file with CSS and SVG inside, which needs no script and nothing else."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from fps_jax.media.plots import COLORS

_WIDTH, _ROW, _LABEL = 960, 22, 120  # pixels
_BARS = 120  # of the steps, or of the blocks of a stage, that are drawn
_MOST_DRAWN = 3000  # spans of the timeline
_COLORS, _OTHER = COLORS[:-1], "#999999"  # black is no colour on a dark page
_CSS = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --back: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #aaa; --line: #444; --back: #181818; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 1000px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.4em; margin: 0; } h2 { font-size: 1.1em; margin: 2em 0 .4em; } p { margin: .3em 0; color: var(--soft); }
table { border-collapse: collapse; width: 100%; } td, th { padding: .25em .6em; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; color: var(--soft); } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 40%; } .b { display: block; height: 12px; white-space: nowrap; font-size: 0; }
.b i { display: inline-block; height: 12px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; } svg line { stroke: var(--line); }
"""
# Compilation is the stage's colour, striped.
_STRIPES = "repeating-linear-gradient(45deg, {0}, {0} 3px, #ffffff99 3px, #ffffff99 6px)"


def page(record: Mapping[str, Any]) -> str:
    """The HTML of a profile, as `fps_jax.profiling.stages` records it."""
    stages, whole = record["stages"], record["seconds"]
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(stages)}
    title = f"Profile of {record['what']}" if record["what"] else "Profile"
    sums = f"{_seconds(whole)}, {_seconds(record['compile_seconds'])} of it compiling (striped)"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        f"<h1>{_text(title)}</h1><p>{sums}. {_text(record['device'])}; {_text(versions)}.</p>",
        "<h2>Stages</h2>",
        _table(stages, record["other_seconds"], whole, colors),
        "<h2>Timeline</h2>",
        _timeline(record["spans"], whole, colors),
    ]
    if len(record["spans"]) > _MOST_DRAWN:
        parts.append(f"<p>The first {_MOST_DRAWN:,} of {len(record['spans']):,} spans are drawn.</p>")
    for name in stages:
        parts += _steps_and_blocks(name, [span for span in record["spans"] if span["stage"] == name], colors[name])
    if record["spans_left_out"]:
        parts.append(f"<p>{record['spans_left_out']:,} later spans are in the sums only.</p>")
    if record["trace_seconds"] is not None:
        parts.append(
            f"<h2>Trace</h2><p>The first {_seconds(record['trace_seconds'])}, operation by operation, are in plugins/ beside this "
            "file, for XProf or TensorBoard: xprof --logdir of this folder.</p>"
        )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{_CSS}</style></head><body>\n{body}\n</body></html>\n"
    )


def _table(stages: Mapping[str, Any], other: float, whole: float, colors: Mapping[str, str]) -> str:
    rows = [
        "<tr><th>stage</th><th class=n>calls</th><th class=n>seconds</th><th class=n>compiling</th><th class=n>later, each</th>"
        "<th class=n>share</th><th></th></tr>"
    ]
    for name, one in [*stages.items(), ("other", {"calls": None, "seconds": other, "compile_seconds": None})]:
        seconds, compiling = one["seconds"], one["compile_seconds"] or 0.0
        color = colors.get(name, _OTHER)
        bar = _bar(seconds - compiling, whole, color) + _bar(compiling, whole, _STRIPES.format(color))
        later = one.get("later_mean")
        cells = [
            "" if one["calls"] is None else str(one["calls"]),
            f"{seconds:.3f}",
            "" if one["compile_seconds"] is None else f"{compiling:.3f}",
            "" if later is None else f"{later:.3f}",
            f"{100 * seconds / whole:.1f} %" if whole else "",
        ]
        numbers = "".join(f"<td class=n>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{_text(name)}</td>{numbers}<td class=bar><span class=b>{bar}</span></td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _bar(seconds: float, whole: float, background: str) -> str:
    return f'<i style="width:{100 * max(0.0, seconds) / whole if whole else 0:.2f}%;background:{background}"></i>'


def _timeline(spans: Sequence[Mapping[str, Any]], whole: float, colors: Mapping[str, str]) -> str:
    """A row a stage; a span begins where it began, and is as long as its own time."""
    names, scale = list(colors), (_WIDTH - _LABEL) / (whole or 1)
    height = _ROW * len(names) + 24
    drawn = [f'<text x="0" y="{_ROW * i + 15}">{_text(name)}</text>' for i, name in enumerate(names)]
    drawn += [_rule(_LABEL + scale * at, height, f"{at:g} s") for at in _ticks(whole)]
    for span in spans[:_MOST_DRAWN]:
        row, color = names.index(span["stage"]), colors[span["stage"]]
        x, length = _LABEL + scale * span["begin"], max(0.8, scale * span["seconds"])
        of = f" of block {span['block'] + 1}" if "block" in span else ""
        told = f"{span['stage']}{of}: {_seconds(span['seconds'])}, {_seconds(span['compile_seconds'])} of it compiling"
        drawn.append(
            f'<rect x="{x:.2f}" y="{_ROW * row + 4}" width="{length:.2f}" height="{_ROW - 8}" fill="{color}">'
            f"<title>{_text(told)}</title></rect>"
        )
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="timeline of the stages">{"".join(drawn)}</svg>'


def _rule(x: float, height: float, label: str) -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/><text x="{x + 3:.1f}" y="{height - 8}">{label}</text>'


def _ticks(whole: float) -> list[float]:
    """Round times, about six."""
    if whole <= 0:
        return [0.0]
    step = next(s for e in range(-6, 9) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if whole / s <= 7)
    return [step * i for i in range(int(whole / step) + 1)]


def _steps_and_blocks(name: str, spans: Sequence[Mapping[str, Any]], color: str) -> list[str]:
    """Bars: of the steps of a stage that was there once, of the blocks of one that makes a stream's."""
    if any("block" in span for span in spans):
        bars = [(str(s["block"] + 1), s["seconds"], s["compile_seconds"]) for s in spans if "block" in s]
        what = "block"
    else:
        bars = [(str(done), *rest) for span in spans for done, *rest in span.get("steps", ())]
        what = "step"
    if len(bars) < 2:
        return []
    left = f", the first {_BARS} of {len(bars)}" if len(bars) > _BARS else ""
    return [f"<h2>{_text(name)}, {what} by {what}{left}, without compiling</h2>", _bars(bars[:_BARS], what, color)]


def _bars(bars: Sequence[tuple[str, float, float]], what: str, color: str) -> str:
    """Running time upward, to the longest; compiling, which may be a hundred times that, in what is said of a bar."""
    height, top = 140, 16
    most = max(seconds - compiling for _, seconds, compiling in bars) or 1
    pitch = min(60.0, (_WIDTH - _LABEL) / len(bars))
    drawn = [
        f'<text x="0" y="{top + 4}">{_seconds(most)}</text><line x1="{_LABEL}" x2="{_WIDTH}" y1="{top}" y2="{top}"/>',
        f'<text x="0" y="{height}">0</text><line x1="{_LABEL}" x2="{_WIDTH}" y1="{height}" y2="{height}"/>',
    ]
    every = max(1, round(30 / pitch))
    for i, (label, seconds, compiling) in enumerate(bars):
        x, running = _LABEL + pitch * i, max(0.0, seconds - compiling)
        tall = (height - top) * running / most
        told = f"{what} {label}: {_seconds(running)} running, {_seconds(compiling)} compiling"
        drawn.append(
            f'<rect x="{x + 0.1 * pitch:.2f}" y="{height - tall:.2f}" width="{0.8 * pitch:.2f}" height="{tall:.2f}" fill="{color}">'
            f"<title>{_text(told)}</title></rect>"
        )
        if i % every == 0:
            drawn.append(
                f'<text x="{x + 0.5 * pitch:.2f}" y="{height + 16}" text-anchor="middle">{_text(label)}</text>'
            )
    return f'<svg viewBox="0 0 {_WIDTH} {height + 22}" role="img" aria-label="seconds by {what}">{"".join(drawn)}</svg>'


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def _text(words: str) -> str:
    return html.escape(words)
