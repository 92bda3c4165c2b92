"""fps-drift: how much a long video drifts from its beginning. NumPy is imported once the arguments are known to be right."""

import math
import pathlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fps_jax.choices import DriftWeights, check_text
from fps_jax.errors import parse, run_cli
from fps_jax.files import new_directory, read_json, write_json
from fps_jax.progress import waiting

if TYPE_CHECKING:
    from fps_jax.evaluation.drift import Measured

WRITTEN = {"drift.json", "drift.png"}
_MOST_CHUNKS = 1000
_NAME = 40  # characters of a video in the table


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Measure how videos drift from their beginning: LV-Bench's video drift error (VDE), by metrics that need no weights.

    Prints a table, and writes drift.json (the values of each chunk, the errors) and drift.png (the metrics over time).
    """

    videos: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]
    """Video files, one or more; several are compared in one table and one plot."""
    chunks: int = 10
    """How many parts of equal length a video is cut into; each is held against the first."""
    weights: DriftWeights = "linear"
    """Of chunk i of N: N - i + 1, or the logarithm of it."""
    scores: pathlib.Path | None = None
    """A JSON file of other metrics of these chunks, such as VBench's: {"boat.mp4": {"aesthetic_quality": [0.61, ...]}}, a number a
    chunk."""
    output: pathlib.Path = pathlib.Path("drift")
    """The folder to write: new or empty. It appears when all is done."""
    overwrite: bool = False
    """Replace an earlier measurement in the output folder."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-drift."""
    sys.exit(run_cli(lambda args: _drift(parse(Drift, args, prog="fps-drift")), argv))


def _drift(options: Drift) -> None:
    _check(options)
    from fps_jax.evaluation.drift import METRICS, check_scores, measure_video, plot

    names = [str(path) for path in options.videos]
    scores: dict[str, dict[str, list[float]]] = {}
    if options.scores is not None:
        try:
            content = read_json(options.scores, "give {video: {metric: [numbers]}}")
            scores = check_scores(content, names, options.chunks)
        except FileNotFoundError:
            raise FileNotFoundError(f"scores={str(options.scores)!r} doesn't exist; check the path") from None
        except ValueError as error:
            raise ValueError(f"scores={str(options.scores)!r}: {error}") from None
    measured: dict[str, Measured] = {}
    with new_directory(options.output, overwrite=options.overwrite) as folder:
        for name, path in zip(names, options.videos, strict=True):
            one = measure_video(path, options.chunks, show_progress=True)
            one.values.update(scores.get(name, {}))
            measured[name] = one
        write_json(_record(options, measured), folder / "drift.json")
        subtitle = f"{options.chunks} chunks, the first dotted; VDE: video drift error, {options.weights} weights"
        short = _short(measured)
        with waiting("draw"):
            plot(short, folder / "drift.png", weights=options.weights, title="Drift over time", subtitle=subtitle)
    print(table(short, options.weights, METRICS))
    print(f"wrote {options.output / 'drift.json'} and {options.output / 'drift.png'}")


def _check(options: Drift) -> None:
    """What can be known before a video is opened."""
    if not options.videos:
        raise ValueError("videos are missing; name one or more video files")
    for path in options.videos:
        check_text("video", str(path))
    twice = next((path for path in options.videos if options.videos.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"video={str(twice)!r} was given twice; give it once")
    if not 2 <= options.chunks <= _MOST_CHUNKS:
        raise ValueError(f"chunks={options.chunks} is not in 2 to {_MOST_CHUNKS}; LV-Bench has 10")
    if options.overwrite and options.output.is_dir():
        foreign = sorted(path.name for path in options.output.iterdir() if path.name not in WRITTEN)
        if foreign:
            raise FileExistsError(
                f"output={str(options.output)!r} holds {foreign[0]!r}, which fps-drift doesn't write and won't remove; give another"
            )


def _short(measured: "dict[str, Measured]") -> "dict[str, Measured]":
    """By the names of the files, where these tell the videos apart."""
    names = [pathlib.Path(name).name for name in measured]
    return dict(zip(names, measured.values(), strict=True)) if len(set(names)) == len(names) else measured


def table(measured: "dict[str, Measured]", weights: DriftWeights, first: tuple[str, ...] = ()) -> str:
    """Errors by video and metric, for a person. first: metrics that come first; the others follow."""
    errors = {name: one.errors(weights) for name, one in measured.items()}
    metrics = list(dict.fromkeys([*first, *(metric for of in errors.values() for metric in of)]))
    rows = [["VDE", *metrics]]
    rows += [
        [name if len(name) <= _NAME else f"...{name[3 - _NAME :]}", *(_cell(of.get(metric)) for metric in metrics)]
        for name, of in errors.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(metrics) + 1)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    if any(math.isinf(value) for of in errors.values() for value in of.values()):
        lines.append("inf: the first chunk has nothing of this (a still video's motion), and a later one has")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _record(options: Drift, measured: "dict[str, Measured]") -> dict[str, Any]:
    """For JSON, which has no inf."""
    import fps_jax

    videos = {}
    for name, one in measured.items():
        errors = one.errors(options.weights)
        metrics = {
            metric: {"vde": errors[metric] if math.isfinite(errors[metric]) else None, "chunks": values}
            for metric, values in one.values.items()
        }
        videos[name] = {
            "frames": one.frames,
            "frames_per_chunk": one.frames_per_chunk,
            "seconds": [round(second, 4) for second in one.seconds],
            "metrics": metrics,
        }
    return {
        "chunks": options.chunks,
        "weights": options.weights,
        "videos": videos,
        "notes": {
            "vde": "sum over i = 2 .. N of w_i |m_i - m_1| / m_1, w_i = N - i + 1 or its logarithm; null where m_1 is 0 and "
            "another isn't; metrics as fps_jax.evaluation.drift defines them",
            "seconds": "the middle of each chunk, since the first frame",
        },
        "versions": {"fps_jax": fps_jax.__version__},
    }
