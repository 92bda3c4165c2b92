"""The pictures of docs/claim.md: quality over density, recovery over training steps, and strips of the same prompts."""

import pathlib
from typing import Any

import numpy as np

from benchmarks.claim.strips import Strip, strips, verdict
from fps_jax.media.plots import COLORS, GREY, figure, save_png


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
            equal = [other for other in rows if rows[other]["density"] == row["density"]]
            at = row["density"] + 0.012 * (equal.index(letter) - (len(equal) - 1) / 2)  # those side by side
            color = COLORS[number % len(COLORS)]
            ax.errorbar(
                at, right, [[right - low], [high - right]], fmt="o", capsize=3, color=color,
                label=f"{letter}  {row['words']}",
            )  # fmt: skip
            ax.annotate(letter, (at, high), (0, 3), textcoords="offset points", ha="center", color=color)
        ax.set(xlabel="density: share of token pairs kept", ylabel="whole clips right", ylim=(0, 1.05))
        ax.legend(loc="lower center")
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
            rows.append(Strip(words, np.asarray(clips[words][index]), verdict(row["right"][index])))
        blocks.append((texts[index], rows))
    strips(blocks, path)


def _of_every_kind(kinds: list[str], count: int) -> list[int]:
    """The first clip of each kind, then the second of each ...: chosen by captions alone, not by how they came out."""
    order = sorted(range(len(kinds)), key=lambda i: (kinds[:i].count(kinds[i]), i))
    return sorted(order[:count])
