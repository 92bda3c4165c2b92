"""The world of the small claim: captioned clips of one coloured shape on a plain background.

    python -m benchmarks.claim.world clips --clips 4000 --seed 0
    python -m benchmarks.claim.world held_out --clips 256 --held-out

A clip is four facts: colour, shape, motion and background. Whole combinations of the first three, about a fifth, are held out
of training (`is_held_out`), so that a model that gets them right has composed them. Size, place and wording are drawn at random
and are no facts. The tables below are the world: values added there are drawn, captioned, parsed and held out by the same rules;
a new shape or motion needs its line in `_signed_distance` or `_path`, and its rule in the checker.
"""

import csv
import functools
import io
import itertools
import pathlib
import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float32, UInt8

FRAMES, HEIGHT, WIDTH, FPS = 17, 48, 64, 16  # frames a clip, pixels, frames a second

# 8-bit RGB. Colours lie at least 95 from each other, and 115 from each background, so that blur and noise leave them apart.
COLOURS = {"red": (220, 30, 30), "green": (20, 170, 50), "blue": (40, 70, 235), "yellow": (250, 220, 40)}
MORE_COLOURS = {"purple": (155, 40, 205), "orange": (245, 125, 25)}  # to be moved up when the world grows
BACKGROUNDS = {"black": (15, 15, 15), "white": (240, 240, 240), "gray": (128, 128, 128)}
# How far each shape reaches from its centroid, of its radius: to the sides, up, down. Areas are within a quarter of each other.
SHAPES = {"circle": (1.0, 1.0, 1.0), "bar": (1.25, 0.5, 0.5), "triangle": (1.2, 0.8 * 3**0.5, 0.4 * 3**0.5)}
# The first wording of a motion is its name.
MOTIONS = {
    "stays still": ("stays still", "does not move", "rests in place"),
    "grows": ("grows", "gets bigger", "becomes larger"),
    "moves left": ("moves left", "slides to the left", "travels leftwards"),
    "moves right": ("moves right", "slides to the right", "travels rightwards"),
    "moves up": ("moves up", "rises to the top", "travels upwards"),
    "moves down": ("moves down", "sinks to the bottom", "travels downwards"),
}
SPELLINGS = {"gray": ("gray", "grey")}  # of the other values, those that have more than one
# "a" before a vowel is written "an". The first is the shortest; a clip whose caption leaves the background out still has one.
TEMPLATES = (
    "a {colour} {shape} {motion}",
    "a {colour} {shape} {motion} on a {background} background",
    "on a {background} background, a {colour} {shape} {motion}",
    "the {shape} is {colour}; it {motion} in front of a {background} backdrop",
    "a {shape}, {colour} on {background}, {motion}",
)

RADIUS = (8.5, 10.0)  # pixels; size is no fact, so it varies little
GROWTH = (0.5, 1.2)  # of the radius, from the first frame to the last
MARGIN = (1.0, 3.0)  # pixels between a path's ends and the edges: a path is nearly all the room there is
# Share of the room, around its middle, for what doesn't move: a shape at an edge is one that is about to leave it.
STAY = 0.5


@dataclass(frozen=True)
class Facts:
    """What a clip shows: keys of the tables above. background: None where a caption leaves it out."""

    colour: str
    shape: str
    motion: str
    background: str | None = None


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether training never sees this combination. Every value and every pair of values is seen in others.

    Like a latin square: of the combinations of two values, those are held out whose third has one residue of 5, so one or two of
    all its values, never all.
    """
    i, j, k = (list(table).index(name) for table, name in ((COLOURS, colour), (SHAPES, shape), (MOTIONS, motion)))
    return (i + 2 * j + 3 * k) % 5 == 0


def draw(rng: np.random.Generator, held_out: bool) -> Facts:
    """Facts of a clip, uniform over the combinations that are held out, or over those that aren't."""
    combinations = _combinations(held_out)
    colour, shape, motion = combinations[rng.integers(len(combinations))]
    return Facts(colour, shape, motion, _one_of(list(BACKGROUNDS), rng))


