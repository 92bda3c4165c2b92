"""The claim's world: its tables, the grammar there and back, what is held out, clips and their files."""

import csv
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.claim import world
from benchmarks.claim.world import BACKGROUNDS, COLOURS, MORE_COLOURS, MOTIONS, SHAPES, Facts
from fps_train.precompute.clips import find_clips
from fps_train.precompute.frames import read_frames

ROOT = pathlib.Path(__file__).parents[3]
# Of the tables of world.py: as they are, and as they are to grow.
SIZES = {"now": COLOURS, "grown": {**COLOURS, **MORE_COLOURS}}


def some_facts():
    return [world.make_clip(3, i, i % 2 == 0)[0] for i in range(60)]


@pytest.mark.parametrize("size", SIZES)
def test_colours_and_backgrounds_lie_as_far_apart_as_the_checker_needs(size):
    colours = [np.array(rgb) for rgb in SIZES[size].values()]
    backgrounds = [np.array(rgb) for rgb in BACKGROUNDS.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) >= 95
    assert min(np.linalg.norm(a - b) for a in colours for b in backgrounds) >= 115


@pytest.mark.parametrize("size", SIZES)
def test_a_fifth_of_the_combinations_is_held_out_and_all_pairs_of_values_are_seen(size, monkeypatch):
    monkeypatch.setattr(world, "COLOURS", SIZES[size])
    everything = list(itertools.product(SIZES[size], SHAPES, MOTIONS))
    held_out = [c for c in everything if world.is_held_out(*c)]
    seen = [c for c in everything if not world.is_held_out(*c)]
    assert 0.18 <= len(held_out) / len(everything) <= 0.22
    for a, b in itertools.combinations(range(3), 2):
        assert {(c[a], c[b]) for c in seen} == {(c[a], c[b]) for c in everything}
    for fact in range(3):  # so that samples of what is held out say something of every value
        assert {c[fact] for c in held_out} == {c[fact] for c in everything}


@pytest.mark.parametrize("held_out", [False, True])
def test_every_combination_of_its_side_is_drawn_and_none_of_the_other(held_out):
    rng = np.random.default_rng(0)
    drawn = {(f.colour, f.shape, f.motion) for f in (world.draw(rng, held_out) for _ in range(1000))}
    assert drawn == {c for c in itertools.product(COLOURS, SHAPES, MOTIONS) if world.is_held_out(*c) == held_out}


def test_captions_say_their_facts():
    rng, left_out = np.random.default_rng(0), 0
    for facts in some_facts() * 10:
        told = world.parse(world.caption(facts, rng))
        assert told is not None
        left_out += told.background is None
        assert told in (facts, Facts(facts.colour, facts.shape, facts.motion))
    assert 30 <= left_out <= 150  # one template of seven


def test_every_wording_of_every_template_says_its_facts():
    facts = Facts("red", "circle", "stays still", "gray")
    for template, (motion, words) in itertools.product(
        world.TEMPLATES, ((m, w) for m, wordings in MOTIONS.items() for w in wordings)
    ):
        text = template.format(colour="red", shape="circle", motion=words, background="grey")
        background = facts.background if "{background}" in template else None
        assert world.parse(text) == Facts("red", "circle", motion, background)


def test_the_canonical_wording_is_the_short_one_and_in_the_grammar():
    facts = Facts("red", "circle", "moves left", "black")
    assert world.canonical(facts) == "a red circle moves left"
    rng = np.random.default_rng(0)
    assert world.parse(world.canonical(facts)) == Facts("red", "circle", "moves left")
    assert "a red circle moves left" in {world.caption(Facts("red", "circle", "moves left"), rng) for _ in range(100)}


