"""The checker of the small claim: reads every fact of a clip from its pixels, and whether it shows exactly one object.

It shares no code with what draws the clips, only the table of colours: shapes are told by their areas, motions by lines fitted to
centroid and radius. It is made for samples of a model: a VAE's blur and some noise leave a clip readable, while a fact that isn't
plain (a shape between two, a path that jumps, a colour that changes) is None, which counts as wrong.

What counts as an object: a connected region (4 neighbours) of at least `SPECK` pixels in one frame. Regions are counted twice, and
both counts must be one in every frame: of the pixels that differ from the background by `VISIBLE` levels, which finds a second
object however faint its colour; and of those more than half way from the background to the object's colour, which finds the gap
(4 pixels or more) between two halves that blur has joined. Smaller regions are stray specks and no objects.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from scipy import ndimage

from benchmarks.claim.world import BACKGROUNDS, COLOURS, Facts

VISIBLE = 45.0  # levels of RGB distance, of a pixel and of the 3 x 3 around it; the palest colour has 120
SPECK = 12  # pixels; the smallest object drawn, a growing bar in its first frame, has 45
REACH = 60.0  # levels of RGB distance from a named colour, for it to be that one
PLAIN = 0.7  # share of the object's inner pixels that must be of its colour; of another one may be what is left
MOST_FRAMES = 0.8  # share of the frames that must agree on the shape, or show an object for motion to be read
OVERLAP = 0.8  # with the outline of the same area; of two shapes, circle and triangle are most alike: 0.69
TRAVEL = 15.0  # pixels that count as a move; drawn paths have 21 or more
SIDEWAYS = 0.25  # of a move: drift across it that is let through
REST = 5.0  # pixels that something that stays in place may drift
STRAY = 3.0  # pixels, root mean square: from a path of constant speed
PULSE = 0.1  # of the mean radius, root mean square: from growth of constant speed, or none
SAME_SIZE, GROWN = 1.2, 1.6  # radius, last frame over first (or first over last): at most, at least; drawn 1 and 2.4
DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}  # y downwards
_IN_FRAME = ndimage.generate_binary_structure(3, 1) & np.array([False, True, False])[:, None, None]  # 4 neighbours


class Reading(NamedTuple):
    """What a clip shows; None where that can't be told.

    Attributes:
      one_object: exactly one object in every frame.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None
    one_object: bool


def read(video: UInt8[np.ndarray, "F H W 3"]) -> Reading:
    """Facts from pixels alone.

    Args:
      video: at least 2 frames.
    Raises: ValueError for another shape or dtype.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or len(video) < 2:
        raise ValueError(
            f"video has shape {video.shape} and dtype {video.dtype}; it must be uint8 [F, H, W, 3], F >= 2"
        )
    pixels = video.astype(np.float32)
    under = _border(pixels)
    background = _same_name(under, BACKGROUNDS)
    visible, solid = _masks(pixels - under[:, None, None])
    objects, halves = _regions(solid)
    _, others = _regions(visible)
    one_object = bool((halves == 1).all() and (others == 1).all())
    present = objects.any((1, 2))
    if present.mean() < MOST_FRAMES:
        return Reading(None, None, None, background, one_object)
    cx, cy, area = _centroids(objects[present])
    return Reading(
        _read_colour(pixels, visible, objects),
        _read_shape(objects[present], cx, cy, area),
        _read_motion(np.flatnonzero(present) / (len(video) - 1), cx, cy, np.sqrt(area)),
        background,
        one_object,
    )


def score(facts: Facts, reading: Reading) -> dict[str, bool]:
    """Which facts a clip got right: colour, shape, motion, background, one_object; whole: all of them.

    Where the facts leave the background out, any of the world's is right.
    """
    right = {
        "colour": reading.colour == facts.colour,
        "shape": reading.shape == facts.shape,
        "motion": reading.motion == facts.motion,
        "background": reading.background is not None and facts.background in (None, reading.background),
        "one_object": reading.one_object,
    }
    return {**right, "whole": all(right.values())}


def _border(pixels: Float32[np.ndarray, "F H W 3"]) -> Float32[np.ndarray, "F 3"]:
    """The colour of each frame's outermost 3 pixels: a median, as an object may reach into them."""
    outer = np.ones(pixels.shape[1:3], bool)
    outer[3:-3, 3:-3] = False
    return np.median(pixels[:, outer], axis=1)


