"""The pictures of docs/claim.md: quality over density, recovery over training steps, and strips of the same prompts."""

import io
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from benchmarks.claim.judge import FACTS
from fps_jax.files import write_bytes
from fps_jax.media.plots import COLORS, GREY, figure, save_png

_ZOOM, _GAP, _HEAD = 2, 2, 28  # pixels a pixel; between frames; a line of text
_WORDS = 110  # pixels at the left of a strip
_EVERY = 4  # frames


def over_density(rows: dict[str, Any], path: pathlib.Path) -> None:
    """Whole clips right over the mean density of self-attention, a point a row, with its 95% interval."""
    title, subtitle = (
        "Quality over density",
        "clips with every fact right, held-out captions; bars: 95% of the bootstrap",
    )
    with figure(width=7, height=4.2, title=title, subtitle=subtitle) as (drawing, axes):
        ax = axes[0, 0]
        for number, (letter, row) in enumerate(rows.items()):
            right, (low, high) = row["whole"]["right"], row["whole"]["interval"]
            spread = 0.012 * (number - len(rows) / 2)  # rows of equal density side by side
            ax.errorbar(
                row["density"] + spread, right, [[right - low], [high - right]], fmt="o", capsize=3,
                color=COLORS[number % len(COLORS)], label=f"{letter}  {row['words']}",
            )  # fmt: skip
        ax.set(xlabel="density: share of token pairs kept", ylabel="whole clips right", ylim=(0, 1.02))
        ax.legend(loc="lower right")
        save_png(drawing, path)


def over_steps(curves: dict[str, list[tuple[int, float]]], rows: dict[str, Any], path: pathlib.Path) -> None:
    """Validation loss of each run of the recover stage over its steps; the untrained model is step 0."""
    title, subtitle = (
        "Recovery",
        "loss on clips held out of training, under the attention of the run; the moving average's weights",
    )
    with figure(width=7, height=4.2, title=title, subtitle=subtitle) as (drawing, axes):
        ax = axes[0, 0]
        for number, (name, curve) in enumerate(curves.items()):
            if curve:
                ax.plot(*zip(*curve, strict=True), color=COLORS[number % len(COLORS)], label=_run_words(name, rows))
        ax.set(xlabel="training steps", ylabel="loss")
        if any(curves.values()):
            ax.legend()
        else:
            ax.text(0.5, 0.5, "no run of the recover stage yet", color=GREY, ha="center", transform=ax.transAxes)
        save_png(drawing, path)


def _run_words(name: str, rows: dict[str, Any]) -> str:
    letter, seed = name.removeprefix("recover_")[0], name.removeprefix("recover_")[1:]
    words = rows[letter]["words"] if letter in rows else ""
    return f"{letter}  {words}" + (f", seed {seed}" if seed else "")


class Strip(NamedTuple):
    """A video as a row of frames. label: at its left. verdict: at its right, "right" or what is wrong."""

    label: str
    frames: UInt8[np.ndarray, "F H W 3"]
    verdict: str


def side_by_side(shown: dict[str, dict[str, Any]], path: pathlib.Path, *, prompts: int = 8) -> None:
    """A png: for each prompt a strip of every row, the same noise in all, and what the checker finds wrong in it."""
    from benchmarks.claim.judge import captions

    judged = next(iter(shown.values()))["judged"]
    facts, texts = captions(judged["clips"], judged["seed"], not judged["trained"])
    clips = {words: np.load(row["clips"], mmap_mode="r", allow_pickle=False) for words, row in shown.items()}
    blocks = []
    for index in _of_every_kind([f.motion for f in facts], prompts):
        rows = []
        for words, row in shown.items():
            wrong = [
                fact.replace("_", " ") for fact, right in zip(FACTS, row["right"][index], strict=True) if not right
            ]
            verdict = f"wrong: {', '.join(wrong)}" if wrong else "right"
            rows.append(Strip(words, np.asarray(clips[words][index]), verdict))
        blocks.append((texts[index], rows))
    strips(blocks, path)


def strips(blocks: list[tuple[str, list[Strip]]], path: pathlib.Path) -> None:
    """A png: under each text its strips, every fourth frame of each, the first and the last included."""
    from PIL import Image, ImageDraw, ImageFont

    _, height, width, _ = blocks[0][1][0].frames.shape
    height, width = _ZOOM * height, _ZOOM * width
    columns = len(blocks[0][1][0].frames[::_EVERY])
    strip = columns * (width + _GAP)
    tops = np.cumsum([0, *(_HEAD + len(rows) * (height + _GAP) + _HEAD // 2 for _, rows in blocks)])
    font = ImageFont.load_default(size=13)
    verdicts = max(font.getlength(row.verdict) for _, rows in blocks for row in rows)
    sheet = Image.new("RGB", (_WORDS + strip + int(verdicts) + 18, int(tops[-1])), "white")
    draw = ImageDraw.Draw(sheet)
    for top, (text, rows) in zip(tops, blocks, strict=False):
        draw.text((_WORDS, top + _HEAD / 2), text, fill="black", font=font, anchor="lm")
        for line, row in enumerate(rows):
            y = int(top) + _HEAD + line * (height + _GAP)
            draw.text((6, y + height / 2), row.label, fill="black", font=font, anchor="lm")
            for column, frame in enumerate(row.frames[::_EVERY]):
                image = Image.fromarray(np.asarray(frame)).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(image, (_WORDS + column * (width + _GAP), y))
            place = (_WORDS + strip + 6, y + height / 2)
            draw.text(
                place, row.verdict, fill="#406040" if row.verdict == "right" else "#804000", font=font, anchor="lm"
            )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _of_every_kind(kinds: list[str], count: int) -> list[int]:
    """The first clip of each kind, then the second of each ...: chosen by captions alone, not by how they came out."""
    order = sorted(range(len(kinds)), key=lambda i: (kinds[:i].count(kinds[i]), i))
    return sorted(order[:count])
