"""Where a clip goes, and that the table counts every one."""

import pathlib
import re

import pytest

from fps_train.precompute.buckets import Rule, Size, table
from fps_train.precompute.clips import Clip, ClipError, Dropped
from fps_train.precompute.frames import Probe

CLIP = Clip(path=pathlib.Path("/clips/a.mp4"), source="a.mp4", caption="A")
PICTURE = Clip(path=pathlib.Path("/clips/a.png"), source="a.png", caption="A")


def rule(*sizes, exact=True, task="t2v", min_frames=5):
    return Rule(tuple(map(Size.parse, sizes)), exact, min_frames, 16, task)


def place(rule, frames=81, height=480, width=832, clip=CLIP, longer=False):
    return rule.place(clip, "hash", Probe(frames, frames, longer, height, width))


@pytest.mark.parametrize(("there", "used"), [(81, 81), (80, 77), (60, 57), (8, 5), (5, 5)])
def test_the_largest_4k_plus_1_that_is_there(there, used):
    placed = place(rule("480x832x81", exact=False), there)
    assert placed.size == (480, 832, used)
    assert placed.cut == (there != used)


def test_a_clip_goes_where_most_of_it_is_kept():
    sizes = rule("480x832x81", "832x480x81", "480x832x49", "480x832x1")
    assert place(sizes, 81).size.name == "480x832x81"
    assert place(sizes, 60).size.name == "480x832x49"
    assert place(sizes, 90, 1920, 1080).size.name == "832x480x81"
    # upright, 60 frames: a third of 49 frames' picture rather than one frame
    assert place(sizes, 60, 1920, 1080).size.name == "480x832x49"
    assert place(sizes, 1, clip=PICTURE).size.name == "480x832x1"
    # a whole picture of 49 frames beats 43% of one of 81: 49 against 34.6
    both = rule("480x480x81", "208x480x49")
    assert place(both, 81, 208, 480).size.name == "208x480x49"


def test_what_is_kept_of_a_picture():
    one = place(rule("480x832x81"), 100, 1080, 1920, longer=True)
    assert one.kept == pytest.approx(832 / 480 * 1080 / 1920)  # the height fits, the width is cropped
    assert one.cut
    assert not one.enlarged
    assert place(rule("480x832x81"), 81, 240, 416).enlarged
    assert place(rule("480x832x81"), 81, 240, 416).kept == 1


@pytest.mark.parametrize(
    ("rules", "probe", "message"),
    [
        (rule("480x832x81", exact=False), {"frames": 4}, "shorter than 5 frames at 16 fps"),
        (rule("480x832x81", "480x832x1"), {"frames": 9}, None),
        (rule("480x832x1"), {"frames": 1}, "a bucket of 1 is for images unless --min-frames is 1"),
        (rule("480x832x81"), {"frames": 80}, "shorter than the shortest bucket, 81 frames"),
        (rule("480x832x81"), {"frames": 1, "clip": PICTURE}, "shorter than the shortest bucket, 81 frames"),
        (rule("480x832x81", exact=False, task="i2v"), {"frames": 1, "clip": PICTURE}, "an image, and i2v learns"),
    ],
)
def test_clips_that_fit_nowhere_say_why(rules, probe, message):
    # a video is never cut to a picture: the bucket of one frame is for images
    with pytest.raises(ClipError, match=message or "shorter than the shortest bucket"):
        place(rules, **probe)


def test_the_table_counts_every_clip():
    rules = rule("480x832x81", exact=False)
    placed = [place(rules, n) for n in (81, 81, 60, 33)] + [place(rules, 1, clip=PICTURE)]
    dropped = [Dropped(source=f"d{i}.mp4", reason="no caption") for i in range(7)]
    dropped.append(Dropped(source="e.mp4", reason="can't be read", detail="why"))
    text = table(placed, dropped, rules, texts_cut=2, text_len=512)
    rows = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"^(\d+x\d+x\d+) +(\d+) +(\d+) ", text, re.M)}
    assert rows == {"480x832x81": (2, 0), "480x832x57": (1, 1), "480x832x33": (1, 0), "480x832x1": (1, 0)}  # kept, cut
    assert "kept 5 of 13; 16 frames a second" in text
    assert re.search(r"^ +7  no caption: d0.mp4, d1.mp4, d2.mp4, and 4 more$", text, re.M)
    assert re.search(r"^ +1  can't be read: e.mp4 \(why\)$", text, re.M)
    assert "captions longer than 512 tokens, cut there: 2" in text
    assert "compiles programs" not in text
    assert "compiles programs" in table([*placed, place(rules, 20)], [], rules, texts_cut=0, text_len=512)


def test_an_empty_bucket_is_in_the_table():
    rules = rule("480x832x81", "480x832x49")
    text = table([place(rules, 81)], [], rules, texts_cut=0, text_len=512)
    assert re.search(r"^480x832x49 +0 ", text, re.M)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("480x832", "'480x832' is not HEIGHTxWIDTHxFRAMES, as in 480x832x81"),
        ("480x832x80", "num_frames=80 is not 4k"),
        ("480x830x81", "width=830 is not a positive multiple of 16"),
    ],
)
def test_sizes_that_are_none(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Size.parse(text)
