"""Stages and what a profile makes of them: times of their own, compilation apart, a trace, a page; nothing where nobody asked."""

import html.parser
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fps_jax
from fps_jax.profiling import stages
from fps_jax.profiling.page import page
from fps_jax.profiling.stages import profile, stage

# What a sleep may take longer than it was told to, on a machine that does much else.
LATE = 0.25


def read(folder) -> dict:
    return json.loads((folder / "profile.json").read_text())


def test_without_a_profile_a_stage_is_nothing():
    with stage("a") as one, stage("b", 3) as other:
        one.step(1)
    assert one is other


def test_a_stage_has_its_own_time_and_what_is_in_none_is_other(tmp_path):
    with fps_jax.profile(tmp_path / "new" / "profile", "a run"):
        with stage("outer"):
            time.sleep(0.1)
            with stage("inner"):
                time.sleep(0.3)
        time.sleep(0.2)
        for block in range(3):
            with stage("made", block) as made:
                for step in (1, 2):
                    time.sleep(0.02)
                    made.step(step)
    record = read(tmp_path / "new" / "profile")
    of = record["stages"]
    assert list(of) == ["outer", "inner", "made"]  # as they began
    assert [of[name]["calls"] for name in of] == [1, 1, 3]
    for name, least in (("outer", 0.1), ("inner", 0.3), ("made", 0.12)):
        assert least <= of[name]["seconds"] < least + LATE, name
    assert 0.2 <= record["other_seconds"] < 0.2 + LATE
    total = sum(one["seconds"] for one in of.values()) + record["other_seconds"]
    assert total == pytest.approx(record["seconds"], abs=1e-5)
    assert of["outer"]["later_mean"] is None
    spans = [span for span in record["spans"] if span["stage"] == "made"]
    assert [span["block"] for span in spans] == [0, 1, 2]
    assert of["made"]["later_mean"] == pytest.approx((spans[1]["seconds"] + spans[2]["seconds"]) / 2, abs=1e-5)
    for span in spans:
        assert [done for done, *_ in span["steps"]] == [1, 2]
        assert 0.04 <= sum(seconds for _, seconds, _ in span["steps"]) <= span["seconds"] + 1e-5
    (trace,) = (tmp_path / "new" / "profile").rglob("*.xplane.pb")
    assert b"inner" in trace.read_bytes()
    assert record["trace_seconds"] == pytest.approx(record["seconds"], abs=LATE)


def test_compiling_is_told_from_running(tmp_path):
    """By the first call and the next; and the program isn't another one under a profile."""

    @jax.jit
    def f(x):
        for _ in range(30):
            x = jnp.sin(x) @ x
        return x

    x = np.eye(8, dtype=np.float32)
    with profile(tmp_path / "first"):
        with stage("run"):
            f(x).block_until_ready()
        with stage("run"):
            f(x).block_until_ready()
    assert f._cache_size() == 1
    record = read(tmp_path / "first")
    cold, warm = record["spans"]
    assert 0.5 * cold["seconds"] < cold["compile_seconds"] <= cold["seconds"]
    assert warm["compile_seconds"] == 0
    assert record["stages"]["run"]["compile_seconds"] == pytest.approx(record["compile_seconds"], abs=1e-5)
    with profile(tmp_path / "again"), stage("run"):
        f(x).block_until_ready()
    assert f._cache_size() == 1
    assert read(tmp_path / "again")["compile_seconds"] == 0


def test_compilation_that_is_told_twice_counts_once(monkeypatch):
    """Tracing of an inner function ends before that of the one around it, and is told first."""
    made = stages._Profile(traced_blocks=3)
    for end, duration, kind in ((2, 1, "a"), (4, 0.5, "a"), (5, 4.5, "b"), (7, 1, "b"), (9, 1, "none")):
        monkeypatch.setattr(time, "perf_counter", lambda now=end: now)
        prefix = "/jax/elsewhere/" if kind == "none" else "/jax/core/compile/"
        made.compiled(prefix + kind, duration)
    assert made.compiling == [(0.5, 5), (6, 7)]
    assert made.compiling_in(0, 10) == 5.5
    assert made.compiling_in(1, 6.25) == 4.25
    assert made.compiling_in(7, 9) == 0


