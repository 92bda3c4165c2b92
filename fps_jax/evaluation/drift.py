"""What becomes of a long video: LV-Bench's video drift error, by metrics that need no weights, and a video measured for it.

A video is cut into N chunks of equal length (what is left at its end, fewer than N frames, is left out), and a metric gives each
chunk a value m_i. Its drift error is

    VDE = sum over i = 2 .. N of  w_i |m_i - m_1| / m_1,    w_i = N - i + 1  (linear)  or  ln(N - i + 1)  (log),

so early drift weighs most, and by log the last chunk nothing. 0 is none. Source: Inferix, LV-Bench/vde.py (alibaba-damo-academy).

The metrics, of frames R, G, B in [0, 1] as they are decoded, Y = 0.2126 R + 0.7152 G + 0.0722 B and <.> a mean over pixels; the
value of a chunk is the mean of its frames', and no pair or triple of frames lies across two chunks:

    sharpness    variance of the Laplacian Y(y-1,x) + Y(y+1,x) + Y(y,x-1) + Y(y,x+1) - 4 Y(y,x), inside the frame's edge
                 (Pech-Pacheco et al. 2000)
    colour       sqrt(var(d) + var(e)) + 0.3 sqrt(<d>^2 + <e>^2), d = R - G, e = (R + G)/2 - B: how colourful, not which colours
                 (Hasler and Suesstrunk 2003)
    contrast     standard deviation of Y (RMS contrast, Peli 1990)
    brightness   <Y>
    motion       <|Y_t - Y_(t-1)|> of a frame and the one before: what changes, whatever makes it change
    flicker      |<Y>_(t-1) - 2 <Y>_t + <Y>_(t+1)|: brightness of the whole frame that jumps, not what rises or falls evenly

Each is 0 of frames that have nothing of it, exactly: motion and flicker of still ones, colour of grey ones. Where m_1 is 0 no drift
is relative to it: the error is infinite, as in the original, but 0 if all m_i are 0 (ours; infinite there too).
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Float

from fps_jax.choices import DriftWeights, check_choice
from fps_jax.media.clips import ClipError, decoded_frames, rgb, told
from fps_jax.media.plots import COLORS, GREY, figure, save_png
from fps_jax.progress import progress_bar

METRICS = ("sharpness", "colour", "contrast", "brightness", "motion", "flicker")
LEAST_FRAMES = 3  # of a chunk: flicker is of three
_LUMA = (np.float32(0.2126), np.float32(0.7152), np.float32(0.0722))  # ITU-R BT.709
_LONGEST_NAME = 80  # of a metric: it stands above a panel of the plot
_MOST_METRICS = 60
_COLUMNS = 3  # panels of a plot beside each other
_LINES = ("-", "--", ":", "-.")


def vde(values: Sequence[float], weights: DriftWeights = "linear") -> float:
    """The video drift error of a metric's values, one a chunk, in the order of time.

    Args:
      values: m_1 to m_N, two or more, each finite and 0 or more.
      weights: of the chunks, 'linear' or 'log'.
    Returns: 0 or more; infinite where m_1 is 0 and another isn't.
    Raises: ValueError for other values or weights.
    """
    check_choice("weights", weights, DriftWeights)
    m = np.asarray(values, np.float64)
    if m.ndim != 1 or len(m) < 2:
        raise ValueError(f"values have shape {m.shape}; give one for each of two chunks or more")
    if not (np.isfinite(m).all() and (m >= 0).all()):
        raise ValueError(f"values {m.tolist()!s:.60} are not all finite numbers of 0 or more")
    left = np.arange(len(m) - 1, 0, -1, dtype=np.float64)  # N - i + 1 of i = 2 .. N
    if not m[0]:
        return 0.0 if not m.any() else math.inf
    return float(np.sum((left if weights == "linear" else np.log(left)) * np.abs(m[1:] - m[0]) / m[0]))


def chunk_metrics(frames: Iterable[Any]) -> dict[str, float]:
    """The metrics of a chunk, in the order of `METRICS`. Holds two frames' brightness, whatever there are of them.

    Args:
      frames: `[H, W, 3]` each, uint8 or floats in [0, 1], three or more of one size of 3x3 or more.
    Raises: ValueError for fewer frames or another shape or dtype.
    """
    sums = dict.fromkeys(METRICS, 0.0)
    before: np.ndarray | None = None
    means: list[float] = []  # of the last two frames
    count = 0
    for frame in frames:
        r, g, b = _channels(frame)
        luma = (
            r * _LUMA[0] + g * _LUMA[1] + b * _LUMA[2]
        )  # no matmul: equal pixels stay equal, and differences of them are 0
        if before is not None and before.shape != luma.shape:
            raise ValueError(f"frame {count} has {luma.shape} pixels, those before {before.shape}; give one size")
        mean = _mean(luma)
        sums["sharpness"] += _variance(_laplacian(luma))
        sums["colour"] += _colourfulness(r, g, b)
        sums["contrast"] += math.sqrt(_variance(luma))
        sums["brightness"] += mean
        if before is not None:
            sums["motion"] += _mean(np.abs(luma - before))
        if len(means) == 2:
            sums["flicker"] += abs(means[0] - 2 * means[1] + mean)
        before, means, count = luma, [*means[-1:], mean], count + 1
    if count < LEAST_FRAMES:
        raise ValueError(f"a chunk has {count} frames; flicker needs {LEAST_FRAMES} or more")
    return {name: total / (count - {"motion": 1, "flicker": 2}.get(name, 0)) for name, total in sums.items()}


def _channels(frame: Any) -> list[Float[np.ndarray, "H W"]]:
    x = np.asarray(frame)
    if x.ndim != 3 or x.shape[-1] != 3 or min(x.shape[:2]) < 3:
        raise ValueError(f"a frame has shape {x.shape}; it must be [H, W, 3], of 3x3 pixels or more")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"a frame has dtype {x.dtype}; pass uint8 or floats in [0, 1]")
    if x.dtype != np.uint8 and not (x.min() >= 0 and x.max() <= 1):  # written so that NaN is refused, too
        raise ValueError(f"a frame has values in [{x.min():.4g}, {x.max():.4g}]; floats must be in [0, 1] and finite")
    unit = x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x.astype(np.float32)
    return [np.ascontiguousarray(unit[..., i]) for i in range(3)]


def _mean(x: np.ndarray) -> float:
    return float(np.mean(x, dtype=np.float64))


def _variance(x: np.ndarray) -> float:
    """In float64, where the mean of equal values in float32 is that value: exactly 0 of these."""
    return float(np.var(x, dtype=np.float64))


def _laplacian(y: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "h w"]:
    return (y[:-2, 1:-1] + y[2:, 1:-1]) + (y[1:-1, :-2] + y[1:-1, 2:]) - 4 * y[1:-1, 1:-1]


def _colourfulness(r: np.ndarray, g: np.ndarray, b: np.ndarray) -> float:
    d, e = r - g, np.float32(0.5) * (r + g) - b
    return math.sqrt(_variance(d) + _variance(e)) + 0.3 * math.hypot(_mean(d), _mean(e))


@dataclass(frozen=True)
class Measured:
    """A video, chunk by chunk.

    Attributes:
      frames: of the video. frames_per_chunk: of each chunk.
      seconds: the middle of each chunk, since the first frame.
      values: m_1 to m_N of each metric, by its name.
    """

    frames: int
    frames_per_chunk: int
    seconds: list[float]
    values: dict[str, list[float]] = field(default_factory=dict)

    def errors(self, weights: DriftWeights) -> dict[str, float]:
        """The drift error of each metric."""
        return {name: vde(values, weights) for name, values in self.values.items()}


def measure_video(path: pathlib.Path, chunks: int = 10, *, show_progress: bool | None = None) -> Measured:
    """Decodes a video twice, to count its frames and to measure them. Memory is of two frames, whatever its length.

    Args:
      path: of a file that FFmpeg reads; turned and squeezed pixels are measured as they are stored.
      chunks: N, 2 or more.
      show_progress: as of `progress_bar`.
    Raises: FileNotFoundError; ValueError that names the file: no video, damaged, or fewer than 3 N frames.
    """
    if chunks < 2:
        raise ValueError(f"chunks={chunks} is not 2 or more; drift is from the first chunk to the others")
    with told(path, "video"):
        with progress_bar(f"count frames of {path.name}", show_progress):
            total = sum(1 for _ in decoded_frames(path))
        each = total // chunks
        if each < LEAST_FRAMES:
            raise ValueError(
                f"video={str(path)!r} has {total} frames; {chunks} chunks of {LEAST_FRAMES} frames or more need "
                f"{LEAST_FRAMES * chunks}: give a longer one, or fewer --chunks"
            )
        with progress_bar(f"measure {path.name}", show_progress) as bar:
            return _measure(path, total, each, chunks, bar)


def _measure(path: pathlib.Path, total: int, each: int, chunks: int, bar: Any) -> Measured:
    measured = Measured(total, each, [], {name: [] for name in METRICS})
    times: list[float] = []

    def pixels(frames: Iterable[Any]) -> Iterable[np.ndarray]:
        for shown, at, _ in frames:
            times.append(float(at))
            yield rgb(shown.frame)

    frames, start = decoded_frames(path), None
    for i in range(chunks):
        times.clear()
        try:
            of_chunk = chunk_metrics(pixels(islice(frames, each)))
        except ClipError:
            raise
        except ValueError as error:
            raise ClipError(str(error)) from None
        start = times[0] if start is None else start
        measured.seconds.append((times[0] + times[-1]) / 2 - start)
        for name, value in of_chunk.items():
            measured.values[name].append(value)
        bar(i + 1, chunks)
    return measured


def check_scores(content: Mapping[str, Any], videos: Sequence[str], chunks: int) -> dict[str, dict[str, list[float]]]:
    """Another tool's values of each chunk, such as VBench's: {video: {metric: [m_1, ..., m_N]}}; videos may be left out.

    Args:
      videos: as they are named; a file's name alone will do where no two are equal.
    Returns: the same by the names in `videos`.
    Raises: ValueError that says where: another video, a metric that is one of `METRICS`, other numbers of chunks, or a value
      that isn't a finite number of 0 or more.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for key, metrics in content.items():
        fits = [name for name in videos if key in (name, pathlib.Path(name).name)]
        if len(fits) != 1:
            what = "no video" if not fits else f"{len(fits)} videos"
            raise ValueError(f"{key!r:.80} names {what} of those given; write it as on the command line")
        if fits[0] in found:
            raise ValueError(f"{key!r:.80} is there twice; give the scores of a video once")
        if not isinstance(metrics, dict):
            raise ValueError(f"{key!r:.80} is no object of metrics, each a list of {chunks} numbers")
        if len(metrics) > _MOST_METRICS:
            raise ValueError(f"{key!r:.80} has {len(metrics)} metrics; at most {_MOST_METRICS} are drawn")
        found[fits[0]] = {name: _scores(f"{key!r:.80}, {name!r:.80}", name, of, chunks) for name, of in metrics.items()}
    return found


