"""`benchmarks.gpu` without a GPU: what is chosen, kept and reported, that a wrong kernel is found, and nothing claimed."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_cases import correct, counters, facts, programs, report, shapes
from benchmarks.gpu_cases.plan import all_families
from benchmarks.gpu_cases.results import NOT_MEASURED, Results
from benchmarks.gpu_cases.runner import REFERENCES
from pallas_kernels import reference
from pallas_kernels.sm90.tuned import TUNED_TABLE, fastest, read_tuned_table
from pallas_kernels.testing import make_call

ROOT = pathlib.Path(__file__).parents[2]
PLAN = all_families()
CASES = [case for family in PLAN for case in family.cases]


def names(families) -> list[str]:
    return [case.name for family in families for case in family.cases]


def record(case: str, *parts, stage: str = "speed", call: str = "now", config=None, **more):
    fields = {"family": "f", "kernels": [], "config": {"size": "14B", **(config or {})}, "expected": ""}
    return {"case": case, "stage": stage, "call": call, "parts": list(parts), **fields, **more}


def timed(seconds: float, **more):
    return {"part": "kernel", "seconds": seconds, "tflops": 1 / seconds, "ok": True, **more}


def results_of(tmp_path: pathlib.Path, *records) -> Results:
    results = Results(tmp_path / "gpu.json", toy=False)
    results.records += records
    return results


def row(results: Results, start: str) -> list[str]:
    """Words of the line of the table, after its name."""
    return next(x for x in report.table(results).splitlines() if x.startswith(start))[52:].split()


def numbers(content) -> list[str]:
    """Names of everything that holds a time or a rate."""
    if isinstance(content, list):
        return [name for item in content for name in numbers(item)]
    if not isinstance(content, dict):
        return []
    rates = ("seconds", "tflops", "TB_s", "GB_s", "share_of_limit", "share_of_copy", "ratio", "first_seconds")
    here = [f"{k}={v}" for k, v in content.items() if k in rates and v != NOT_MEASURED]
    return here + [name for value in content.values() for name in numbers(value)]


# ---- the command ----


@pytest.mark.slow
def test_stages_run_at_toy_size_and_say_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    asked = ["facts machine", "correct first one tile", "fp8x1 0.20 14B", "peer cudnn fp8 14B", "velocity dense 1.3B"]
    gpu.main(["--toy", "--budget", "3000", *asked])
    content = json.loads((tmp_path / "gpu_toy.json").read_text())
    assert content["measured"].startswith("not measured")
    done = {r["case"]: r for r in content["results"]}
    # With the dense attention that the speed is compared with.
    assert list(done) == [*asked[:2], "dense cudnn 14B", *asked[2:]]
    assert not [r for r in done.values() if "failed" in r], done
    assert numbers(content["results"]) == []
    assert done["correct first one tile"]["parts"][0]["ok"]
    assert [p["part"] for p in done["fp8x1 0.20 14B"]["parts"]] == ["kernel", "with quantization", "preparation"]
    assert done["peer cudnn fp8 14B"]["parts"][0] == {"not available": "needs a GPU"}
    assert not (tmp_path / "tuned_sm90.json").exists()
    (call,) = content["calls"].values()
    assert call["gpu"] == "none"
    assert call["environment"]["command"].startswith("python3 -m benchmarks.gpu --toy --budget 3000 'facts machine'")
    printed = capsys.readouterr().out
    assert "Nothing is measured" in printed
    assert "On a GPU: not measured" in printed


def test_a_gpu_that_is_demanded_and_missing_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.setattr(gpu, "add_cuda_to_path", lambda: None)
    with pytest.raises(SystemExit) as exit:
        gpu.main(["--gpu"])
    assert exit.value.code == 2
    assert "--gpu demands a GPU, and nvidia-smi names none; run where it does, or leave" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        gpu.main(["--gpu", "--toy"])
    assert exit.value.code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("answer", ["exit 9", "echo", "echo 'No devices were found' >&2; exit 6"])
def test_an_nvidia_smi_that_fails_names_no_gpu(answer, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for script, name in ((answer, None), ("echo 'NVIDIA H200, GPU-1, 580'", "NVIDIA H200, GPU-1, 580")):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert gpu.gpu_name() == name


def test_the_parent_needs_no_jax():
    """It would hold the GPU's memory."""
    code = "import sys\nfrom benchmarks import gpu\ngpu.main(['--list'])\nassert not {'jax', 'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("'numpy'", "'jaxlib'")], check=True, cwd=ROOT, capture_output=True
    )
    assert len(done.stdout.splitlines()) == len(CASES)


# ---- what is chosen ----


def test_case_names_are_unique_and_functions_exist():
    assert len(set(names(PLAN))) == len(CASES)
    assert len({f.name for f in PLAN}) == len(PLAN)
    assert {f.stage for f in PLAN} == set(gpu.STAGES)
    for case in CASES:
        module, name = case.function.split(":")
        assert f"\ndef {name}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text(), case.function


