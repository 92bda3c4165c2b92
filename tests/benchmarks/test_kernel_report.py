"""The report on machine code: what it reads, what it refuses, and that the committed one is in order.

`make offline-gpu` makes the machine code and compares; it needs CUDA's compiler, and so its own environment.
"""

import copy
import json

import pytest

from benchmarks import kernel_report, sass
from pallas_kernels.sm90.call_shape import CallShape
from pallas_kernels.sm90.config import SHARED_MEMORY

COMMITTED = json.loads((kernel_report.RESULTS / "kernel_report.json").read_text())["kernels"]


def listing(*ops: str) -> str:
    """A loop in nvdisasm's format."""
    lines = [f"        /*{16 * i:04x}*/                   {op} ;" for i, op in enumerate(ops)]
    branch = f"        /*{16 * len(ops):04x}*/              @P1 BRA `(.L_x_3) ;"
    return "\n".join([".L_x_3:", *lines, branch])


SCORES = ["QGMMA.64x128x32.F32.E4M3.E4M3 R88, R24, gdesc[UR8], !UPT"] * 4
OUTPUT = ["QGMMA.64x136x32.F32.E4M3.E4M3 R24, R4, gdesc[UR8], R24, gsb0"] * 4
FIRST, ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
FREE = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR7], RZ"
EXP = ["MUFU.EX2 R3, R4"] * 64
GOOD = [*SCORES, *OUTPUT, FIRST, FREE, *EXP, ALL, FREE]


def test_a_step_in_order_has_no_problems():
    loop = sass.main_loop(listing(*GOOD))
    assert len(loop) == len(GOOD) + 1
    assert sass.order_problems(loop) == []
    rotated = GOOD[-1:] + GOOD[:-1]
    assert sass.order_problems(sass.main_loop(listing(*rotated))) == []


@pytest.mark.parametrize(
    ("ops", "words"),
    [
        ([*SCORES, *OUTPUT, FREE, FIRST, *EXP, ALL, FREE], "slots are not handed back one after each wait"),
        ([*SCORES, *OUTPUT, FIRST, FREE, *EXP, FREE, ALL], "slots are not handed back one after each wait"),
        ([*SCORES, *OUTPUT, FIRST, FREE, ALL, *EXP, FREE], "0 of 64 exponentials lie between the waits"),
        ([*SCORES, FIRST, *OUTPUT, FREE, *EXP, ALL, FREE], "a matmul is issued after the wait for Q K"),
        ([*SCORES, ALL, *OUTPUT, FIRST, FREE, *EXP, ALL, FREE], "matmuls are serialized"),
    ],
)
def test_a_step_out_of_order_is_told(ops, words):
    [problem] = sass.order_problems(sass.main_loop(listing(*ops)))
    assert words in problem


def test_a_turn_is_handed_over_between_the_matmuls_and_the_first_wait():
    handed = [*SCORES, *OUTPUT, FREE, FIRST, FREE, *EXP, ALL, FREE]
    early = [*SCORES, FREE, *OUTPUT, FIRST, FREE, *EXP, ALL, FREE]
    never = GOOD
    assert sass.order_problems(sass.main_loop(listing(*handed)), takes_turns=True) == []
    for ops in (early, never):
        problems = sass.order_problems(sass.main_loop(listing(*ops)), takes_turns=True)
        assert problems[0] == "the turn is not handed over between the matmuls and the first wait"


def test_what_a_step_usually_jumps_over_is_counted_apart():
    """Rescaling and new maxima, and nothing else: a wait that is jumped over is short, and one between matmuls is no arithmetic."""
    jump, label = "@!P2 BRA `(.L_x_{})", ".L_x_{}:"
    rescale = ["FFMA R24, R24, R2, R28"] * 37 + ["MUFU.EX2 R3, R4"] * 2 + ["FRND.CEIL R2, R3"]
    wait = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R5"] * 40
    lines = listing(jump.format(7), *rescale, *GOOD, jump.format(8), *wait).splitlines()
    lines.insert(lines.index(next(x for x in lines if SCORES[0] in x)), label.format(7))
    lines.insert(len(lines) - 1, label.format(8))
    facts = sass.loop_facts("\n".join(lines))
    assert facts["main_loop_instructions"] == len(GOOD) + 2 + 40 + 40 + 1
    assert facts["usual_step_instructions"] == len(GOOD) + 2 + 40 + 1
    assert facts["special_functions"] == 64


def test_exponentials_that_are_jumped_over_are_none_of_a_steps_own():
    jumped = ["FFMA R24, R24, R2, R28"] * 40 + EXP[:8]
    lines = listing(*SCORES, *OUTPUT, FIRST, FREE, "@!P2 BRA `(.L_x_7)", *jumped, *EXP[8:], ALL, FREE).splitlines()
    lines.insert(len(lines) - 1 - 2 - len(EXP[8:]), ".L_x_7:")
    [problem] = sass.loop_facts("\n".join(lines))["order_problems"]
    assert "56 of 64 exponentials lie between the waits" in problem


def test_a_matmul_is_never_among_what_is_jumped_over():
    lines = listing("@!P2 BRA `(.L_x_7)", *["FFMA R24, R24, R2, R28"] * 40, *GOOD).splitlines()
    lines.insert(-1, ".L_x_7:")
    facts = sass.loop_facts("\n".join(lines))
    assert facts["usual_step_instructions"] == facts["main_loop_instructions"]


