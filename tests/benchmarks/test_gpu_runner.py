"""The runner of `benchmarks.gpu` with real processes: what hangs is ended, what dies loses itself only, a later call continues."""

import json
import pathlib
import tempfile
import time

import pytest

from benchmarks.gpu_cases import report
from benchmarks.gpu_cases.results import Results
from benchmarks.gpu_cases.runner import Case, Family, Runner

ODD = "tests.benchmarks.odd_cases"


def odd(name: str, function: str = "good", **fields) -> Case:
    return Case(name=name, function=f"{ODD}:{function}", **fields)


def call(results: Results, *cases: Case, call: str = "now", toy: bool = True, prepare_seconds: float = 240, **fields):
    """The latest records of one family's cases after a call of the benchmark."""
    family = Family(name="odd", stage="speed", cases=cases, **fields)
    Runner(results, call, toy=toy, budget=400, prepare_seconds=prepare_seconds).run([family])
    return results.latest()


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "gpu.json", toy=True)


def ran(results: Results, call: str | None = None) -> list[str]:
    return [r["case"] for r in results.records if not r.get("unfinished") and call in (None, r["call"])]


def parts(record) -> list[str]:
    return [p["part"] for p in record["parts"]]


def test_a_case_that_hangs_is_ended_with_all_it_started_and_the_rest_starts_again(results):
    start = time.monotonic()
    found = call(results, odd("first"), odd("stuck", "hang", kernels=("base", "new"), silence=4), odd("last"))
    assert time.monotonic() - start < 90  # not the 100 s that it sleeps
    stuck = found["stuck"]
    assert stuck["hung"]
    assert stuck["failed"] == "hung: said nothing for 4 s"
    assert parts(stuck) == ["before"]
    assert ran(results) == ["first", "stuck", "last"]
    assert "failed" not in found["last"]
    # The grandchild is gone, or a zombie that waits for init; the signal takes a moment.
    stat = pathlib.Path(f"/proc/{stuck['parts'][0]['child']}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("what the case started still runs")


def test_a_case_that_compiles_for_long_is_no_hang(results):
    found = call(results, odd("large model", "compile_long", silence=4))
    assert "failed" not in found["large model"]
    assert parts(found["large model"])[0] == "compiled"


def test_no_further_case_of_a_kernel_that_hung(results):
    cases = [
        odd("first", kernels=("base",)),
        odd("stuck", "hang", kernels=("base", "new"), silence=4),
        odd("same kernel", kernels=("base", "new")),
        odd("other kernel", kernels=("base",)),
    ]
    found = call(results, *cases)
    assert ran(results) == ["first", "stuck", "other kernel"]
    assert found["same kernel"]["failed"] == "not run: new hung in 'stuck'"
    assert "hung: new (in 'stuck')" in report.table(results)
    # Nor in a later call, which reads the file.
    later = Results(results.path, toy=True)
    call(later, cases[2], call="later")
    assert ran(later, "later") == []
    # Once the case that hung works, the others run.
    call(later, odd("stuck", kernels=("base", "new")), call="fixed")
    assert "failed" not in call(later, cases[2], call="at last")["same kernel"]
    assert later.hung() == {}


def test_a_failure_leaves_its_error_and_earlier_parts_and_the_family_goes_on(results):
    found = call(results, odd("broken", "fail"), odd("after"))
    broken = found["broken"]
    assert broken["failed"] == "RuntimeError: no such instruction"  # a line
    assert broken["error_tail"].rstrip().endswith("RuntimeError: no such\ninstruction")
    assert parts(broken) == ["before", "preparation"]
    assert parts(found["after"]) == ["good", "preparation"]
    assert "wrong or failed: broken\n  broken: RuntimeError: no such instruction" in report.table(results)


def test_a_process_that_dies_loses_the_case_under_way_only(results):
    found = call(results, odd("before"), odd("dead", "die", kernels=("new",)), odd("after", kernels=("new",)))
    dead = found["dead"]
    assert (dead["failed"], dead["error_tail"]) == ("exit status 7", "out of memory\n")
    assert parts(dead) == ["before"]
    assert "hung" not in dead  # it ended by itself: its kernel goes on
    assert ran(results) == ["before", "dead", "after"]
    assert "failed" not in found["after"]


def test_a_trap_costs_the_case_and_its_kernel_and_the_rest_gets_a_new_process(results):
    found = call(
        results, odd("trapped", "trap", kernels=("new",)), odd("same", kernels=("new",)), odd("other"), toy=False
    )
    trapped = found["trapped"]
    assert trapped["failed"] == "RuntimeError: CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"
    assert trapped["hung"]
    assert parts(trapped) == ["before"]
    assert found["same"]["failed"] == "not run: new hung in 'trapped'"
    assert parts(found["other"]) == ["good", "preparation"]


def test_what_fails_while_it_prepares_is_recorded_and_the_others_run(results):
    found = call(results, odd("raises", "fail_early"), odd("good"), odd("exits", "die_early"), odd("last"))
    assert found["raises"]["failed"] == "ValueError: no such config"
    assert found["exits"]["failed"] == "in preparation: exit status 9"
    assert "failed" not in found["good"]
    assert "failed" not in found["last"]
    assert ran(results) == ["exits", "raises", "good", "last"]


def test_what_never_gets_ready_is_ended_and_recorded(results):
    found = call(results, odd("late", "never_ready"), prepare_seconds=3)
    assert found["late"]["failed"] == "in preparation: not ready after 3 s"
    assert "hung" not in found["late"]  # it may have waited for a compiler


def test_children_get_their_platform_their_family_s_environment_and_a_place_for_programs(results, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    toy = call(results, odd("toy", "environment"), environment={"OF_THE_FAMILY": "yes"})["toy"]
    assert toy["parts"][0] == {"part": "environment", "platforms": "cpu", "own": "yes", "cache": None}
    # CUDA where there is a plugin; host callbacks need the CPU as well.
    gpu = call(results, odd("gpu", "environment"), toy=False)["gpu"]
    cache = str(pathlib.Path(tempfile.gettempdir()) / "fps_benchmarks_xla")
    assert gpu["parts"][0] == {"part": "environment", "platforms": "cuda,cpu", "own": None, "cache": cache}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "comes/back")
    assert call(results, odd("again", "environment"), toy=False)["again"]["parts"][0]["cache"] == "comes/back"


def test_a_cpu_is_not_timed_in_the_gpu_s_place(results):
    """Without a plugin, or with a broken one, jax falls back on the CPU."""
    assert call(results, odd("toy", "on_jax"))["toy"]["parts"][0]["on"] == "cpu"
    failed = call(results, odd("gpu", "on_jax"), toy=False)["gpu"]
    assert failed["failed"] == "in preparation: exit status 1"
    assert "jax runs on cpu, not on a GPU" in failed["error_tail"]
    assert failed["parts"] == []


def test_the_file_is_whole_after_each_case_and_says_in_words_what_is_not_finite(results):
    def family(*cases: Case) -> Family:
        return Family(name=cases[0].name, stage="speed", cases=cases)

    seen = []

    def look(seconds: float) -> None:
        if results.path.exists():
            seen.append(
                [r["case"] for r in json.loads(results.path.read_text(), parse_constant=pytest.fail)["results"]]
            )
        time.sleep(seconds)

    Runner(results, "now", toy=True, budget=400, ahead=0, sleep=look).run([family(odd("a", "wrong")), family(odd("b"))])
    assert ["a"] in seen
    stored = json.loads(results.path.read_text(), parse_constant=pytest.fail)["results"]
    assert [r["case"] for r in stored] == ["a", "b"]
    assert stored[0]["parts"][0] == {"part": "bad", "ok": False, "rel_l2": "nan"}
    assert not results.path.with_name("gpu.json.part").exists()
