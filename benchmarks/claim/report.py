"""The claim's numbers from what was measured: benchmarks/results/claim.json, two plots and the strips of docs/claim.md.

    python -m benchmarks.claim.report outputs/claim [--output FOLDER]

Pictures go into FOLDER (outputs/claim/report); nothing is sampled or trained.
"""

import json
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.claim.judge import FACTS, interval, share
from benchmarks.claim.measure import LAST
from benchmarks.claim.pictures import over_density, over_steps, side_by_side
from benchmarks.claim.rows import ROWS
from benchmarks.record import write
from fps_jax.errors import parse, run_cli
from fps_jax.files import write_json

STRIPS = {"a": "a dense", "d": "d untrained", "e0": "e trained", "f0": "f control"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Put what was measured together."""

    folder: Annotated[pathlib.Path, tyro.conf.Positional]
    """The claim's folder."""
    output: pathlib.Path | None = None
    """Folder for plots and strips; FOLDER/report if left out."""
    publish: bool = False
    """Write benchmarks/results/claim.json too."""


def read(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What was measured, by name: 'a', 'e0', 'e1' ...; rows that weren't are left out."""
    found = {}
    for row in ROWS:
        for name, model in row.places():
            place = folder / "measured" / name
            if not (place / LAST).exists():
                continue
            judged = json.loads((place / "judged.json").read_text())
            losses = json.loads((place / LAST).read_text())["losses"]
            found[name] = {
                "judged": judged,
                "right": np.array(judged["right"], bool),
                "losses": {regime: np.array(values) for regime, values in losses.items()},
                "clips": place / "clips.npy",
                "model": model,
                "row": row,
            }
    return found


def summary(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A record a row: attributes, whole clips, one object, losses against a's on the same clips and noise, PSNR and SSIM.

    Of a row with several training seeds, clips of all seeds are taken together; each seed's shares stand beside them.
    """
    rows: dict[str, Any] = {}
    base = measured["a"]
    for row in ROWS:
        parts = [measured[name] for name, _ in row.places() if name in measured]
        if not parts:
            continue
        right = np.concatenate([part["right"] for part in parts])
        record: dict[str, Any] = {
            "words": row.words,
            "density": round(row.density(base["judged"]["steps"]), 4),
            **share(right[:, :4].mean(1)),
            "whole": share(right.all(1)),
            **{fact: share(right[:, i]) for i, fact in enumerate(FACTS)},
            "motions": {
                kind: round(float(np.mean([part["judged"]["motions"][kind] for part in parts])), 4)
                for kind in base["judged"]["motions"]
            },
        }
        if len(parts) > 1:
            record["whole_by_seed"] = [round(float(part["right"].all(1).mean()), 4) for part in parts]
        record["loss"], record["loss_over_a"] = {}, {}
        for regime, values in base["losses"].items():
            mine = np.mean([part["losses"][regime] for part in parts], axis=0)
            record["loss"][regime] = round(float(mine.mean()), 5)
            over = mine - values
            record["loss_over_a"][regime] = {"mean": round(float(over.mean()), 5), "interval": interval(over, 5)}
        if row.letter != "a":
            record["quality"] = _quality(parts, base)
        rows[row.letter] = record
    return rows


def _quality(parts: list[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """PSNR and SSIM to a's clip of the same caption and noise: means over clips of a clip's mean over frames."""
    from fps_jax.evaluation.quality import psnr, ssim

    reference = np.load(base["clips"], allow_pickle=False)
    decibels, similar = [], []
    for part in parts:
        for clip, other in zip(reference, np.load(part["clips"], allow_pickle=False), strict=True):
            decibels.append(np.minimum(psnr(other, clip), 100).mean())  # 100 dB: equal
            similar.append(ssim(other, clip).mean())
    return {
        "psnr": {"mean": round(float(np.mean(decibels)), 3), "interval": interval(np.array(decibels), 3)},
        "ssim": {"mean": round(float(np.mean(similar)), 4), "interval": interval(np.array(similar), 4)},
    }


def recovery(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """Validation loss over training steps, of each run of the recover stage: the average's, else the raw weights'."""
    curves = {}
    for name in sorted({model for row in ROWS for model in row.models if model.startswith("recover_")}):
        file = folder / name / "metrics.jsonl"
        if not file.exists():
            continue
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        curves[name] = [(line["step"], _validated(line)) for line in lines if "validation" in line]
    return curves


def _validated(line: dict[str, Any]) -> float:
    of = line["validation"]
    return float(of.get("ema", of["raw"])["mean"])


def hours(folder: pathlib.Path) -> dict[str, float]:
    """Hours of training of each run, as its metrics say; nothing of those whose metrics don't."""
    found = {}
    for file in sorted(folder.glob("*/metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        seconds = sum(line["seconds"] for line in lines if "seconds" in line)
        if seconds:
            found[file.parent.name] = round(seconds / 3600, 3)
    return found


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    sys.exit(run_cli(_main, argv))


def _main(arguments: list[str]) -> None:
    options = parse(Report, arguments, prog="python -m benchmarks.claim.report")
    measured = read(options.folder)
    if "a" not in measured:
        raise FileNotFoundError(f"folder={str(options.folder)!r} has no measured/a; run the measure stage first")
    rows = summary(measured)
    output = options.output or options.folder / "report"
    output.mkdir(parents=True, exist_ok=True)
    over_density(rows, output / "claim_density.png")
    over_steps(
        recovery(options.folder),
        {row.letter: rows[row.letter] for row in ROWS if row.letter in rows},
        output / "claim_steps.png",
    )
    shown = {words: measured[name] for name, words in STRIPS.items() if name in measured}
    side_by_side(shown, output / "claim_strips.png")
    judged = measured["a"]["judged"]
    record = {
        "captions": judged["clips"],
        "seeds": {
            "captions": judged["seed"],
            "training": [i for i in (0, 1) if f"e{i}" in measured and f"f{i}" in measured],
        },
        "hours": hours(options.folder),
        "rows": rows,
    }
    write_json(record, output / "claim.json")
    if options.publish:
        write("claim", record)
    print(table(rows))


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| row | density | attributes | whole clips | one object | loss over a | PSNR | SSIM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for letter, row in rows.items():
        over = [f"{values['mean']:+.4f}" for values in row["loss_over_a"].values()]
        quality = row.get("quality")
        seen = ["", ""] if quality is None else [f"{quality['psnr']['mean']:.1f}", f"{quality['ssim']['mean']:.3f}"]
        shares = [_with_interval(of) for of in (row, row["whole"], row["one_object"])]
        cells = [f"{letter} {row['words']}", f"{row['density']:.2f}", *shares, " / ".join(over), *seen]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(of: dict[str, Any]) -> str:
    low, high = of["interval"]
    return f"{of['right']:.3f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