def test_a_part_may_take_less_than_its_family_s_time():
    """Else a hang would never be one."""
    assert [c.name for f in PLAN for c in f.cases if c.silence > f.seconds] == []


def test_words_name_stages_families_and_cases():
    assert gpu.select(PLAN, []) == PLAN
    for stage in gpu.STAGES:
        alone = [c.name for f in PLAN if f.stage == stage for c in f.cases]
        assert [name for name in names(gpu.select(PLAN, [stage])) if name in alone] == alone
    # The whole name of a family is that family alone, of a case that case alone, with what it is compared with.
    assert [f.name for f in gpu.select(PLAN, ["correct op"])] == ["correct op"]
    assert [f.name for f in gpu.select(PLAN, ["headline"])] == ["headline"]
    assert names(gpu.select(PLAN, ["fp8x1 0.20 14B"])) == ["dense cudnn 14B", "fp8x1 0.20 14B"]
    # Else a part of the name of either.
    sweep = next(f for f in PLAN if f.name == "configs fp8x1 0.20 14B")
    assert names(gpu.select(PLAN, ["configs fp8x1 0.20"])) == ["dense cudnn 14B", *names([sweep])]
    assert set(names(gpu.select(PLAN, ["fp8x1 0.20 14B stages"]))) == {"dense cudnn 14B"} | set(names([sweep])[:-1])
    assert names(gpu.select(PLAN, ["ladder", "padding none"])) == [*names(PLAN[1:2]), "correct padding none"]
    with pytest.raises(
        ValueError, match=r"'fast' names no stage \(facts, .*\), family or case; take words of what --list"
    ) as e:
        gpu.select(PLAN, ["facts", "fast"])
    assert "\n" not in str(e.value)


def test_a_later_call_continues_with_the_baselines_that_it_needs(tmp_path):
    results = Results(tmp_path / "gpu.json", toy=False)
    assert names(gpu.due(PLAN, results, again=False)) == names(PLAN)
    left = ["fp8x1 0.20 1.3B", "correct tables ragged", "velocity dense 1.3B"]
    results.records += [record(c.name) for c in CASES if c.name not in left]
    # Left out, or cut short, is no result.
    results.records += [record(name, failed="not run", unfinished=True) for name in left[1:]]
    assert names(gpu.due(PLAN, results, again=False)) == [
        "correct tables ragged",
        "dense cudnn 1.3B",
        "fp8x1 0.20 1.3B",
        left[2],
    ]
    # With nothing left to compare, no baseline runs.
    results.records.append(record(left[0], failed="RuntimeError: ..."))
    assert names(gpu.due(PLAN, results, again=False)) == left[1:]
    results.records += [record(name) for name in left[1:]]
    assert gpu.due(PLAN, results, again=False) == []
    assert names(gpu.due(PLAN, results, again=True)) == names(PLAN)


def test_wrong_numbers_and_another_gpu_are_no_result(tmp_path):
    results = Results(tmp_path / "gpu.json", toy=False)
    results.calls["one"] = {"gpu": "NVIDIA H200, GPU-1, 580"}
    results.records += [record("a", call="one"), record("b", call="one") | {"parts": [{"ok": False}]}]
    assert (results.done("a"), results.done("b")) == (True, False)
    assert results.done("a", "NVIDIA H200, GPU-2, 590")
    assert not results.done("a", "NVIDIA H100 80GB HBM3, GPU-3, 580")


def test_a_kernel_and_each_of_its_switches_are_checked_before_they_are_timed():
    order = [(f.stage, c) for f in PLAN for c in f.cases]
    checked: set[str] = set()
    for stage, case in order:
        parts = {word for kernel in case.kernels for word in kernel.split()}
        if stage == "correct":
            checked |= parts
        elif stage == "speed" and case.function.endswith("attention:attention"):
            assert parts <= checked, case.name


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


def test_the_table_has_forty_rows_at_most_the_most_valuable_first(tmp_path):
    results = results_of(tmp_path, *(record(f"timed {i}", timed(1.0)) for i in range(50)))
    lines = report.table(results).splitlines()
    shown = [line.split()[1] for line in lines if line.startswith("timed ")]
    assert shown == [str(i) for i in range(40)]
    assert lines[-1] == "(10 more in gpu.json)"


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


# ---- facts and counters ----


def test_clocks_are_of_the_samples_under_load():
    lines = [
        "1980, 100.0, 40, 0x0000000000000001",
        "1700, 690.0, 60, 0x0000000000000004",
        "1650, 700.0, 62, 0x0000000000000004",
        "1600, 400.0, 50, 0x0000000000000000",
        "[N/A], 700.0, 62, 0x0000000000000004",
        "1700, 69",
        "",
    ]
    found = facts.summarize(lines)
    assert (found["samples"], found["busy"]) == (4, 3)
    assert found["sm_mhz"] == {"median": 1650, "least": 1600, "most": 1700}
    assert found["watts"]["least"] == 400
    assert found["reasons"] == {"0x0000000000000000": 1, "0x0000000000000004": 2}
    assert facts.summarize([]) == facts.summarize(["1980, [N/A], 40, 0x0"]) == {"not available": "no sample"}


