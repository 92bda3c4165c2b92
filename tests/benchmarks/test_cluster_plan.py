"""The check that a small step for eight GPUs passes in `make offline-gpu`, on the committed row and on broken ones."""

import copy
import json

import pytest

from benchmarks import cluster_plan
from benchmarks.record import RESULTS


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "cluster_plan.json").read_text())["rows"]


def checked(monkeypatch, row):
    monkeypatch.setattr(cluster_plan, "_in_a_process", lambda _: row)
    return cluster_plan.main(["--check"])


def test_the_committed_small_row_passes(committed, monkeypatch):
    assert checked(monkeypatch, committed[cluster_plan.ROWS[0].name]) == 0


@pytest.mark.parametrize(
    ("changes", "kernels", "message"),
    [
        ({"involuntary_rematerializations": 1}, None, "XLA gathers what should stay cut"),
        ({"arguments_are_the_shards": False}, None, "isn't given the shards"),
        ({"total_bytes": 2**35}, None, "were committed"),
        ({}, ["mosaic_gpu_v2"], "cuDNN's attention or the Hopper kernel isn't in it"),
    ],
)
def test_what_breaks_is_named(committed, monkeypatch, capsys, changes, kernels, message):
    row = copy.deepcopy(committed[cluster_plan.ROWS[0].name]) | changes
    if kernels is not None:
        for program in row["programs"].values():
            program["kernels"] = kernels
    assert checked(monkeypatch, row) == 1
    assert message in capsys.readouterr().err


def test_rows_at_real_size_keep_what_holds_for_each(committed):
    for name, found in committed.items():
        assert cluster_plan.broken(found) == [], name


def test_weights_gradients_are_scattered_and_next_to_nothing_is_summed_whole_over_fsdp(committed):
    """All-reduces there are of norms, biases and the text embedding. Summed whole, cross-attention's were 6% of what is sent."""
    for name, found in committed.items():
        if name == cluster_plan.ROWS[0].name:
            continue
        for program in (program for step, program in found["programs"].items() if step != "update"):
            sent = sum(row["bytes"] for row in program["sent"])
            whole = sum(
                row["bytes"] for row in program["sent"] if row["kind"] == "all-reduce" and "fsdp" in row["axes"]
            )
            assert whole <= 0.01 * sent, name