def _scores(where: str, name: str, values: Any, chunks: int) -> list[float]:
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"{where}: the name of a metric is 1 to {_LONGEST_NAME} printable characters")
    if name in METRICS:
        raise ValueError(f"{where}: this name is of a metric that is measured here; give it another")
    if not isinstance(values, list) or len(values) != chunks:
        has = f"{len(values)} values" if isinstance(values, list) else f"a {type(values).__name__}"
        raise ValueError(f"{where} has {has}; give a list of {chunks}, one a chunk")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e300:
            raise ValueError(f"{where}: value {i + 1} is {value!r:.40}, not a finite number of 0 or more")
    return [float(value) for value in values]


def plot(
    videos: Mapping[str, Measured], path: pathlib.Path, *, weights: DriftWeights, title: str, subtitle: str = ""
) -> None:
    """Write a png: a panel a metric, its value in each chunk against time, a line a video; dotted, where the first chunk was.

    weights: of the error that stands beside the metric, where there is one video.
    """
    names = list(dict.fromkeys(name for measured in videos.values() for name in measured.values))
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    head = {"title": title, "subtitle": subtitle, "width": 9.6, "height": 1.3 + 2.1 * rows}
    drawn: dict[str, Any] = {}  # not by labels: matplotlib leaves out those that begin with an underscore
    with figure(rows, columns, sharex=True, **head) as (drawing, axes):
        for ax, name in zip(axes.flat, names, strict=False):
            ax.set_title(name)
            most = 0.0
            for i, (video, measured) in enumerate(videos.items()):
                values = measured.values.get(name)
                if values is None:
                    continue
                color, line = COLORS[i % len(COLORS)], _LINES[i // len(COLORS) % len(_LINES)]
                ax.axhline(values[0], color=color, linewidth=1, linestyle=(0, (1, 2)), alpha=0.8)
                marker = "o" if len(values) <= 40 else None
                (drawn[video],) = ax.plot(measured.seconds, values, color=color, linestyle=line, marker=marker)
                most = max(most, *values)
                if len(videos) == 1:
                    ax.set_title(f"VDE {vde(values, weights):.3g}", loc="right", color=GREY)
            ax.set_ylim(0, 1.1 * most or 1)  # from 0, or a drift of a thousandth fills the panel
            ax.set_xlim(left=0)
        for ax in axes.flat[len(names) :]:
            ax.set_visible(False)
        for ax in axes.flat[max(0, len(names) - columns) : len(names)]:
            ax.set_xlabel("seconds")
            ax.tick_params(labelbottom=True)
        if len(videos) > 1:
            drawing.legend(
                list(drawn.values()), list(drawn), loc="outside lower left", ncols=min(4, len(videos)), labelcolor=GREY
            )
        save_png(drawing, path)
