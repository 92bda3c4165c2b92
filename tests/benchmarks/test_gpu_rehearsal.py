"""A call of the real plan with a fake clock: the order, the turns, and the budget, whatever goes wrong on the way."""

import pathlib

import pytest

from benchmarks.gpu import _AHEAD
from benchmarks.gpu_cases.plan import all_families
from benchmarks.gpu_cases.runner import SILENCE, Case, Family
from tests.benchmarks.rehearsal import PREPARE, Actor, Script, Stage, Unwritten, rehearse

BUDGET = 540
LOOK = 0.2  # seconds that a call may last longer: it looks ten times a second
PLAN = all_families()
CASES = [case for family in PLAN for case in family.cases]
_STAGES = {case.name: family.stage for family in PLAN for case in family.cases}


def seconds(case: Case) -> float:
    """As long as an H200 took, about."""
    return {"correct": 0.1, "whole": 20.0, "peers": 0.1}.get(
        _STAGES[case.name], 68.0 if "counters" in case.name else 1.5
    )


def call(outcomes=(), *, families=PLAN, budget: float = BUDGET, **fields):
    results = Unwritten(pathlib.Path("never.json"), toy=False)
    script = Script(**{"outcomes": dict(outcomes), "seconds": seconds, **fields})
    stage = rehearse(families, script, results, budget=budget, ahead=_AHEAD)
    return stage, results


def kind(record) -> str:
    if record.get("unfinished"):
        return "left out"
    return "hung" if record.get("hung") else "failed" if "failed" in record else "done"


def test_families_get_the_gpu_in_the_order_of_the_plan_while_others_prepare():
    stage, results = call(budget=10_000)
    assert [t.family.name for t in stage.turns] == [f.name for f in PLAN]
    assert stage.preparing == _AHEAD + 1
    assert {kind(r) for r in results.latest().values()} == {"done"}
    assert list(results.latest()) == [c.name for c in CASES]
    # The GPU has little to wait for, beside what preparing one after the other would take.
    waited = stage.now - sum(t.end - t.begin for t in stage.turns)
    assert PREPARE <= waited < PREPARE * len(PLAN) / 6


def test_what_is_not_ready_gives_its_turn_to_the_next_that_is_and_keeps_its_place():
    slow = Family(name="slow", stage="speed", cases=tuple(Case(name=f"slow {i}", function="") for i in range(5)))
    quick = [Family(name=f"quick {i}", stage="speed", cases=(Case(name=f"q{i}", function=""),)) for i in range(3)]
    died = {"slow 0": "die early"}
    stage, results = call(died, families=[slow, *quick], seconds=lambda case: 10.0, prepare=20.0)
    # It dies after 4 s, starts again, and is ready at 24 s: after the first quick one has begun, and before the others.
    assert [t.family.name for t in stage.turns] == ["quick 0", "slow", "quick 1", "quick 2"]
    assert results.latest()["slow 0"]["failed"] == "in preparation: exit status 1"
    assert [kind(results.latest()[f"slow {i}"]) for i in range(5)] == ["failed"] + ["done"] * 4


def test_the_most_valuable_is_done_when_the_budget_is_spent_and_the_rest_is_said_to_be_left_out():
    stage, results = call()
    assert stage.now <= BUDGET + LOOK
    kinds = [kind(results.latest()[c.name]) for c in CASES]
    done = kinds.index("left out")
    assert set(kinds[:done]) == {"done"}
    assert set(kinds[done:]) == {"left out"}
    first_left = results.latest()[CASES[done].name]
    assert "the budget is spent; call again to continue" in first_left["failed"]
    # Only the case under way has said something.
    assert [len(results.latest()[c.name]["parts"]) for c in CASES[done + 1 :]] == [0] * (len(CASES) - done - 1)
    # What the issue of a call is, is among the first: the ladder, the headline, which kernels are right, two sweeps.
    names = {c.name for c in CASES[:done]}
    for family in ("ladder", "headline", "correct clusters", "configs fp8x1 0.20 14B", "configs fp8x1 1.00 14B"):
        assert names >= {c.name for f in PLAN if f.name == family for c in f.cases}, family


@pytest.mark.parametrize("trouble", ["hang", "die", "trap", "die early", "never ready"])
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_one_case_in_trouble_costs_itself_and_its_kernel_and_never_the_budget(trouble, which):
    bound, seen = BUDGET + LOOK, 0
    blamed = {"hang": "hung", "trap": "hung"}.get(trouble, "failed")
    for family in PLAN:
        guilty = family.cases[which]
        stage, results = call({guilty.name: trouble})
        assert stage.now <= bound, family.name
        found = {name: kind(r) for name, r in results.latest().items()}
        assert set(found) == {c.name for c in CASES}  # nothing is lost
        # It may not have come to its turn, or to the end of its time.
        outcome = found.pop(guilty.name)
        assert outcome in (blamed, "left out"), family.name
        seen += outcome == blamed
        assert set(found.values()) <= {"done", "left out"}, family.name
        banned = set(guilty.kernels[-1:]) if outcome == "hung" else set()
        for case in CASES:
            if banned & set(case.kernels) and case.name in found:
                record = results.latest()[case.name]
                before = CASES.index(case) < CASES.index(guilty)
                assert before or record.get("unfinished"), (guilty.name, case.name)
    assert seen >= 2 / 3 * len(PLAN)


