"""The video drift error against its formula, and each metric against its definition in plain loops."""

import math

import numpy as np
import pytest

from fps_jax.evaluation.drift import METRICS, Measured, check_scores, chunk_metrics, measure_video, plot, vde
from fps_jax.media.video import save_video


def test_by_hand():
    """m = 2, 1, 3, 2.5 deviates by 1/2, 1/2, 1/4 of the first; weights 3, 2, 1, and their logarithms."""
    assert vde([2, 1, 3, 2.5]) == 3 * 0.5 + 2 * 0.5 + 1 * 0.25
    assert vde([2, 1, 3, 2.5], "log") == pytest.approx(math.log(3) * 0.5 + math.log(2) * 0.5, rel=1e-15)
    assert vde([0.1] * 10) == 0
    assert vde([1] + [2] * 9) == 45  # 9 + 8 + ... + 1


def test_it_is_a_drift_from_the_beginning():
    """Reversed, twice as far from half as much; of another unit, the same; late, by less weight."""
    assert vde([2, 1]) == 0.5
    assert vde([1, 2]) == 1.0
    rng = np.random.default_rng(0)
    m = rng.random(10)
    assert vde(m * 7) == pytest.approx(vde(m), rel=1e-12)
    assert vde([1, 2, 1, 1]) == 3
    assert vde([1, 1, 1, 2]) == 1
    assert vde([1, 1, 1, 2], "log") == 0


def test_where_the_first_chunk_has_nothing():
    assert vde([0, 0, 0]) == 0
    assert vde([0, 0, 1e-9]) == math.inf


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([1], "linear", "one for each of two chunks or more"),
        ([[1, 2]], "linear", "one for each of two chunks or more"),
        ([1, float("nan")], "linear", "not all finite numbers of 0 or more"),
        ([1, float("inf")], "linear", "not all finite"),
        ([1, -1], "linear", "not all finite numbers of 0 or more"),
        ([1, 2], "square", "weights='square' is not one of 'linear', 'log'"),
    ],
)
def test_what_is_no_series_of_values(values, weights, message):
    with pytest.raises(ValueError, match=message):
        vde(values, weights)


def by_definition(video: np.ndarray) -> dict[str, float]:
    """The metrics of a chunk pixel by pixel, in float64."""
    y = video @ np.array([0.2126, 0.7152, 0.0722])
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for t, frame in enumerate(video):
        height, width = frame.shape[:2]
        laplacian = [
            y[t, i - 1, j] + y[t, i + 1, j] + y[t, i, j - 1] + y[t, i, j + 1] - 4 * y[t, i, j]
            for i in range(1, height - 1)
            for j in range(1, width - 1)
        ]
        found["sharpness"].append(np.mean(np.square(laplacian)) - np.mean(laplacian) ** 2)
        r, g, b = (frame[..., i].ravel() for i in range(3))
        d, e = r - g, (r + g) / 2 - b
        found["colour"].append(np.sqrt(np.var(d) + np.var(e)) + 0.3 * np.sqrt(np.mean(d) ** 2 + np.mean(e) ** 2))
        found["contrast"].append(np.std(y[t]))
        found["brightness"].append(np.mean(y[t]))
    means = found["brightness"]
    found["motion"] = [np.mean(np.abs(y[t] - y[t - 1])) for t in range(1, len(y))]
    found["flicker"] = [abs(means[t - 1] - 2 * means[t] + means[t + 1]) for t in range(1, len(y) - 1)]
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("count", [3, 7])
def test_metrics_are_their_definitions(dtype, count):
    """In float32: 1e-5 of each, where the rounding of a pixel is 6e-8 and flicker is a difference of means."""
    video = np.random.default_rng(1).random((count, 9, 13, 3)) ** 2
    if dtype == np.uint8:
        video = np.rint(video * 255)
    want = by_definition(video / 255 if dtype == np.uint8 else video)
    got = chunk_metrics(video.astype(dtype))
    assert list(got) == list(METRICS)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_what_a_video_has_nothing_of_is_0_exactly():
    rng = np.random.default_rng(2)
    still = np.repeat(rng.random((1, 9, 11, 3)).astype(np.float32), 4, 0)
    got = chunk_metrics(still)
    assert (got["motion"], got["flicker"]) == (0, 0)
    grey = np.repeat(rng.random((4, 9, 11, 1)).astype(np.float32), 3, -1)
    assert chunk_metrics(grey)["colour"] == 0
    for level in range(1, 256, 7):
        flat = chunk_metrics(np.full((3, 9, 11, 3), level, np.uint8))
        assert [name for name, value in flat.items() if value] == ["brightness"]


