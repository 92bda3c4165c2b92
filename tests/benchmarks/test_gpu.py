"""`benchmarks.gpu` without a GPU: what is chosen, kept and reported, that a wrong kernel is found, and nothing claimed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu_cases import alone
from benchmarks.gpu_cases.results import NOT_MEASURED, Results
from tests.benchmarks.gpu_records import CASES, PLAN, names, record

ROOT = pathlib.Path(__file__).parents[2]


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

_NEED_A_GPU = {
    *("attention:pairs", "baselines:torch_sdpa", "baselines:mosaic", "baselines:cudnn_fp8"),
    *("facts:torch_matmuls", "counters:counters", "correct:memory_checker"),
    *(f"peers:{name}_attention" for name in ("sage", "sparge", "sliding_tile")),
    "peers:flash_attention_3",
}


# Cases that only measure, and have no right or wrong.
_ONLY_MEASURE = {"facts:machine", "attention:cudnn", "attention:quantization"}
_PARTS = 6


@pytest.mark.slow
@pytest.mark.parametrize("part", range(_PARTS))
def test_the_whole_plan_runs_at_toy_size_and_says_not_measured(part, tmp_path, monkeypatch, capsys):
    """In parts, which share the processors. Together they are all families."""
    asked = PLAN[part::_PARTS]
    cases = {case.name: case for family in asked for case in family.cases}
    words = [family.name for family in asked]
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu.main(["--toy", "--budget", "3000", *words])
    content = json.loads((tmp_path / "gpu_toy.json").read_text())
    assert content["measured"].startswith("not measured")
    done = {r["case"]: r for r in content["results"]}
    assert set(cases) <= set(done)  # beside them the dense attention that speed is compared with
    assert not [r for r in done.values() if "failed" in r], done
    assert numbers(content["results"]) == []
    for name, case in cases.items():
        function, said = case.function.rpartition(".")[2], done[name]["parts"]
        assert ("not available" in said[0]) == (function in _NEED_A_GPU), name
        answers = {p["ok"] for p in said if "ok" in p}
        assert answers == (set() if function in _NEED_A_GPU | _ONLY_MEASURE else {True}), (name, said)
    assert not (tmp_path / "tuned_sm90.json").exists()
    (call,) = content["calls"].values()
    assert call["gpu"] == "none"
    assert call["environment"]["command"].startswith("python3 -m benchmarks.gpu --toy --budget 3000 ")
    printed = capsys.readouterr().out
    assert "Nothing is measured" in printed
    assert "On a GPU: not measured" in printed


def test_a_toy_run_proves_the_script_as_it_is_and_leaves_the_results_alone(tmp_path, monkeypatch):
    """All of it is run, however much of the plan the committed file has."""
    asked = []
    monkeypatch.setattr(gpu.Runner, "run", lambda self, families: asked.extend(names(families)))
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.chdir(tmp_path)
    gpu.main(["--toy"])
    assert asked == names(PLAN)
    assert json.loads((tmp_path / "outputs" / "gpu_toy.json").read_text())["results"] == []
    assert not (gpu.record.RESULTS / "gpu_toy.json").exists()


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


def test_a_second_call_says_who_has_the_gpu_and_leaves_everything_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu, "gpu_name", lambda: "NVIDIA H200, GPU-1, 580")
    monkeypatch.setattr(gpu, "add_cuda_to_path", lambda: None)
    monkeypatch.setattr(alone, "LOCK", tmp_path / "lock")
    called = []
    monkeypatch.setattr(gpu, "run_call", lambda *args, **more: called.append(gpu.gpu_name()))
    with alone.alone("python3 -m benchmarks.gpu the first"), pytest.raises(SystemExit) as exit:
        gpu.main(["--gpu"])
    assert exit.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    holder = f"process {os.getpid()}: python3 -m benchmarks.gpu the first"
    assert f"another call has this machine's GPU ({holder}); wait until it has ended" in said
    assert called == []
    gpu.main(["--gpu"])
    assert len(called) == 1
    assert not (tmp_path / "out").exists()


def test_a_call_that_is_killed_leaves_no_lock(tmp_path):
    path = tmp_path / "lock"
    code = f"from benchmarks.gpu_cases.alone import *\nwith alone('x', pathlib.Path({str(path)!r})): print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(alone.BusyError, match=f"process {holder.pid}: x$"), alone.alone("y", path):
            pass
        holder.kill()
    with alone.alone("y", path):
        assert path.read_text() == f"process {os.getpid()}: y\n"


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


def test_the_cases_import_what_a_rented_machine_has():
    """The command says what it needs; torch only inside the baselines that it is for."""
    names = sorted({case.function.split(":")[0] for case in CASES} | {"benchmarks.gpu_cases.references"})
    lacking = ("tyro", "av", "ftfy", "tokenizers", "PIL", "tqdm", "torch")
    code = f"import sys\nfor name in {lacking}: sys.modules[name] = None\nimport benchmarks.gpu, {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize("budget", ["-1", "nan", "inf"])
def test_a_budget_that_is_no_time_is_refused(budget, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--toy", f"--budget={budget}"])
    assert stop.value.code == 2
    assert f"budget={float(budget)} is not above 0, up to 86400 seconds" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
