"""What a call of `benchmarks.gpu` keeps and prints: the results file, and the table made of it."""

import json
import pathlib

from benchmarks.gpu_cases import report
from benchmarks.gpu_cases.results import Results
from tests.benchmarks.gpu_records import CASES, PLAN, names, record

ROOT = pathlib.Path(__file__).parents[2]


def timed(seconds: float, **more):
    return {"part": "kernel", "seconds": seconds, "tflops": 1 / seconds, "ok": True, **more}


def results_of(tmp_path: pathlib.Path, *records) -> Results:
    results = Results(tmp_path / "gpu.json", toy=False)
    results.records += records
    return results


def row(results: Results, start: str) -> list[str]:
    """Words of the line of the table, after its name."""
    return next(x for x in report.table(results).splitlines() if x.startswith(start))[52:].split()


# ---- the results file ----


def test_a_call_continues_from_an_earlier_file_and_its_own_counts_more(tmp_path):
    tree, out = tmp_path / "tree" / "gpu.json", tmp_path / "out" / "gpu.json"
    first = Results(tree, toy=False)
    first.calls["one"] = {"gpu": "H200"}
    first.add(record("a", call="one"))
    second = Results(out, toy=False, earlier=tree)
    second.add(record("b", call="two"))
    assert [r["case"] for r in json.loads(out.read_text())["results"]] == ["a", "b"]
    assert [r["case"] for r in json.loads(tree.read_text())["results"]] == ["a"]
    third = Results(out, toy=False, earlier=tree)
    assert third.done("b")
    assert third.calls == {"one": {"gpu": "H200"}}


def test_the_newest_record_of_a_case_counts_but_for_one_that_was_cut_short(tmp_path):
    late = {"failed": "the budget is spent", "unfinished": True}
    results = results_of(tmp_path, record("a", call="1", **late), record("a", call="2", **late))
    assert results.latest()["a"]["call"] == "2"
    results.records += [record("a", call="3"), record("a", call="4", **late)]
    assert results.latest()["a"]["call"] == "3"


def test_the_file_stays_under_a_megabyte(tmp_path):
    results = Results(tmp_path / "gpu.json", toy=False)
    tail = "x" * 1500  # the most that a record keeps of an error
    results.records += [record(c.name, call="one", failed="f", error_tail=tail) for c in CASES]
    results.save()
    assert results.path.stat().st_size < 5e5  # a call in which everything fails
    for call in ("two", "three", "four", "five"):
        results.records += [record(c.name, call=call, failed="f", error_tail=tail) for c in CASES]
    results.save()
    assert results.path.stat().st_size < 1e6
    stored = json.loads(results.path.read_text())["results"]
    assert stored == results.records
    # What a later record replaces is forgotten, oldest first, and no more than has to be.
    assert [r["case"] for r in stored if r["call"] == "five"] == names(PLAN)
    assert "four" in {r["call"] for r in stored}
    assert "one" not in {r["call"] for r in stored}


# ---- the report ----


def test_ratios_are_to_the_fastest_dense_attention_of_the_same_call_and_size(tmp_path):
    results = results_of(
        tmp_path, record("dense slow", timed(4.0)), record("dense fast", timed(2.0)),
        record("dense small", timed(0.1), config={"size": "1.3B"}), record("dense other", timed(1.0), call="before"),
        record("ours", timed(0.25), expected="8.7 to 9.4"), record("elsewhere", timed(0.25), call="another"),
        record("pairs", timed(0.25, ratio=9.0)),
    )  # fmt: skip
    assert report.fastest_dense(results.records, "14B", "now") == ("dense fast", 2.0)
    assert row(results, "ours") == ["yes", "250.000", "4", "8.00", "8.7", "to", "9.4"]
    assert row(results, "dense slow")[-1] == "0.50"
    assert row(results, "elsewhere")[-1] == "-"  # no baseline in its call
    assert row(results, "pairs")[-1] == "9.00"  # its own, taken in turns
    assert row(results, "case") == ["ok", "ms", "TFLOP/s", "ratio", "expected"]


def test_the_last_forty_lines_are_the_table_the_most_valuable_first(tmp_path):
    results = results_of(tmp_path, *(record(f"timed {i}", timed(1.0)) for i in range(50)))
    lines = report.table(results).splitlines()[-40:]
    assert lines[0].split() == ["case", "ok", "ms", "TFLOP/s", "ratio", "expected"]
    assert [line.split()[1] for line in lines[1:-1]] == [str(i) for i in range(38)]
    assert lines[-1] == "(12 more in gpu.json)"


def test_a_table_that_has_forty_lines_leaves_nothing_out(tmp_path):
    results = results_of(tmp_path, *(record(f"timed {i}", timed(1.0)) for i in range(39)))
    lines = report.table(results).splitlines()[-40:]
    assert [line.split()[:2] for line in (lines[0], lines[1], lines[-1])] == [
        ["case", "ok"],
        ["timed", "0"],
        ["timed", "38"],
    ]


def test_what_the_counters_say_is_printed(tmp_path):
    part = {
        "part": "launch",
        "seconds": 0.1,
        "tensor_any": 53.03,
        "special": 51.57,
        "tensor": 1.6,
        "issue": "not counted",
    }
    assert "counters 1.00, busy: tensor cores 53%, special functions 52%\n" in report.table(
        results_of(tmp_path, record("counters 1.00", part))
    )


def test_of_a_sweep_the_fastest_right_config_is_shown_and_every_wrong_one(tmp_path):
    seconds = {"fast": 1.0, "slow": 2.0, "wrong": 0.5}
    results = results_of(
        tmp_path,
        *(
            record(f"config {name}", timed(s, ok=name != "wrong"), config={"options": {"stages": i + 1}})
            for i, (name, s) in enumerate(seconds.items())
        ),
        record("config other", timed(3.0), config={"options": {"stages": 2}, "density": 0.2}),
    )
    shown = [line.split()[1] for line in report.table(results).splitlines() if line.startswith("config ")]
    assert shown == ["fast", "wrong", "other"]
    assert row(results, "config wrong")[0] == "WRONG"


def test_what_is_wrong_failed_left_out_or_hung_is_named(tmp_path):
    results = results_of(
        tmp_path,
        record("right", timed(1.0)),
        record(
            "bad", {"part": "ragged", "ok": False}, stage="correct", family="ladder", kernels=["quantize", "fwd fp8"]
        ),
        record("broken", failed="RuntimeError: no such instruction"),
        record("stuck", failed="hung: said nothing for 25 s", hung=True, kernels=["fwd fp8", "new"]),
        record("late", failed="not run: the budget is spent", unfinished=True),
    )
    assert report.wrong(results) == ["bad", "broken", "stuck"]
    text = report.table(results)
    for line in (
        "right: 1; wrong or failed: bad, broken, stuck",
        "  bad: wrong numbers",
        "  broken: RuntimeError: no such instruction",
        "wrong, so that their speed means nothing: fwd fp8",
        "ladder: the first rung that fails is 'bad': look there before all others",
        "left out: 1 (late)",
        "hung: new (in 'stuck')",
    ):
        assert f"\n{line}\n" in text
    assert "wrong or failed: none" in report.table(results_of(tmp_path, record("right", timed(1.0))))