def test_case_spaces_full_stop_and_article_do_not_matter(monkeypatch):
    assert world.parse(" On a Black background,  an red circle moves LEFT. ") == Facts(
        "red", "circle", "moves left", "black"
    )
    monkeypatch.setattr(world, "COLOURS", SIZES["grown"])
    assert world.canonical(Facts("orange", "bar", "grows")) == "an orange bar grows"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a cat moves left",
        "a red circle",
        "red circle moves left",
        "a red circle moves left quickly",
        "a red circle moves left on a pink background",
        "a purple circle moves left",
        "a red circle moves left..",
        "a red blue circle moves left",
        "a red circle moves left and grows",
    ],
)
def test_what_is_outside_of_the_world_has_no_facts(text):
    assert world.parse(text) is None


def test_vocabulary_has_every_token_of_every_caption_and_no_other():
    words = world.vocabulary()
    assert list(words) == sorted(set(words))
    rng = np.random.default_rng(0)
    texts = [world.caption(facts, rng) for facts in some_facts() * 20]
    assert {token for text in texts for token in world.tokenize(text)} == set(words)


def test_a_clip_depends_on_seed_index_and_side_alone():
    facts, text, frames = world.make_clip(5, 7, True)
    again = world.make_clip(5, 7, True)
    assert (facts, text) == again[:2]
    np.testing.assert_array_equal(frames, again[2])
    others = [world.make_clip(6, 7, True), world.make_clip(5, 8, True), world.make_clip(5, 7, False)]
    assert all((frames != other[2]).any() for other in others)
    assert frames.shape == (17, 48, 64, 3)
    assert frames.dtype == np.uint8


@pytest.mark.parametrize(("motion", "axis", "sign"), [("moves left", 2, -1), ("moves up", 1, -1), ("moves down", 1, 1)])
def test_a_path_takes_nearly_all_the_room_there_is(motion, axis, sign):
    for seed in range(20):
        frames = world.render(Facts("red", "triangle", motion, "black"), np.random.default_rng(seed)).astype(int)
        shown = (np.abs(frames - frames[0, 0, 0]).sum(-1) > 0).any(3 - axis)  # by frame and place on the axis
        first, last = (np.flatnonzero(shown[f]) for f in (0, -1))
        end = frames.shape[axis] - 1
        before, after = (first[0], end - last[-1]) if sign > 0 else (end - first[-1], last[0])
        assert min(before, after) >= 0
        assert max(before, after) <= 3


def test_a_background_that_the_facts_leave_out_is_any():
    corners = {
        tuple(world.render(Facts("red", "circle", "grows"), np.random.default_rng(seed))[0, 0, 0].tolist())
        for seed in range(30)
    }
    assert corners == set(BACKGROUNDS.values())


def test_written_clips_come_back_to_the_pixel_with_captions_and_facts(tmp_path):
    out = tmp_path / "clips"
    command = [sys.executable, "-m", "benchmarks.claim.world", str(out), "--clips", "6", "--seed", "4", "--held-out"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    clips, dropped = find_clips(out)
    assert not dropped
    assert len(clips) == 6
    with (out / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for i, (clip, row) in enumerate(zip(clips, rows, strict=True)):
        facts, text, frames = world.make_clip(4, i, True)
        assert clip.caption == text
        assert {fact: row[fact] for fact in vars(facts)} == vars(facts)
        assert world.is_held_out(facts.colour, facts.shape, facts.motion)
        decoded = read_frames(clip.path, is_image=False, fps=16, num_frames=17, height=48, width=64)
        np.testing.assert_array_equal(decoded, frames)


@pytest.mark.parametrize(("clips", "seed"), [(0, 0), (10**6 + 1, 0), (1, -1)])
def test_wrong_numbers_are_refused_before_anything_is_written(tmp_path, clips, seed):
    with pytest.raises(ValueError, match=rf"clips={clips} must be in 1 to 1000000 and seed={seed} at least 0"):
        world.write_clips(tmp_path / "clips", clips, seed, False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="is not empty; give another folder"):
        world.write_clips(tmp_path, 1, 0, False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_shape_without_an_outline_is_refused(monkeypatch):
    monkeypatch.setitem(SHAPES, "ring", (1.0, 1.0, 1.0))
    with pytest.raises(NotImplementedError, match="shape='ring' has no outline here"):
        world.render(Facts("red", "ring", "grows", "black"), np.random.default_rng(0))