def _nearest(rgb: np.ndarray, table: dict[str, tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(index in the table, distance) of the colour nearest to each."""
    distances = np.stack([np.sqrt(((rgb - np.array(value, np.float32)) ** 2).sum(-1)) for value in table.values()])
    return distances.argmin(0), distances.min(0)


def _same_name(rgb: Float32[np.ndarray, "F 3"], table: dict[str, tuple[int, int, int]]) -> str | None:
    """The name that every frame's colour has."""
    index, distance = _nearest(rgb, table)
    return list(table)[index[0]] if (index == index[0]).all() and (distance < REACH).all() else None


def _masks(difference: Float32[np.ndarray, "F H W 3"]) -> tuple[Bool[np.ndarray, "F H W"], Bool[np.ndarray, "F H W"]]:
    """(visibly not the background, more than half way from it to the colour of what is visible), from pixels - background."""
    # Noise to a third; the pixel too, so that a speck stays small
    smooth = ndimage.uniform_filter(difference, (0, 3, 3, 0))
    visible = (_squares(smooth) > VISIBLE**2) & (_squares(difference) > VISIBLE**2)
    solid = np.zeros_like(visible)
    for f, inner in enumerate(_inside(visible)):
        if inner.any():
            contrast = np.median(difference[f][inner], axis=0)
            solid[f] = visible[f] & (difference[f] @ contrast > 0.5 * (contrast @ contrast))
    return visible, solid


def _squares(rgb: Float32[np.ndarray, "F H W 3"]) -> Float32[np.ndarray, "F H W"]:
    return np.einsum("fyxc,fyxc->fyx", rgb, rgb)


def _inside(mask: Bool[np.ndarray, "F H W"]) -> Bool[np.ndarray, "F H W"]:
    """Without 2 pixels of edge, whose colours are mixed; frames of which that leaves nothing are whole."""
    inner = mask
    for _ in range(2):  # erosion with 4 neighbours; outside of the frame there is nothing
        padded = np.pad(inner, ((0, 0), (1, 1), (1, 1)))
        inner = inner & padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return np.where(inner.any((1, 2), keepdims=True), inner, mask)


def _read_colour(
    pixels: Float32[np.ndarray, "F H W 3"], visible: Bool[np.ndarray, "F H W"], objects: Bool[np.ndarray, "F H W"]
) -> str | None:
    inner = _inside(objects)
    name = _same_name(np.array([np.median(pixels[f][m], axis=0) for f, m in enumerate(inner) if m.any()]), COLOURS)
    if name is None:
        return None
    own = list(COLOURS).index(name)
    plain = _named(pixels[inner]) == own
    named = _named(pixels[_inside(visible)])  # a half of another colour is visible, but no part of `objects`
    others = (named != own) & (named >= 0)
    return name if plain.mean() >= PLAIN and others.mean() <= 1 - PLAIN else None


def _named(rgb: Float32[np.ndarray, "n 3"]) -> Int[np.ndarray, " n"]:
    """Which of the colours each is, -1 where none is within reach."""
    index, distance = _nearest(rgb, COLOURS)
    return np.where(distance < REACH, index, -1)


def _regions(mask: Bool[np.ndarray, "F H W"]) -> tuple[Bool[np.ndarray, "F H W"], Int[np.ndarray, " F"]]:
    """(the largest region of each frame, regions in each), those of `SPECK` pixels and more."""
    labels, count = ndimage.label(mask, _IN_FRAME)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    frame_of = np.zeros(count + 1, int)
    frames, rows, columns = np.nonzero(mask)
    frame_of[labels[frames, rows, columns]] = frames
    largest, counts = np.full(len(mask), -1), np.zeros(len(mask), int)  # no label is -1
    for label in range(1, count + 1):
        f = frame_of[label]
        if areas[label] >= SPECK:
            counts[f] += 1
            if largest[f] < 0 or areas[label] > areas[largest[f]]:
                largest[f] = label
    return labels == largest[:, None, None], counts


def _centroids(masks: Bool[np.ndarray, "F H W"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y of the centroid, and the area, of each frame's object, in pixels."""
    columns, rows = masks.sum(1), masks.sum(2)
    area = rows.sum(1)
    return columns @ (np.arange(masks.shape[2]) + 0.5) / area, rows @ (np.arange(masks.shape[1]) + 0.5) / area, area


def _read_shape(masks: np.ndarray, cx: np.ndarray, cy: np.ndarray, area: np.ndarray) -> str | None:
    """The shape whose outline, of the same area and centroid, covers the same pixels; large frames count more."""
    cx, cy, whole = (of_frame.astype(np.float32)[:, None, None] for of_frame in (cx, cy, area))
    x = np.arange(masks.shape[2], dtype=np.float32)[None, None, :] + 0.5 - cx
    y = np.arange(masks.shape[1], dtype=np.float32)[None, :, None] + 0.5 - cy
    # Of an upright triangle of equal sides, whose centroid is a third of it above the base
    height = np.sqrt(whole * 3**0.5)
    from_top = y + height * 2 / 3
    outlines = {
        "circle": x**2 + y**2 < whole / np.pi,
        "bar": (np.abs(x) < np.sqrt(2.5 * whole) / 2) & (np.abs(y) < np.sqrt(whole / 2.5) / 2),
        "triangle": (np.abs(x) < from_top / 3**0.5) & (from_top < height),
    }
    overlaps = np.array([(o & masks).sum((1, 2)) / (o | masks).sum((1, 2)) for o in outlines.values()])
    weights = area / area.sum()
    best = int((overlaps @ weights).argmax())
    agree = ((overlaps.argmax(0) == best) * weights).sum()
    return list(outlines)[best] if overlaps[best] @ weights >= OVERLAP and agree >= MOST_FRAMES else None


def _read_motion(progress: np.ndarray, cx: np.ndarray, cy: np.ndarray, size: np.ndarray) -> str | None:
    """progress: of each frame, 0 to 1. size: of the object, of the unit of a length."""
    (_, dx, stray_x), (_, dy, stray_y), (first, change, stray_size) = (_line(progress, v) for v in (cx, cy, size))
    last = first + change
    if min(first, last) <= 0 or np.hypot(stray_x, stray_y) > STRAY or stray_size > PULSE * size.mean():
        return None
    growth, travel = last / first, np.hypot(dx, dy)
    if travel < REST and growth >= GROWN:
        return "grows"
    if not 1 / SAME_SIZE <= growth <= SAME_SIZE:
        return None
    if travel < REST:
        return "stays still"
    for name, (right, down) in DIRECTIONS.items():
        ahead, aside = dx * right + dy * down, abs(dx * down) + abs(dy * right)
        if ahead >= TRAVEL and aside <= SIDEWAYS * ahead:
            return name
    return None


def _line(progress: Float[np.ndarray, " F"], values: Float[np.ndarray, " F"]) -> tuple[float, float, float]:
    """(value at 0, change from 0 to 1, root mean square of what is left) of the line of least squares."""
    slope, start = np.polyfit(progress, values, 1)
    return float(start), float(slope), float(np.sqrt(np.mean((values - start - slope * progress) ** 2)))