def test_the_trace_of_a_stream_ends_and_its_spans_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_MOST_SPANS", 3)
    with profile(tmp_path / "out", traced_blocks=2):
        for block in range(5):
            with stage("made", block):
                time.sleep(0.05)
    record = read(tmp_path / "out")
    assert 0.1 <= record["trace_seconds"] < record["seconds"] - 0.1
    assert record["stages"]["write trace"]["calls"] == 1
    assert record["stages"]["made"]["calls"] == 5
    assert (len(record["spans"]), record["spans_left_out"]) == (3, 3)
    assert "3 later spans are in the sums only" in (tmp_path / "out" / "profile.html").read_text()


def test_stages_of_two_threads_are_not_within_each_other(tmp_path):
    import threading

    def other():
        with stage("decode"):
            time.sleep(0.1)

    with profile(tmp_path / "out"), stage("denoise"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    of = read(tmp_path / "out")["stages"]
    assert of["denoise"]["seconds"] >= of["decode"]["seconds"] >= 0.1


def test_what_fails_leaves_nothing_and_the_next_can_be_made(tmp_path):
    with pytest.raises(RuntimeError, match="broken"), profile(tmp_path / "a" / "b"), stage("x"):
        raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []
    assert stage("a") is stage("b")
    with (
        profile(tmp_path / "out"),
        pytest.raises(ValueError, match="a profile is being made already"),
        profile("other"),
    ):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty"), profile(tmp_path / "full"):
        pass
    with profile(None):
        assert stage("a") is stage("b")


def test_a_trace_that_is_under_way_is_told(tmp_path):
    with (
        jax.profiler.trace(str(tmp_path / "theirs")),
        pytest.raises(ValueError, match="a trace can't be made"),
        profile(tmp_path / "ours"),
    ):
        pass
    assert not (tmp_path / "ours").exists()
    with profile(tmp_path / "ours"):
        pass
    assert read(tmp_path / "ours")["stages"] == {}


class Elements(html.parser.HTMLParser):
    """Text, tags and attributes of a page; every element is closed."""

    EMPTY = ("meta", "rect", "line")

    def __init__(self, content: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def record_of(**changes) -> dict:
    """Of a run with two stages."""
    one = {"calls": 2, "seconds": 6.0, "compile_seconds": 4.0, "later_mean": 0.5}
    made = [{"stage": "denoise", "block": i, "begin": 7 * i, "seconds": 3.0, "compile_seconds": 2.0} for i in range(2)]
    steps = [[1, 0.4, 0.0], [3, 0.6, 0.0]]
    text = {"stage": "text & <b>", "begin": 6.0, "seconds": 1.0, "compile_seconds": 0.0, "steps": steps}
    return {
        "what": "fps-stream <i>.mp4",
        "seconds": 10.0,
        "compile_seconds": 4.0,
        "stages": {"denoise": one, "text & <b>": {**one, "calls": 1, "later_mean": None}},
        "other_seconds": 2.0,
        "spans": [*made, text],
        "spans_left_out": 0,
        "trace_seconds": 9.0,
        "versions": {"jax": "0.11.2"},
        "device": "cpu",
        **changes,
    }


def test_the_page_stands_alone_and_names_every_stage():
    content = page(record_of())
    found = Elements(content)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not {"src", "href", "onload"} & set(found.attributes)
    assert "http" not in content.replace("http-equiv", "")
    text = " ".join(found.words)
    for words in ("Profile of fps-stream <i>.mp4", "denoise", "text & <b>", "other", "block by block", "step by step"):
        assert words in text, words
    assert "i" in found.tags  # bars; but none of the name
    assert found.tags.count("rect") == 3 + 2 + 2  # the timeline, the blocks, the steps


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": {}, "spans": []},
        {"seconds": 0.0, "stages": {}, "spans": []},
        {"seconds": 1e6},
        {"trace_seconds": None},
        {"spans": [{"stage": "denoise", "block": i, "begin": 0, "seconds": 0.0, "compile_seconds": 0.0} for i in range(500)]},
    ],
)  # fmt: skip
def test_a_page_of_anything_is_one(changes):
    assert "table" in Elements(page(record_of(**changes))).tags
