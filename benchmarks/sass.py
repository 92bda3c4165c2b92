"""Reads what ptxas and nvdisasm say of a Hopper attention kernel: spills, registers, and its main loop, instruction by instruction.

The main loop is the shortest backward branch whose body issues at least six warpgroup matmuls: one step over a block of keys. In it
the order decides about speed and about correctness, and only machine code shows it: a compiler may move what the source has in
order.
"""

import re
from collections import Counter
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_LONG = 32  # instructions: half of what rescaling the sums takes
# P of a step: 64 x 128 exponentials for the 128 threads of a warpgroup.
EXPONENTIALS = 64
# What the special-function unit does, 16 lanes a cycle and multiprocessor: exponentials and the like, and rounding (FRND).
SPECIAL_FUNCTIONS = ("MUFU", "FRND")


class Instruction(NamedTuple):
    """One line of SASS, its predicate left out. `op` is 'QGMMA.64x136x32.F32.E4M3.E4M3', `operands` the rest."""

    op: str
    operands: str


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of nvdisasm's listing, and the index that each label stands before."""
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        if found := _INSTRUCTION.search(line):
            instructions.append(Instruction(found[1], found[2]))
    return instructions, labels


def main_loop(sass: str) -> list[Instruction]:
    """One step of a consumer; empty where no loop has matmuls enough."""
    return _main_loop(*parse(sass))


def _main_loop(instructions: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    loops = []
    for i, (op, operands) in enumerate(instructions):
        target = re.search(r"(\.L_x_\d+)", operands) if op.startswith("BRA") else None
        if target and labels.get(target[1], i + 1) <= i:
            body = instructions[labels[target[1]] : i + 1]
            if sum("GMMA" in x.op for x in body) >= 6:
                loops.append(body)
    return min(loops, key=len, default=[])


def usual_step(loop: list[Instruction], instructions: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """A step without what its branches usually jump over: long stretches of arithmetic, done where a maximum moved.

    Special functions may be among it, a wait or a matmul may not.

    Args:
      loop: as `main_loop` has it, of these instructions and labels.
    """
    if not loop:
        return []
    start = next(i for i in range(len(instructions)) if instructions[i : i + len(loop)] == loop)
    kept = [True] * len(loop)
    for i, (op, operands) in enumerate(loop):
        target = re.search(r"(\.L_x_\d+)", operands) if op.startswith("BRA") else None
        end = labels[target[1]] - start if target and target[1] in labels else 0
        inside = loop[i + 1 : end]
        if len(inside) >= _LONG and not any(x.op.startswith(("WARPGROUP", "SYNCS")) or "GMMA" in x.op for x in inside):
            kept[i + 1 : end] = [False] * len(inside)
    return [x for x, keep in zip(loop, kept, strict=True) if keep]


def order_problems(
    loop: list[Instruction], *, takes_turns: bool = False, exponentials: int = EXPONENTIALS
) -> list[str]:
    """What is out of order in a step, of which `loop` is what is usually done; empty where all is well.

    Matmuls of both products; a wait for the first; its slot handed back; the exponentials; a wait for the second; its slot handed
    back. A slot that is handed back before its wait is overwritten while it is read; exponentials after the second wait don't
    overlap anything.

    Args:
      takes_turns: whether consumers take turns: then the turn is handed over once both products were issued, not before.
      exponentials: of the special-function unit that a thread has in a step.
    """
    marks = []
    for op, operands in loop:
        if "GMMA" in op:
            marks.append("matmul")
        elif op.startswith("WARPGROUP.DEPBAR"):
            marks.append("wait for all" if operands.rstrip().endswith("0x0") else "wait for the first")
        elif op.startswith("MUFU.EX2"):
            marks.append("exponential")
        elif op.startswith("SYNCS.ARRIVE"):
            marks.append("hand back")
    if "matmul" not in marks:
        return ["no matmul in the loop"]
    start = marks.index("matmul")
    marks = marks[start:] + marks[:start]  # a loop may be rotated by the compiler
    if marks.count("wait for the first") != 1 or marks.count("wait for all") != 1:
        counts = Counter(m for m in marks if m.startswith("wait"))
        return [f"waits of a step are {dict(counts)}, not one for each product: matmuls are serialized"]
    first, last = marks.index("wait for the first"), marks.index("wait for all")
    problems = []
    if not first < last:
        problems.append("the wait for P V comes before the wait for Q K")
    if "matmul" in marks[first:]:
        problems.append("a matmul is issued after the wait for Q K: the tensor cores idle meanwhile")
    between = marks[first:last].count("exponential")
    if between < exponentials:
        problems.append(f"{between} of {exponentials} exponentials lie between the waits: the others overlap nothing")
    handed = [i for i, mark in enumerate(marks) if mark == "hand back"]
    if takes_turns:
        if "matmul" in marks[handed[0] : first] or not handed[0] < first:
            problems.append("the turn is not handed over between the matmuls and the first wait")
        del handed[0]
    if len(handed) != 2 or not (first < handed[0] < last < handed[1]):
        problems.append("slots are not handed back one after each wait")
    return problems


def loop_facts(sass: str, *, takes_turns: bool = False, exponentials: int = EXPONENTIALS) -> dict[str, object]:
    """Numbers of the main loop. `takes_turns`, `exponentials`: as `order_problems`."""
    instructions, labels = parse(sass)
    loop = _main_loop(instructions, labels)
    usual = usual_step(loop, instructions, labels)
    ops = Counter(x.op.split(".")[0] for x in loop)
    return {
        "main_loop_instructions": len(loop),
        "usual_step_instructions": len(usual),
        "special_functions": sum(x.op.startswith(SPECIAL_FUNCTIONS) for x in usual),
        "main_loop_matmuls": sorted({x.op for x in loop if "GMMA" in x.op}),
        "main_loop_most": dict(ops.most_common(8)),
        "order_problems": order_problems(usual, takes_turns=takes_turns, exponentials=exponentials),
    }


def register_facts(sass: str, live: str) -> dict[str, object]:
    """Registers that warpgroups ask for (`setmaxnreg`) and the most that are live at once.

    Args:
      sass: nvdisasm's listing.
      live: the same with `-lrm count`.
    """
    asked: dict[str, int] = {}
    for op, operands in parse(sass)[0]:
        if op.startswith("USETMAXREG") and (value := re.search(r"0x([0-9a-f]+)", operands)):
            asked["producer" if "DEALLOC" in op else "consumer"] = int(value[1], 16)
    counts = [int(n) for n in re.findall(r"//\s*\|\s*(\d+)\s*\|", live)]
    return {"setmaxnreg": asked, "live_registers": max(counts, default=0)}


def ptxas_facts(log: str) -> dict[str, object]:
    """What ptxas -v says of a kernel, and its notes on matmuls that it serialized (C7510 to C7514)."""

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    notes = [
        line.split(":", 1)[-1].strip()
        for line in log.splitlines()
        # Dynamic shared memory is declared with one byte: an access beyond that is no error.
        if re.search(r"\(C\d+\)|warning|Potential", line) and "'__dynamic_shmem" not in line
    ]
    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "static_shared_memory": number(r"(\d+) bytes smem"),
        "notes": notes,
    }
