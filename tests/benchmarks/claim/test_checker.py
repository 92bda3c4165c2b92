"""The claim's checker: right on true clips, blurred ones too, and on clips drawn by another hand; strict on all others."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks.claim import checker, world
from benchmarks.claim.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Facts

FACTS = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}


def wrong(facts, video):
    """What the checker says is wrong."""
    return {name for name, right in checker.score(facts, checker.read(video)).items() if not right}


def blurred(video, rng, sigma=1.0, levels=12.0):
    """As a VAE gives clips back, and worse."""
    soft = ndimage.gaussian_filter(video.astype(np.float32), (0, sigma, sigma, 0), mode="nearest")
    return np.clip(np.rint(soft + rng.normal(0, levels, video.shape)), 0, 255).astype(np.uint8)


def drawn(path, kind="circle", radius=8, colour="red", background="gray"):
    """Frames by PIL, which knows nothing of the world's drawing. path: (x, y) of each frame, or None for no object."""
    frames = []
    for place in path:
        image = Image.new("RGB", (64, 48), BACKGROUNDS[background])
        if place is not None:
            (x, y), pen, rgb = place, ImageDraw.Draw(image), COLOURS[colour]
            box = (x - radius, y - radius, x + radius, y + radius)
            corners = [(x, y - radius), (x - 0.866 * radius, y + radius / 2), (x + 0.866 * radius, y + radius / 2)]
            ellipse = (x - 0.6 * radius, y - 1.5 * radius, x + 0.6 * radius, y + 1.5 * radius)  # a bar lies
            match kind:
                case "circle":
                    pen.ellipse(box, fill=rgb)
                case "bar":
                    pen.rectangle((x - 1.25 * radius, y - 0.5 * radius, x + 1.25 * radius, y + 0.5 * radius), fill=rgb)
                case "triangle":
                    pen.polygon(corners, fill=rgb)
                case "ring":
                    pen.ellipse(box, outline=rgb, width=4)
                case "ellipse":
                    pen.ellipse(ellipse, fill=rgb)
                case "upside down":
                    pen.polygon([(a, 2 * y - b) for a, b in corners], fill=rgb)
        frames.append(np.asarray(image))
    return np.stack(frames)


def line(start, end):
    return [tuple(np.add(start, np.subtract(end, start) * i / 16)) for i in range(17)]


STILL = line((32, 24), (32, 24))


@pytest.fixture(scope="module")
def true_clips():
    """Facts and readings of 400 clips, half of them of combinations that are held out."""
    clips = (world.make_clip(11, i, i % 2 == 0) for i in range(400))
    return [(facts, checker.read(video)) for facts, _, video in clips]


def test_true_clips_are_wholly_right(true_clips):
    assert np.mean([checker.score(facts, reading)["whole"] for facts, reading in true_clips]) >= 0.995


def test_blur_and_noise_leave_clips_readable():
    rng = np.random.default_rng(0)
    clips = (world.make_clip(12, i, i % 2 == 0) for i in range(100))
    assert np.mean([not wrong(facts, blurred(video, rng)) for facts, _, video in clips]) >= 0.98


@pytest.mark.parametrize("fact", FACTS)
def test_the_one_fact_that_is_wrong_is_named_and_no_other(fact, true_clips):
    for facts, reading in true_clips[:100]:
        for value in set(FACTS[fact]) - {getattr(facts, fact)}:
            score = checker.score(dataclasses.replace(facts, **{fact: value}), reading)
            assert {name for name, right in score.items() if not right} == {fact, "whole"}


