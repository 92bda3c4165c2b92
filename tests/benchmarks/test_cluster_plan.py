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


def test_rows_hold_what_was_to_be_held(committed):
    assert list(committed) == [row.name for row in cluster_plan.ROWS]
    for row in cluster_plan.ROWS:
        assert cluster_plan.missed(row, committed[row.name]) == [], row.name
        assert committed[row.name]["total_bytes"] <= 127e9, row.name


def test_the_page_has_the_table_of_the_committed_rows(committed):
    page = (RESULTS.parents[1] / "docs" / "cluster.md").read_text()
    assert f"\n\n{cluster_plan.table(committed)}\n\n" in page


def test_the_committed_times_are_those_of_what_is_sent(committed):
    for row in cluster_plan.ROWS:
        found = committed[row.name]
        assert cluster_plan.with_traffic_times(found, row) == found, row.name


def test_times_are_computed_anew_from_what_is_sent_and_all_else_stays():
    """data=2 on 16 GPUs leaves the node, by one network card for each of a pair."""
    sent = [
        {"kind": "all-reduce", "axes": ["data"], "count": 1, "bytes": 10**11},
        {"kind": "all-gather", "axes": ["context"], "count": 2, "bytes": 9 * 10**11},
    ]
    row = cluster_plan.Row("small", "256x256x5", "data=2,context=8")
    found = {"wall_s": 3, "programs": {"one": {"sent": sent, "traffic_s": 0.0, "cpu_s": 1.0}}}
    want = {"wall_s": 3, "programs": {"one": {"sent": sent, "traffic_s": 4.0, "cpu_s": 1.0}}}
    assert cluster_plan.with_traffic_times(found, row) == want


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