def test_clocks_leave_out_a_line_that_was_cut_off(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '1700, 690.0, 60, 0x04\\n1650, 700.0, 62, 0x0'\ntouch done\nexec sleep 100\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    clocks = facts.Clocks()
    while not (tmp_path / "done").exists():
        pass
    assert clocks.stop()["reasons"] == {"0x04": 1}


def test_counters_are_read_from_ncu_in_seconds_and_percent():
    metrics = counters._METRICS
    names = ["ID", "Kernel Name", metrics["seconds"], metrics["cycles"], metrics["tensor_any"], metrics["l2"]]
    page = "\n".join(
        [
            "==PROF== Connected to process 12",
            ",".join(f'"{x}"' for x in names),
            '"","","ns","cycle","%","%"',
            '"0","anonymous_mosaic_gpu_kernel","127,546,592","218747269","53.03","n/a"',
            '"1","another","1","1","1","1"',
        ]
    )
    found = counters.read(page)
    assert found is not None
    assert found["kernel"] == "anonymous_mosaic_gpu_kernel"
    assert found["seconds"] == pytest.approx(0.127546592)
    assert (found["cycles"], found["tensor_any"]) == (218747269, 53.03)
    assert (found["l2"], found["dram"]) == ("n/a", "not counted")
    assert counters.read("==ERROR== no permission") is None


def test_a_reference_is_waited_for_so_long_and_no_longer(tmp_path, monkeypatch):
    (tmp_path / "there.npy").touch()
    monkeypatch.delenv(REFERENCES, raising=False)
    assert programs.reference_file("there.npy", 0) is None  # nobody computes it
    monkeypatch.setenv(REFERENCES, str(tmp_path))
    assert programs.reference_file("there.npy", 0) == tmp_path / "there.npy"
    assert programs.reference_file("missing.npy", 0.01) is None
    threading.Timer(0.3, (tmp_path / "late.npy").touch).start()
    assert programs.reference_file("late.npy", 60) == tmp_path / "late.npy"


def test_the_shipped_table_is_what_the_committed_sweeps_say():
    measured = Results(gpu.record.RESULTS / "gpu.json", toy=False)
    shipped = read_tuned_table(TUNED_TABLE)
    assert shipped
    assert {key: (e.config, e.seconds) for key, e in fastest(gpu.swept(measured)).items()} == {
        key: (e.config, e.seconds) for key, e in shipped.items()
    }
    # One call a key: else the shortest call would win, not the best config.
    calls = {(str(p["key"]), str(p["measured_on"]["window"]), p["measured_on"]["heads"]) for p in gpu.swept(measured)}
    assert len(calls) == len(shipped)


# ---- is a wrong kernel found? ----


@pytest.mark.parametrize("scales", [None, 1])
def test_a_kernel_that_drops_a_tile_or_leaves_an_element_is_found(scales):
    shape = shapes.Shape(tile=128, tiles=2, heads=1, head_dim=64, table="all", scales=scales)
    qkv, pattern = make_call(shape)
    calls = iter(range(100))

    def right(q, k, v):
        return reference.attention(q, k, v, pattern)

    def drops_a_tile(q, k, v):
        fewer = dataclasses.replace(pattern, counts=jnp.maximum(pattern.counts - 1, 1))
        return reference.attention(q, k, v, fewer)

    def leaves_one(q, k, v):
        out, lse = right(q, k, v)
        return out.at[0, 3, 0, 5].set(jnp.nan), lse

    def writes_padding(q, k, v):
        out, lse = right(q, k, v)
        return out.at[0, -1].set(1e-3), lse

    def is_a_little_off(q, k, v):
        out, lse = right(q, k, v)
        return (1.005 * out.astype(jnp.float32)).astype(out.dtype), lse

    def has_another_sum(q, k, v):
        out, lse = right(q, k, v)
        return out, lse * 1.0005

    def differs_from_run_to_run(q, k, v):
        out, lse = right(q, k, v)
        return out, lse.at[0, 0, 0].add(1e-6 * next(calls))

    found = {}
    for run in (
        right, drops_a_tile, leaves_one, writes_padding, is_a_little_off, has_another_sum, differs_from_run_to_run
    ):  # fmt: skip
        found[run.__name__] = correct._compared(True, run, qkv, pattern, correct._specification(shape))["ok"]
    assert found.pop("right")
    assert found == dict.fromkeys(found, False)


def test_poison_is_nan_in_every_float_dtype():
    word = np.full(1, 0xFFFFFFFF, np.uint32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        assert np.isnan(word.view(dtype).astype(np.float32)).all()