def test_what_each_metric_is_blind_to():
    """Even fading is no flicker, one jump is; a pan along the grain moves nothing but pixels; a blur takes sharpness first."""
    rng = np.random.default_rng(3)
    picture = rng.random((1, 16, 16, 3)).astype(np.float32) / 2
    rising = picture + np.linspace(0, 0.4, 5, dtype=np.float32)[:, None, None, None]
    even = chunk_metrics(rising)
    assert even["flicker"] < 1e-6
    assert even["motion"] == pytest.approx(0.1, rel=1e-5)
    jump = chunk_metrics(picture + np.array([0, 0, 0.4, 0.4, 0.4], np.float32)[:, None, None, None])
    assert jump["flicker"] == pytest.approx(0.8 / 3, rel=1e-5)  # of three triples, the two around the jump
    blurred = (rising + np.roll(rising, 1, 2)) / 2
    assert chunk_metrics(blurred)["sharpness"] < 0.7 * even["sharpness"]
    assert chunk_metrics(blurred)["brightness"] == pytest.approx(even["brightness"], rel=1e-5)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), "a chunk has 2 frames; flicker needs 3 or more"),
        (np.zeros((3, 4, 4), np.uint8), r"must be \[H, W, 3\]"),
        (np.zeros((3, 2, 4, 3), np.uint8), "of 3x3 pixels or more"),
        (np.zeros((3, 4, 4, 3), np.int32), "pass uint8 or floats in"),
        (np.full((3, 4, 4, 3), np.nan), "must be in .0, 1. and finite"),
        ([np.zeros((4, 4, 3)), np.zeros((4, 6, 3))], "frame 1 has .4, 6. pixels"),
    ],
)
def test_what_are_no_frames(frames, message):
    with pytest.raises(ValueError, match=message):
        chunk_metrics(frames)


FADE = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def fading(tmp_path_factory):
    """A picture whose contrast falls by known factors, one a chunk of 5 frames; 2 frames more are left out."""
    picture = np.random.default_rng(4).random((8, 12, 1)).repeat(8, 0).repeat(8, 1).repeat(3, 2)
    contrast = [*np.repeat(FADE, 5).tolist(), 0.0, 0.0]
    video = np.stack([0.5 + 0.9 * factor * (picture - picture.mean()) for factor in contrast])
    path = tmp_path_factory.mktemp("drift") / "fading.mp4"
    save_video(video.astype(np.float32), path, crf=0)
    return path


def test_a_file_of_known_contrast(fading):
    """By hand: deviations 1/4, 1/2, 3/4 by weights 3, 2, 1 make 2.5; the codec's 8 bits and 4:2:0 leave a hundredth of it."""
    measured = measure_video(fading, 4)
    assert (measured.frames, measured.frames_per_chunk) == (22, 5)
    assert measured.seconds == pytest.approx([0.125 + 0.3125 * i for i in range(4)], abs=1e-6)
    got = np.array(measured.values["contrast"])
    np.testing.assert_allclose(got / got[0], FADE, atol=0.01)
    assert measured.errors("linear")["contrast"] == pytest.approx(2.5, rel=0.01)
    by_log = 0.25 * math.log(3) + 0.5 * math.log(2)
    assert measured.errors("log")["contrast"] == pytest.approx(by_log, rel=0.01)
    assert measured.errors("linear")["brightness"] < 0.01


def test_memory_does_not_grow_with_the_length(tmp_path):
    """What is held while frames are measured: a generator's, so nothing but the sums and two frames."""
    import tracemalloc

    frame = np.random.default_rng(5).random((64, 64, 3)).astype(np.float32)

    def peak(count: int) -> int:
        tracemalloc.start()
        chunk_metrics(frame for _ in range(count))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(3)
    assert abs(peak(300) - peak(30)) < frame.nbytes / 4