def test_code_without_matmuls_is_told():
    assert sass.order_problems(sass.main_loop(listing("MUFU.EX2 R3, R4"))) == ["no matmul in the loop"]


def test_the_shortest_loop_with_matmuls_is_the_main_loop():
    inner = listing(*GOOD)
    outer = ".L_x_1:\n        /*0000*/   MOV R1, R2 ;\n" + inner + "\n        /*9000*/   @P0 BRA `(.L_x_1) ;"
    assert len(sass.main_loop(outer)) == len(GOOD) + 1


def test_registers_and_ptxas_logs_are_read():
    text = "/*0010*/ USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;\n/*0020*/ USETMAXREG.DEALLOC.CTAPOOL 0x18 ;"
    facts = sass.register_facts(text, "// | 12 |\n// | 225 |\n")
    assert facts == {"setmaxnreg": {"consumer": 240, "producer": 24}, "live_registers": 225}
    log = (
        "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
        "    0 bytes stack frame, 4 bytes spill stores, 24 bytes spill loads\n"
        "ptxas warning : Potential out of bound access while accessing symbol '__dynamic_shmem__0' of type '.b8'\n"
        "ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem\n"
    )
    facts = sass.ptxas_facts(log)
    assert (facts["registers"], facts["spill_bytes"], facts["static_shared_memory"]) == (168, 28, 1)
    assert facts["notes"] == ["(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized"]


ANY = next(iter(COMMITTED))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spill_bytes": 28}, "28 bytes of registers are spilled"),
        ({"notes": ["(C7512) serialized"]}, "ptxas notes: (C7512) serialized"),
        ({"shared_memory": 232449}, "232449 bytes of shared memory, a block has 232448"),
        ({"setmaxnreg": {"consumer": 240, "producer": 40}}, "setmaxnreg asks for 520, the launch has 504: a GPU hangs"),
        ({"live_registers": 241}, "241 registers are live, a consumer has 240"),
        ({"order_problems": ["out of order"]}, "out of order"),
        ({"waits": 12, "traps": 11}, "11 of 12 waits for an mbarrier can trap: all or none should"),
    ],
)
def test_limits(change, words):
    facts = copy.deepcopy(COMMITTED[ANY])
    assert kernel_report.limits_broken(facts) == []
    assert words in kernel_report.limits_broken({**facts, **change})


def test_a_number_that_grows_by_more_than_2_percent_fails():
    facts = {**COMMITTED[ANY], "main_loop_instructions": 400}
    assert kernel_report.got_worse(facts, {**facts, "main_loop_instructions": 408}) == []
    assert kernel_report.got_worse(facts, {**facts, "main_loop_instructions": 409}) == [
        "main_loop_instructions was 400, is 409"
    ]
    assert kernel_report.got_worse(facts, {**facts, "main_loop_instructions": 300}) == []


def test_cases_that_are_new_or_gone_are_told():
    wrong = kernel_report.check({"new": COMMITTED[ANY]}, {"gone": COMMITTED[ANY]})
    assert [line.split(";")[0] for line in wrong] == [
        "gone: is in the committed report only",
        "new: is not in the committed report",
    ]


def test_the_committed_report_is_of_the_shipped_kernels_and_in_order():
    assert list(COMMITTED) == [name for *_, names in kernel_report.programs().values() for name in names]
    assert kernel_report.check(COMMITTED, COMMITTED) == []
    for name in kernel_report.cases():
        facts = COMMITTED[name]
        assert facts["main_loop_matmuls"][0].startswith("HGMMA" if "bf16" in name else "QGMMA"), name
        assert facts["shared_memory"] <= SHARED_MEMORY


def test_the_default_config_issues_370_instructions_in_the_usual_step_at_most():
    """With or without a cluster; and nothing for the special-function unit but the step's exponentials."""
    for name in ("14B 720p, 1 scale", "14B 720p, 1 scale, cluster"):
        assert COMMITTED[name]["usual_step_instructions"] <= 370
        assert COMMITTED[name]["special_functions"] == sass.EXPONENTIALS


def test_shared_memory_is_what_a_call_shape_estimates():
    for name, case in kernel_report.cases().items():
        call = CallShape(
            head_dim=case.head_dim,
            dtype="bfloat16",
            tile_size=256,
            tokens_per_scale=256 // case.scales if case.scales else None,
            table_density=1.0,
        )
        assert call.shared_memory_bytes(case.config) == COMMITTED[name]["shared_memory"], name


def test_waits_give_up_where_they_should_and_nowhere_else():
    """In the PTX: all of a kernel that was compiled inside `impatient_waits`, none outside."""
    for name, case in kernel_report.cases().items():
        assert COMMITTED[name]["waits"] > 0
        assert COMMITTED[name]["traps"] == (COMMITTED[name]["waits"] if case.impatient else 0), name


def test_the_table_in_the_docs_is_the_committed_report():
    docs = (kernel_report.RESULTS.parents[1] / "docs" / "kernels.md").read_text()
    assert kernel_report.table(COMMITTED) in docs