@pytest.mark.parametrize(
    ("motion", "path"),
    [
        ("moves left", line((50, 16), (14, 16))),
        ("moves right", line((14, 32), (50, 32))),
        ("moves up", line((40, 38), (40, 12))),
        ("moves down", line((30, 10), (30, 36))),
        ("stays still", STILL),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_clips_by_another_hand_are_read_alike(shape, motion, path):
    assert wrong(Facts("red", shape, motion, "gray"), drawn(path, shape)) == set()


def test_a_background_left_out_of_the_facts_may_be_any_of_the_world_but_no_other():
    facts, video = Facts("red", "circle", "stays still"), drawn(STILL)
    assert wrong(facts, video) == set()
    elsewhere = np.where(video == BACKGROUNDS["gray"], np.uint8([20, 90, 90]), video)
    assert wrong(facts, elsewhere) == {"background", "whole"}


@pytest.mark.parametrize("kind", ["ring", "ellipse", "upside down"])
def test_shapes_of_no_name_are_none(kind):
    assert checker.read(drawn(STILL, kind)).shape is None


def test_a_colour_between_two_is_none():
    between = (np.add(COLOURS["red"], COLOURS["yellow"]) / 2).astype(np.uint8)
    video = drawn(STILL)
    assert checker.read(np.where(video == COLOURS["red"], between, video)).colour is None


def test_what_changes_on_the_way_is_none():
    red, blue = drawn(STILL), drawn(STILL, colour="blue")
    assert checker.read(np.concatenate([red[:9], blue[9:]])).colour is None
    assert checker.read(np.concatenate([red[:9], drawn(STILL, "bar", 8)[9:]])).shape is None
    assert checker.read(np.concatenate([red[:9], drawn(STILL, background="white")[9:]])).background is None
    halves = red.copy()
    halves[:, :, :32] = blue[:, :, :32]
    assert checker.read(halves).colour is None


@pytest.mark.parametrize(
    "path",
    [
        line((32, 24), (42, 24)),  # too short
        line((14, 12), (38, 36)),  # aslant
        [(14, 24)] * 9 + [(50, 24)] * 8,  # a jump
        line((14, 24), (50, 24))[::2] + line((50, 24), (14, 24))[::2][:8],  # there and back
    ],
)
def test_motions_of_no_name_are_none(path):
    assert checker.read(drawn(path)).motion is None


def test_sizes_that_shrink_pulse_or_grow_while_moving_are_no_motion():
    by_size = np.stack([drawn([(32, 24)], radius=radius)[0] for radius in range(4, 21)])
    assert checker.read(by_size).motion == "grows"
    assert checker.read(by_size[::-1]).motion is None
    assert checker.read(np.concatenate([by_size[::2], by_size[::-2][:8]])).motion is None
    moving = np.stack([drawn([(14 + 2 * i, 24)], radius=5 + i / 2)[0] for i in range(17)])
    assert checker.read(moving).motion is None


@pytest.fixture(params=["sharp", "blurred"])
def seen(request):
    """Clips as they are drawn, and as a VAE may give them back."""
    return (lambda v: v) if request.param == "sharp" else (lambda v: blurred(v, np.random.default_rng(0)))


def test_two_objects_are_not_one(seen):
    for colour in COLOURS:  # the second one of any colour, the faint ones included
        first, second = drawn(line((12, 11), (12, 37))), drawn(line((48, 11), (48, 37)), radius=6, colour=colour)
        both = np.where(second != BACKGROUNDS["gray"], second, first)
        assert checker.read(seen(first)).one_object
        assert not checker.read(seen(both)).one_object


def test_two_objects_in_a_single_frame_are_not_one(seen):
    video = drawn(STILL)
    video[8] = np.where(drawn([(54, 40)], radius=5)[0] != BACKGROUNDS["gray"], COLOURS["red"], video[8])
    assert not checker.read(seen(video)).one_object


def test_no_object_has_no_facts_but_its_background(seen):
    assert checker.read(seen(drawn([None] * 17))) == checker.Reading(None, None, None, "gray", False)


def test_an_object_that_vanishes_for_a_while_is_not_one(seen):
    for frames in (1, 3, 8):
        video = drawn(STILL[: 17 // 2] + [None] * frames + STILL[17 // 2 + frames :])
        assert not checker.read(seen(video)).one_object


@pytest.mark.parametrize("axis", [1, 2])
def test_an_object_cut_into_two_halves_is_not_one(seen, axis):
    for background in BACKGROUNDS:
        video = drawn(STILL, "bar", 10, background=background)
        cut = [slice(None)] * 3
        middle = (24, 32)[axis - 1]
        cut[axis] = slice(middle - 2, middle + 2)
        video[tuple(cut)] = BACKGROUNDS[background]
        assert not checker.read(seen(video)).one_object


def test_stray_specks_are_no_objects():
    video = drawn(STILL)
    video[:, 5:8, 5:8] = COLOURS["red"]  # 9 pixels of the 12
    assert checker.read(video).one_object
    video[:, 5:9, 5:8] = COLOURS["red"]
    assert not checker.read(video).one_object


@pytest.mark.parametrize(
    "video", [np.zeros((17, 48, 64, 3)), np.zeros((48, 64, 3), np.uint8), np.zeros((1, 48, 64, 3), np.uint8)]
)
def test_other_arrays_are_refused(video):
    with pytest.raises(ValueError, match=r"must be uint8 \[F, H, W, 3\], F >= 2"):
        checker.read(video)