def test_scores_of_another_tool():
    got = check_scores({"b.mp4": {"aesthetic": [1, 2.5]}, "x/a.mp4": {}}, ["x/a.mp4", "y/b.mp4"], 2)
    assert got == {"y/b.mp4": {"aesthetic": [1.0, 2.5]}, "x/a.mp4": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"c.mp4": {}}, "'c.mp4' names no video of those given"),
        ({"b.mp4": {"x" * 81: [1, 2]}}, "the name of a metric is 1 to 80 printable characters"),
        ({"b.mp4": {"": [1, 2]}}, "the name of a metric is 1 to 80 printable characters"),
        ({"b.mp4": {"a\ud800": [1, 2]}}, "the name of a metric is 1 to 80 printable characters"),
        ({"b.mp4": {f"m{i}": [1, 2] for i in range(61)}}, "'b.mp4' has 61 metrics; at most 60 are drawn"),
        ({"a.mp4": {}}, "'a.mp4' names 2 videos of those given"),
        ({"b.mp4": {}, "y/b.mp4": {}}, "'y/b.mp4' is there twice"),
        ({"b.mp4": [1, 2]}, "'b.mp4' is no object of metrics, each a list of 2 numbers"),
        ({"b.mp4": {"quality": [1, 2, 3]}}, "'b.mp4', 'quality' has 3 values; give a list of 2, one a chunk"),
        ({"b.mp4": {"quality": 3}}, "has a int; give a list of 2"),
        ({"b.mp4": {"quality": [1, float("nan")]}}, "value 2 is nan, not a finite number of 0 or more"),
        ({"b.mp4": {"quality": [float("inf"), 1]}}, "value 1 is inf"),
        ({"b.mp4": {"quality": [-1, 1]}}, "value 1 is -1, not a finite number"),
        ({"b.mp4": {"quality": [10**400, 1]}}, "value 1 is 1000"),
        ({"b.mp4": {"quality": [True, 1]}}, "value 1 is True"),
        ({"b.mp4": {"quality": ["1", 1]}}, "value 1 is '1'"),
        ({"b.mp4": {"motion": [1, 1]}}, "'motion': this name is of a metric that is measured here"),
    ],
)
def test_scores_that_are_none(content, message):
    with pytest.raises(ValueError, match=message):
        check_scores(content, ["x/a.mp4", "z/a.mp4", "y/b.mp4"], 2)


def test_names_are_no_formulas_and_all_are_in_the_legend(tmp_path, monkeypatch):
    """Of a file, or of another tool's metric: matplotlib would read $x_{$ as a formula, and leave _boat.mp4 out."""
    from matplotlib.figure import Figure

    legends, real = [], Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda self, *a, **k: legends.append(real(self, *a, **k)))
    one = Measured(6, 3, [0.1, 0.3], {name: [0.0, 0.1] for name in METRICS} | {"c$x_{$": [0.5, 0.6]})
    plot({"_boat.mp4": one, "c$x_{$.mp4": one}, tmp_path / "names.png", weights="linear", title="Drift $x_{$")
    assert [text.get_text() for text in legends[0].get_texts()] == ["_boat.mp4", "c$x_{$.mp4"]
    assert (tmp_path / "names.png").exists()


def test_the_plot_has_a_panel_a_metric_whatever_there_is(tmp_path):
    """Zeros, a metric of one video only, more videos than colours."""
    from PIL import Image

    values = {name: [0.0, 0.0] for name in METRICS}
    one = Measured(6, 3, [0.1, 0.3], values)
    plot({"a": one}, tmp_path / "one.png", weights="linear", title="Drift")
    more = Measured(6, 3, [0.1, 0.3], {**values, "quality": [0.5, 0.6]})
    plot({"a": more, **{f"b{i}": one for i in range(8)}}, tmp_path / "more.png", weights="log", title="Drift")
    with Image.open(tmp_path / "one.png") as two_rows, Image.open(tmp_path / "more.png") as three_rows:
        assert three_rows.height > two_rows.height