def render(facts: Facts, rng: np.random.Generator) -> UInt8[np.ndarray, "F 48 64 3"]:
    """A clip of `FRAMES` frames, its size and place drawn from `rng`, and its background where the facts leave it out.

    Edges are anti-aliased: a pixel's share of the shape is 0.5 - its centre's signed distance, in [0, 1].
    """
    background = facts.background or _one_of(list(BACKGROUNDS), rng)
    cx, cy, radius = _path(facts, rng)
    columns, rows = (np.arange(size, dtype=np.float32) + 0.5 for size in (WIDTH, HEIGHT))
    x, y = columns[None, None, :] - cx, rows[None, :, None] - cy
    inside = np.clip(0.5 - _signed_distance(facts.shape, x, y, radius), 0, 1)[..., None]
    over, under = (np.array(rgb, np.float32) for rgb in (COLOURS[facts.colour], BACKGROUNDS[background]))
    return np.rint(under + inside * (over - under)).astype(np.uint8)


def caption(facts: Facts, rng: np.random.Generator) -> str:
    """Facts in one of the grammar's wordings, lower case; it leaves the background out where the facts do, and sometimes."""
    template = _one_of([t for t in TEMPLATES if facts.background or "{background}" not in t], rng)
    return _fill(template, {fact: _one_of(_wordings(value), rng) for fact, value in vars(facts).items() if value})


def canonical(facts: Facts) -> str:
    """The shortest wording, without the background: "a red circle moves left"."""
    return _fill(TEMPLATES[0], vars(facts))


def parse(text: str) -> Facts | None:
    """The facts that a caption states, None where the grammar has no such caption.

    Case, spaces, a full stop at the end, and "a" for "an" don't matter.
    """
    tokens = ["a" if token == "an" else token for token in tokenize(text)]
    line = " ".join(tokens[:-1] if tokens[-1:] == ["."] else tokens)
    for pattern in _patterns():
        if found := pattern.fullmatch(line):
            values = {fact: _value(words) for fact, words in found.groupdict().items()}
            return Facts(**values)
    return None