def test_a_hang_costs_its_silence_and_families_that_were_ready_leave_its_kernel_out():
    """The cluster kernel hangs in the sweep of density 0.2, when the sweep of 1.0 has been prepared."""
    guilty = "fp8x1 0.20 14B stages=4 cluster=2"
    stage, results = call({guilty: "hang"}, budget=10_000)
    latest = results.latest()
    assert latest[guilty]["failed"] == f"hung: said nothing for {SILENCE:.0f} s"
    turn = next(t for t in stage.turns if guilty in [c.name for c in t.family.cases])
    assert turn.end - turn.begin == pytest.approx(2 * 1.5 + SILENCE, abs=3 * LOOK)
    for name in ("fp8x1 1.00 14B stages=4 cluster=2", "fp8x1 1.00 14B stages=2 cluster=2", "fp8x1 0.20 1.3B cluster=2"):
        assert latest[name]["failed"] == f"not run: fwd fp8 cluster hung in '{guilty}'"
    for name in ("fp8x1 0.20 14B stages=2", "fp8x1 0.20 14B stages=4 persistent=True", "pairs fp8x1 0.20 14B"):
        assert kind(latest[name]) == "done"


def test_a_family_that_is_slow_is_cut_off_at_its_time_and_the_next_has_its_turn():
    slow = next(f for f in PLAN if f.name == "torch 14B")
    # A second more, and each would be a hang.
    stage, results = call(budget=10_000, seconds=lambda case: SILENCE - 1 if case in slow.cases else 0.1)
    turn = next(t for t in stage.turns if t.family.name == slow.name)
    assert turn.end - turn.begin <= slow.seconds + LOOK
    latest = results.latest()
    assert [kind(latest[c.name]) for c in slow.cases] == ["done", "done", "left out"]
    assert latest[slow.cases[2].name]["failed"] == "unfinished: its family's 60 s were over; call again to continue"
    assert len(latest[slow.cases[2].name]["parts"]) == 1  # what it had said
    assert {kind(r) for name, r in latest.items() if name not in {c.name for c in slow.cases}} == {"done"}
    assert results.hung() == {}


def test_what_never_gets_ready_blames_the_case_that_it_prepared_and_holds_nobody_up():
    stage, results = call({"dense torch flash 14B": "never ready"}, budget=10_000)
    latest = results.latest()
    assert latest["dense torch flash 14B"]["failed"] == "in preparation: not ready after 240 s"
    assert {kind(r) for name, r in latest.items() if name != "dense torch flash 14B"} == {"done"}
    others = [t.family.name for t in stage.turns if t.family.name != "torch 14B"]
    assert others == [f.name for f in PLAN if f.name != "torch 14B"]


def test_three_hangs_in_a_row_end_the_call():
    names = [PLAN[i].cases[0].name for i in range(3)]
    stage, results = call(dict.fromkeys(names, "hang"))
    latest = results.latest()
    assert [kind(latest[name]) for name in names] == ["hung"] * 3
    rest = set(latest) - set(names)
    assert rest == {c.name for c in CASES} - set(names)
    why = "not run: 3 hangs in a row: the GPU itself may; call again to continue"
    assert {latest[name]["failed"] for name in rest} == {why}
    assert stage.now <= PREPARE + 3 * (SILENCE + LOOK) + LOOK


def test_a_process_that_ends_without_a_word_is_blamed_and_not_started_for_ever(monkeypatch):
    monkeypatch.setattr(Actor, "tell", lambda self, line: setattr(self, "dies", self.stage.now))
    families = [Family(name="mute", stage="speed", cases=(Case(name="a", function=""), Case(name="b", function="")))]
    _, results = call(families=families)
    assert [r["failed"] for r in results.latest().values()] == ["exit status 0", "exit status 0"]


@pytest.mark.parametrize("when", [PREPARE / 2, PREPARE + 1])
def test_an_interrupt_ends_every_process(when, monkeypatch):
    """Whether the GPU is anybody's or not."""

    def interrupted(self, seconds):
        self.now += seconds
        if self.now > when:
            raise KeyboardInterrupt

    started = []
    launch = Stage.launch
    monkeypatch.setattr(Stage, "sleep", interrupted)
    monkeypatch.setattr(Stage, "launch", lambda self, *args: started.append(launch(self, *args)) or started[-1])
    with pytest.raises(KeyboardInterrupt):
        call()
    assert len(started) == _AHEAD + 1
    assert not [actor for actor in started if actor.alive]
