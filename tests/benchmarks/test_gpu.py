"""`benchmarks.gpu` on a machine without a GPU: the script runs, ends what hangs, continues, and claims nothing."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.gpu_cases.cases import all_cases

from benchmarks import gpu
from benchmarks.gpu_cases import child, correct, report, shapes
from benchmarks.gpu_cases.results import NOT_MEASURED, Results
from benchmarks.gpu_cases.runner import Case, run
from pallas_kernels import reference
from pallas_kernels.sm90 import forward as fwd_sm90

ROOT = pathlib.Path(__file__).parents[2]
ODD = "tests.benchmarks.odd_cases"


def odd(name: str, function: str = "good", **fields) -> Case:
    return Case(name=name, stage=fields.pop("stage", "speed"), function=f"{ODD}:{function}", **fields)


def ran(results: Results) -> list[str]:
    return [r["case"] for r in results.records if not r.get("unfinished")]


def numbers(content) -> list[str]:
    """Names of everything that holds a time or a rate."""
    if isinstance(content, list):
        return [name for item in content for name in numbers(item)]
    if not isinstance(content, dict):
        return []
    rates = ("seconds", "tflops", "TB_s", "GB_s", "share_of_limit", "share_of_copy")
    here = [f"{k}={v}" for k, v in content.items() if k in rates and v != NOT_MEASURED]
    return here + [name for value in content.values() for name in numbers(value)]


@pytest.mark.slow
def test_every_stage_runs_at_toy_size_and_says_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    names = [
        "facts machine", "correct first", "correct op auto", "baseline cudnn 14B", "speed fp8x1 0.20 14B",
        "speed quantization 14B", "peer cudnn fp8", "tune fp8x1 1.00 14B cluster 2",
    ]  # fmt: skip
    gpu.main(["--toy", *names])
    content = json.loads((tmp_path / "gpu_toy.json").read_text())
    assert content["measured"].startswith("not measured")
    done = {r["case"]: r for r in content["results"]}
    assert set(done) == {*names, "baseline cudnn 14B again"}
    assert not [r for r in done.values() if "failed" in r], done
    assert numbers(content) == []
    assert done["correct first"]["parts"][0]["ok"]
    assert [p["part"] for p in done["speed fp8x1 0.20 14B"]["parts"]] == ["kernel", "with quantization"]
    assert done["tune fp8x1 1.00 14B cluster 2"]["parts"][0]["ok"]
    assert done["peer cudnn fp8"]["parts"] == [{"not available": "needs a GPU"}]
    assert not (tmp_path / "tuned_sm90.json").exists()
    printed = capsys.readouterr().out
    assert "Nothing is measured" in printed
    assert "On a GPU: not measured" in printed


def test_a_case_that_hangs_is_ended_with_all_it_started_and_keeps_what_it_said():
    start = time.monotonic()
    record = run(odd("stuck", "hang", kernels=("base", "new"), seconds=4), toy=True, seconds=100)
    assert time.monotonic() - start < 20
    assert record["hung"]
    assert record["failed"] == "timed out after 4 s (a hang: no further case of new)"
    assert [p["part"] for p in record["parts"]] == ["before"]
    # The grandchild is gone, or a zombie that waits for init; the signal takes a moment.
    stat = pathlib.Path(f"/proc/{record['parts'][0]['child']}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("what the case started still runs")


def test_a_case_that_the_budget_cuts_short_did_not_hang():
    record = run(odd("stuck", "hang", kernels=("new",), seconds=50), toy=True, seconds=2)
    assert record["unfinished"]
    assert "hung" not in record
    assert record["failed"] == "unfinished: the budget ended after 2 s"


def test_a_case_of_many_results_that_falls_silent_hung():
    record = run(odd("stuck", "hang", kernels=("new",), seconds=50, silence=3), toy=True, seconds=40)
    assert record["hung"]
    assert record["failed"] == "said nothing for 3 s (a hang: no further case of new)"
    assert record["seconds_in_all"] < 20


def test_a_failure_leaves_its_error_and_earlier_parts():
    record = run(odd("broken", "fail"), toy=True, seconds=60)
    assert record["failed"] == "exit status 1"
    assert record["error_tail"].rstrip().endswith("RuntimeError: no such instruction")
    assert record["parts"] == [{"part": "before"}]


def test_what_is_not_finite_is_json_all_the_same():
    record = run(odd("wrong", "wrong"), toy=True, seconds=60)
    assert json.loads(json.dumps(record, allow_nan=False))["parts"] == [{"part": "bad", "ok": False, "rel_l2": "nan"}]


def test_no_further_case_of_a_kernel_that_hung(tmp_path):
    results = Results(tmp_path / "gpu.json", toy=True)
    cases = [
        odd("first", kernels=("base",)),
        odd("stuck", "hang", kernels=("base", "new"), seconds=3),
        odd("same kernel", kernels=("base", "new")),
        odd("other kernel", kernels=("base",)),
    ]
    gpu.work(cases, results, "now", toy=True, budget=300)
    assert ran(results) == ["first", "stuck", "other kernel"]
    assert results.latest()["same kernel"]["failed"] == "not run: new hung in 'stuck'"
    assert "hung: new (in 'stuck')" in report.table(results)
    # Nor in a later call, which reads the file.
    later = Results(tmp_path / "gpu.json", toy=True)
    gpu.work(cases, later, "later", toy=True, budget=300)
    assert [r["case"] for r in later.records if r["call"] == "later"] == ["same kernel"]
    # Once the case that hung works, the others run.
    cases[1] = odd("stuck", kernels=("base", "new"))
    gpu.work(cases[1:2], later, "fixed", toy=True, budget=300, again=True)
    gpu.work(cases, later, "at last", toy=True, budget=300)
    assert [r["case"] for r in later.records if r["call"] == "at last"] == ["same kernel"]
    assert "failed" not in later.latest()["same kernel"]


def test_a_later_call_continues_and_again_repeats(tmp_path):
    path, out = tmp_path / "tree" / "gpu.json", tmp_path / "out" / "gpu.json"
    cases = [odd("a"), odd("b")]
    gpu.work(cases[:1], Results(path, toy=True), "first", toy=True, budget=300)
    results = Results(out, toy=True, earlier=path)
    gpu.work(cases, results, "second", toy=True, budget=300)
    assert ran(results) == ["a", "b"]
    gpu.work(cases[:1], results, "third", toy=True, budget=300, again=True)
    assert ran(results) == ["a", "b", "a"]
    assert [r["case"] for r in json.loads(out.read_text())["results"]] == ["a", "b", "a"]
    assert not out.with_name("gpu.json.part").exists()


def test_the_budget_ends_a_call_and_nothing_is_recorded_for_the_rest(tmp_path, capsys):
    results = Results(tmp_path / "gpu.json", toy=True)
    gpu.work([odd("a"), odd("b")], results, "now", toy=True, budget=5)
    assert results.records == []
    assert capsys.readouterr().out.count("the budget is spent; call again to continue") == 2


def test_baselines_run_again_in_a_call_that_compares_with_them(tmp_path):
    def timed(name: str, seconds: float, **fields) -> Case:
        return odd(name, kwargs={"seconds": seconds}, **fields)

    results = Results(tmp_path / "gpu.json", toy=False)
    slow, fast = timed("baseline slow 14B", 4.0, baseline=True), timed("baseline fast 14B", 2.0, baseline=True)
    ours, more = timed("speed ours 14B", 0.25), timed("speed more 14B", 0.5)
    for case, call in ((slow, "one"), (fast, "one"), (ours, "one")):
        size = {**case.kwargs, "size": "14B"}
        results.records.append({**run(case, toy=False, seconds=60), "call": call, "config": size})
    sized = [dataclasses.replace(c, kwargs={"size": "14B"}) for c in (slow, fast, ours, more)]
    due = [c.name for c in sized if gpu.is_due(c, sized, results, "two", again=False)]
    assert due == ["baseline fast 14B", "speed more 14B"]
    # With nothing left to compare, no baseline runs.
    assert not [c.name for c in sized[:3] if gpu.is_due(c, sized[:3], results, "two", again=False)]
    assert report.fastest_baseline(results.records, "14B", "one") == ("baseline fast 14B", 2.0)
    line = next(x for x in report.table(results).splitlines() if x.startswith("speed ours"))
    assert line.split()[-1] == "8.00"  # 2 s by 0.25 s
    results.records[-1]["call"] = "two"  # no baseline there: no ratio
    line = next(x for x in report.table(results).splitlines() if x.startswith("speed ours"))
    assert line.split()[-1] == "-"


def test_speed_beside_a_wrong_kernel_is_said_to_mean_nothing(tmp_path):
    results = Results(tmp_path / "gpu.json", toy=False)
    speed = {"case": "speed fp8x1 0.20 14B", "stage": "speed", "config": {}, "kernels": [], "parts": [], "call": "now"}
    bad = {**speed, "case": "correct tables", "stage": "correct", "parts": [{"part": "ragged", "ok": False}]}
    results.records += [speed, bad]
    text = report.table(results)
    assert "wrong or failed: correct tables" in text
    assert "SPEED MEANS NOTHING" in text


def test_the_committed_toy_run_holds_a_right_result_of_every_case_and_no_time():
    toy = json.loads((gpu.record.RESULTS / "gpu_toy.json").read_text())
    assert toy["measured"].startswith(NOT_MEASURED)
    assert {c.name for c in all_cases()} <= {r["case"] for r in toy["results"]}
    for result in toy["results"]:
        assert "failed" not in result, result["case"]
        for part in result["parts"]:
            assert part.get("ok", True), (result["case"], part)
            assert not {"seconds", "tflops"} & {k for k, v in part.items() if isinstance(v, float)}, (
                result["case"],
                part,
            )


def test_case_names_are_unique_and_functions_exist():
    cases = all_cases()
    assert len({c.name for c in cases}) == len(cases)
    assert {c.stage for c in cases} == set(gpu.STAGES)
    for case in cases:
        module, name = case.function.split(":")
        assert f"\ndef {name}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text(), case.function


def test_stages_and_words_select_cases():
    assert {c.stage for c in gpu.select(all_cases(), ["tune"])} == {"tune"}
    assert [c.name for c in gpu.select(all_cases(), ["fp8x2"])] == ["speed fp8x2 0.20 14B"]
    whole = "speed fp8x1 0.20 14B"
    assert [c.name for c in gpu.select(all_cases(), [whole])] == [whole]
    assert len(gpu.select(all_cases(), ["fp8x1 0.20 14B"])) > 1
    with pytest.raises(ValueError, match=r"'fast' is no stage \(facts, correct, .*and in no case's name; see --list"):
        gpu.select(all_cases(), ["fast"])


def test_a_kernel_that_drops_a_tile_or_leaves_an_element_is_found(monkeypatch):
    shape = shapes.Shape(tile=128, tiles=2, heads=1, head_dim=64, table="all")

    def right(q, k, v, pattern, *, config):
        return reference.attention(q, k, v, pattern)

    def drops_a_tile(q, k, v, pattern, *, config):
        fewer = dataclasses.replace(pattern, counts=jnp.maximum(pattern.counts - 1, 1))
        return reference.attention(q, k, v, fewer)

    def leaves_one(q, k, v, pattern, *, config):
        out, lse = reference.attention(q, k, v, pattern)
        return out.at[0, 3, 0, 5].set(jnp.nan), lse

    def writes_padding(q, k, v, pattern, *, config):
        out, lse = reference.attention(q, k, v, pattern)
        return out.at[0, -1].set(1e-3), lse

    found = {}
    for forward in (right, drops_a_tile, leaves_one, writes_padding):
        monkeypatch.setattr(fwd_sm90, "forward", forward)
        found[forward.__name__] = correct._forward(True, dataclasses.replace(shape, scales=None), True)["ok"]
    assert found == {"right": True, "drops_a_tile": False, "leaves_one": False, "writes_padding": False}


def test_a_stand_in_for_jaxtyping_only_where_the_real_one_is_missing():
    before = list(sys.path)
    child.use_standins()
    assert sys.path == before
    code = """
import importlib.machinery, sys
class Bare(importlib.machinery.PathFinder):  # hides what is installed
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "jaxtyping":
            path = [p for p in sys.path if "site-packages" not in p]
        return importlib.machinery.PathFinder.find_spec(name, path, target)
sys.meta_path = [Bare if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
from benchmarks.gpu_cases import child
child.use_standins()
import jaxtyping
assert "standins" in jaxtyping.__file__, jaxtyping.__file__
from benchmarks.gpu_cases import baselines, correct, facts, peers, speed, tune
from fps_jax.attention import plan, windows
from pallas_kernels import block_sparse, portable
from pallas_kernels.sm90 import forward
assert plan.AttentionPlan.build((2, 8, 8)).density == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_parent_needs_no_jax():
    """It would hold the GPU's memory."""
    code = "import sys, benchmarks.gpu\nassert not {'jax', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_poison_is_nan_in_every_float_dtype():
    word = np.full(1, 0xFFFFFFFF, np.uint32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        assert np.isnan(word.view(dtype).astype(np.float32)).all()
