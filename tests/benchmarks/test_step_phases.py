"""Phases of a step by a profiler's samples: told apart on a listing in ncu's form."""

import csv

import pytest

from benchmarks import step_phases

# (instruction, executed, samples) of a consumer's loop between two stretches that run once.
LOOP = [
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR18], R4", 100, 5),
    ("QGMMA.64x128x32.F32.E4M3.E4M3 R92, gdesc[UR16], RZ", 100, 10),
    ("QGMMA.64x136x32.F32.E4M3.E4M3 R24, R168, gdesc[UR8], RZ", 100, 5),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 100, 10),
    ("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR5], RZ", 100, 0),
    ("VIMNMX3 R4, R5, R6, R7", 100, 8),
    ("VOTE.ANY P1, P1", 100, 1),
    ("@!P1 BRA 0x10", 100, 1),
    ("FRND.CEIL R1, R1", 8, 4),
    ("MUFU.EX2 R3, R4", 100, 36),
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R2", 100, 3),
    ("@!P1 BRA 0x20", 100, 2),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 100, 1),
    ("FFMA R1, R2, R3, R4", 100, 12),
    ("@P1 BRA 0x0", 100, 2),
]
ONCE = [("MOV R1, R2", 1, 50)]


def write(path, *kernels):
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        for rows in kernels:
            lines.writerow(["Kernel Name", "a_kernel"])
            lines.writerow(["Address", step_phases.SOURCE, step_phases.SAMPLES, step_phases.EXECUTED])
            lines.writerows([hex(i), op, samples, n] for i, (op, n, samples) in enumerate(rows))


def test_shares_of_the_loop_alone_add_up_and_lie_between_their_landmarks(tmp_path):
    write(tmp_path / "source.csv", [*ONCE, *LOOP, *ONCE], [*ONCE, *LOOP])
    first, second = step_phases.kernels(tmp_path / "source.csv")
    found = step_phases.phases(step_phases.main_loop(first))
    assert found == {
        "waits for V, issue of both products": 0.2,
        "wait for Q K": 0.1,
        "row maxima and vote": 0.1,
        "exponentials (and what is jumped over)": 0.4,
        "wait for the next keys": 0.05,
        "wait for P V": 0.01,
        "sums, conversion of P": 0.14,
    }
    assert step_phases.phases(step_phases.main_loop(second)) == found


def test_a_kernel_without_matmuls_is_refused(tmp_path):
    write(tmp_path / "source.csv", ONCE)
    [rows] = step_phases.kernels(tmp_path / "source.csv")
    with pytest.raises(ValueError, match="no wgmma in this kernel; profile the forward kernel"):
        step_phases.main_loop(rows)
