"""What the cases of `benchmarks.gpu` look at: clocks, counters, references, and whether a wrong kernel is found."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_cases import attention, correct, counters, facts, programs, shapes
from benchmarks.gpu_cases.results import Results
from benchmarks.gpu_cases.runner import REFERENCES
from pallas_kernels import reference
from pallas_kernels.sm90.tuned import TUNED_TABLE, fastest, read_tuned_table
from pallas_kernels.testing import make_call

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


def test_at_real_size_the_last_tile_of_output_and_log_sum_exp_is_looked_at(monkeypatch):
    """At toy size here: a kernel that goes wrong at the largest addresses, in either of its results."""
    pattern = programs.task_of(True, "14B", 0.2, 1).plan.pattern
    out, lse = jax.jit(reference.attention)(*programs.inputs(True, "14B"), pattern)
    last = int(np.flatnonzero(np.asarray(pattern.q_valid))[-1])
    results = {
        "right": (out, lse),
        "an element of the output": (out.at[0, last, -1, -1].add(3), lse),
        "the output, a little": (out * 1.02, lse),
        "a log-sum-exp": (out, lse.at[0, -1, last].add(0.1)),
        "log-sum-exps, a little": (out, lse * 1.0003),
        "not a number": (out, lse.at[0, -1, last].set(jnp.nan)),
    }
    monkeypatch.setattr(programs, "quantizer", lambda *args: None)
    monkeypatch.setattr(programs, "operands", lambda *args: None)
    found = {}
    for name, result in results.items():
        monkeypatch.setattr(programs, "forward", lambda *args, result=result: lambda operands: result)
        *_, part = attention.attention(True, size="14B", density=0.2, scales=1)
        found[name] = part["ok"]
    assert found.pop("right")
    assert found == dict.fromkeys(found, False)


def test_a_shape_runs_first_where_waits_give_up_and_then_as_it_is_used(monkeypatch):
    """Programs are lowered for a GPU, and answered by the specification."""
    built, ran = [], []

    def compiled(toy, fn, *args):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
        kind = "trap" if "trap;" in text else "hang"
        built.append(kind)
        return lambda *qkv: ran.append(kind) or correct._specification(shape)

    shape = shapes.SHAPES["first"]["one tile"]
    monkeypatch.setattr(correct, "compiled", compiled)
    monkeypatch.setattr(correct, "poison", lambda toy: None)
    monkeypatch.delenv(REFERENCES, raising=False)
    parts = correct.forward(False, group="first", name="one tile")
    assert next(parts) is None
    assert (built, ran) == (["trap", "hang"], [])  # both are there before the turn
    first, second = parts
    assert ran == ["trap"] * 3 + ["hang"] * 3
    assert (first["part"], second["part"]) == ("one tile, waits that give up", "one tile")
    assert first["ok"]
    assert second["ok"]


def test_poison_is_nan_in_every_float_dtype():
    word = np.full(1, 0xFFFFFFFF, np.uint32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        assert np.isnan(word.view(dtype).astype(np.float32)).all()