def tokenize(text: str) -> list[str]:
    """Words and punctuation marks, lower case, each a token."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """All tokens of all captions, sorted."""
    tables = (COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    wordings = [[words for value in table for words in _wordings(value)] for table in tables]
    captions = (
        _fill(template, dict(zip(("colour", "shape", "motion", "background"), words, strict=True)))
        for template in TEMPLATES
        for words in itertools.product(*wordings)
    )
    return tuple(sorted({token for text in captions for token in tokenize(text)}))


def make_clip(seed: int, index: int, held_out: bool) -> tuple[Facts, str, UInt8[np.ndarray, "F 48 64 3"]]:
    """(facts, caption, frames) of one clip: a function of its arguments alone, whatever clips were made before."""
    rng = np.random.default_rng([seed, index, int(held_out)])
    facts = draw(rng, held_out)
    return facts, caption(facts, rng), render(facts, rng)


def write_clips(out: pathlib.Path, clips: int, seed: int, held_out: bool) -> None:
    """Clips as mp4 files that decode to the very pixels, and metadata.csv with their captions and facts.

    Args:
      out: a new or empty folder; it appears when it is whole. `fps-precompute --videos` reads it.
    Raises: ValueError for a wrong number; OSError about the folder.
    """
    from fps_jax.files import new_directory

    if not 1 <= clips <= 10**6 or seed < 0:  # six digits in a name
        raise ValueError(f"clips={clips} must be in 1 to 1000000 and seed={seed} at least 0")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"out={str(out)!r} is not empty; give another folder")
    with new_directory(out) as folder, (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption", "colour", "shape", "motion", "background"])
        for index in range(clips):
            facts, text, frames = make_clip(seed, index, held_out)
            name = f"{index:06d}.mp4"
            (folder / name).write_bytes(_encode(frames))
            table.writerow([name, text, *vars(facts).values()])


def _path(facts: Facts, rng: np.random.Generator) -> tuple[Float32[np.ndarray, "F 1 1"], ...]:
    """x and y of the centroid, and the radius, of every frame, in pixels."""
    progress = np.linspace(0, 1, FRAMES)
    grown = np.interp(progress, (0, 1), GROWTH if facts.motion == "grows" else (1, 1))
    radius = rng.uniform(*RADIUS) * grown
    side, above, below = (reach * radius.max() for reach in SHAPES[facts.shape])
    edges = rng.uniform(*MARGIN, size=4)
    across = np.array([edges[0] + side, WIDTH - edges[1] - side])  # the centroid's room
    along = np.array([edges[2] + above, HEIGHT - edges[3] - below])
    centre = np.array([across.mean(), along.mean()])
    room = np.array([np.ptp(across), np.ptp(along)])
    dx, dy = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}.get(
        facts.motion, (0, 0)
    )
    direction = np.array([dx, dy])
    share = 1.0 if direction.any() else STAY
    middle = centre + np.where(direction == 0, share * rng.uniform(-0.5, 0.5, size=2) * room, 0)
    x, y = middle[:, None] + (direction * room)[:, None] * (progress - 0.5)
    return tuple(row.astype(np.float32)[:, None, None] for row in (x, y, radius))


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> Float32[np.ndarray, "F 48 64"]:
    """Pixels to the outline, negative inside; x and y from the centroid, y downwards."""
    side, _, below = (reach * radius for reach in SHAPES[shape])
    match shape:
        case "circle":
            return np.hypot(x, y) - radius
        case "bar":
            return np.maximum(np.abs(x) - side, np.abs(y) - below)
        case "triangle":  # upright, of equal sides, each `below` from the centroid
            return np.maximum(y, np.float32(3**0.5 / 2) * np.abs(x) - y / 2) - below
    raise NotImplementedError(f"shape={shape!r} has no outline here; give it one")


@functools.cache
def _combinations(held_out: bool) -> tuple[tuple[str, str, str], ...]:
    return tuple(c for c in itertools.product(COLOURS, SHAPES, MOTIONS) if is_held_out(*c) == held_out)


def _one_of[T](choices: list[T] | tuple[T, ...], rng: np.random.Generator) -> T:
    return choices[rng.integers(len(choices))]


def _wordings(value: str) -> tuple[str, ...]:
    return MOTIONS.get(value) or SPELLINGS.get(value) or (value,)


def _value(words: str) -> str:
    tables = (COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    return next(value for table in tables for value in table if words in _wordings(value))


def _fill(template: str, words: dict[str, str]) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", template.format(**words))


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """Of each template, over tokens joined by spaces, with a group for each fact."""
    tables = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}
    groups = {
        fact: f"(?P<{fact}>{'|'.join(words for value in table for words in _wordings(value))})"
        for fact, table in tables.items()
    }
    spaced = (re.sub(r"([,;:])", r" \1", template) for template in TEMPLATES)
    return tuple(re.compile(template.format(**groups)) for template in spaced)


def _encode(frames: UInt8[np.ndarray, "F H W 3"]) -> bytes:
    """An mp4 of lossless H.264 in RGB: 4:2:0, as videos to look at have it, would smear colours over half a shape's edge."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264rgb", rate=FPS, options={"crf": "0", "preset": "ultrafast", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    from fps_jax.errors import run_cli

    raise SystemExit(run_cli(_main, argv))


def _main(argv: list[str]) -> None:
    import tyro

    from fps_jax.errors import parse as parse_arguments

    def arguments(
        out: Annotated[pathlib.Path, tyro.conf.Positional], /, clips: int = 4000, seed: int = 0, held_out: bool = False
    ) -> None:
        """Write captioned clips.

        Args:
          out: a new or empty folder.
          clips: how many.
          seed: clip i is a function of this, i and --held-out alone.
          held_out: of the combinations that training never sees.
        """
        write_clips(out, clips, seed, held_out)

    parse_arguments(arguments, argv, prog="python -m benchmarks.claim.world")


if __name__ == "__main__":
    main()
