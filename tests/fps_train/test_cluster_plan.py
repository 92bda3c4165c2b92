"""What is sent and held is counted right: on small programs for virtual devices, whose traffic is known. GPUs: make offline-gpu."""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from fps_jax.mesh import AXES
from fps_jax.models.sharding import make_mesh
from fps_train import cluster_plan, described
from fps_train.cluster_plan import ClusterPlan, ProgramPlan, plan_setup, report
from fps_train.collectives import Traffic, seconds, traffic
from fps_train.described import KINDS, parse_devices, prepare_process
from fps_train.memory import ProgramBytes
from fps_train.programs import Programs
from fps_train.setup import abstract_start, prepare, start

SIZES = {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}


def compiled(function, spec, *shape):
    mesh = make_mesh(SIZES)
    run = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(run).lower(x).compile().as_text()


def test_a_collective_counts_once_for_each_round_of_its_loops():
    """Each device holds 4 x 8 numbers, and sends its half of 8 x 8 in a round."""

    def function(x):
        def gathered(x, _):
            return x + lax.all_gather(x, "context", axis=0, tiled=True)[:4] * 0.5, None

        def twice(x, _):
            return lax.scan(gathered, x, None, length=3)[0], None

        return lax.scan(twice, x, None, length=2)[0]

    (only,) = traffic(compiled(function, PartitionSpec("context", None), 8, 8), SIZES)
    assert only == Traffic("all-gather", ("context",), 6, 6 * 4 * 8 * 4)


@pytest.mark.parametrize(
    ("function", "want"),
    [
        # 16 x 8 numbers a device, of 4 bytes: 512 bytes
        (lambda x: lax.psum(x, ("data", "fsdp")), Traffic("all-reduce", ("data", "fsdp"), 1, 2 * 3 / 4 * 512)),
        (
            lambda x: jnp.concatenate([lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)] * 2),
            Traffic("reduce-scatter", ("fsdp",), 1, 512 / 2),
        ),
        (lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]), Traffic("collective-permute", ("data",), 1, 512)),
    ],
)
def test_bytes_are_those_of_a_ring(function, want):
    (only,) = traffic(compiled(function, PartitionSpec(), 16, 8), SIZES)
    assert only == want


@pytest.mark.parametrize(
    ("mesh", "kind", "axes", "speed"),
    [
        ({"fsdp": 8}, "all-gather", ("fsdp",), 450e9),
        ({"fsdp": 8}, "collective-permute", (), 450e9),
        # Axes in this order: the last ones are inside a node
        ({"data": 2, "fsdp": 2, "context": 4, "tensor": 2}, "all-gather", ("context", "tensor"), 450e9),
        ({"data": 2, "fsdp": 2, "context": 4, "tensor": 2}, "reduce-scatter", ("fsdp",), 50e9),
        ({"data": 2, "fsdp": 2, "context": 4, "tensor": 2}, "all-reduce", ("data", "fsdp"), 50e9),
        # Two of eight along fsdp share a node, and so two network cards
        ({"fsdp": 8, "context": 4}, "all-gather", ("fsdp",), 100e9),
        ({"fsdp": 8, "context": 4}, "all-to-all", ("fsdp",), 50e9),
        ({"fsdp": 8, "context": 4}, "all-gather", ("fsdp", "context"), 400e9),
        ({"fsdp": 8, "context": 4}, "all-gather", ("context",), 450e9),
        ({"fsdp": 8, "context": 4}, "collective-permute", (), 50e9),
        ({"context": 16}, "all-gather", ("context",), 400e9),
        # Groups of three: some are inside a node, some not
        ({"fsdp": 8, "context": 3}, "all-gather", ("context",), 50e9),
    ],
)
def test_what_leaves_a_node_goes_over_the_network(mesh, kind, axes, speed):
    rows = [Traffic(kind, axes, 3, 9e9), Traffic(kind, axes, 1, 1e9)]
    whole = dict.fromkeys(AXES, 1) | mesh
    assert seconds(rows, whole, KINDS["h200"]) == pytest.approx(10e9 / speed)
    assert seconds([], whole, KINDS["h200"]) == 0


def test_a_step_takes_its_regimes_by_their_shares_and_an_update():
    def program(arithmetic, traffic, share):
        return ProgramPlan(ProgramBytes(0, 0, 0, 0), (), (), arithmetic, traffic, share)

    programs = {"a": program(1.0, 0.25, 0.75), "b": program(2.0, 0.5, 0.25), "update": program(0.0, 0.125, 0.0)}
    plan = ClusterPlan(KINDS["h200"], 8, 10**12, 0, 0, 4 * 10**11, 2, programs)
    want = 2 * (0.75 * 1.25 + 0.25 * 2.5) + 0.125 + (2 * 10**12 + 4 * 10**11) / 4.8e12
    assert plan.step_seconds == pytest.approx(want)
    line = next(line for line in report(plan).splitlines() if line.startswith("a step of 2 microbatches"))
    assert ": 3.75 s, 0.267 steps/s, " in line
    assert line.endswith("450 GB/s a GPU in a node of 8 and 50 GB/s a GPU out of it")


def test_a_loop_of_unknown_length_around_a_collective_is_no_number():
    def function(x):
        return lax.while_loop(lambda x: x.sum() < 1e3, lambda x: lax.psum(x, "data"), x)

    with pytest.raises(ValueError, match="no known number of rounds"):
        traffic(compiled(function, PartitionSpec(), 16, 8), SIZES)


@pytest.fixture
def meshed(options):
    return dataclasses.replace(options, mesh="fsdp=4,context=2", batch_size=4)


def test_the_state_is_what_a_run_starts_with_and_nothing_is_read(meshed):
    setup = prepare(meshed)
    planned, real = abstract_start(setup), start(setup)
    assert (planned.frozen, planned.teacher) == (real.frozen, real.teacher) == ({}, None)
    for a, b in zip(jax.tree.leaves(planned.state), jax.tree.leaves(real.state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)


def test_sizes_of_videos_stand_for_data_that_nobody_has(meshed):
    """The same programs as with the data, to the shapes and attention of each bucket."""
    real, described = prepare(meshed), prepare(dataclasses.replace(meshed, data=""), sizes=("64x64x5",))
    assert described.buckets == real.buckets
    for a, b in zip(
        *(Programs(s, abstract_start(s))._abstract_batch(s.buckets[0]) for s in (real, described)), strict=True
    ):
        assert (a is None) == (b is None)
        assert a is None or (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_plan_counts_every_byte_of_the_state_and_says_whether_it_fits(meshed, monkeypatch):
    monkeypatch.setattr(cluster_plan, "peak_flops", lambda _: 1e12)
    setup = prepare(meshed)
    plan = plan_setup(setup, KINDS["h200"], lambda _: None)
    state = start(setup).state
    here = jax.devices()[3]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == here
    )
    assert plan.state == held < sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 3
    assert plan.whole_state == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # As XLA counts them: the state, a gradient that is cut as the parameters are, and the losses.
    assert plan.programs["update"].size.arguments == plan.state + plan.gradient + 4 * meshed.accumulate
    assert plan.gradient == sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(state.params)
    )
    assert [name.rpartition(" ")[2] for name in plan.programs] == ["regime0", "regime1", "update"]
    assert sum(program.share for program in plan.programs.values()) == pytest.approx(1)
    sent = {(row.kind, row.axes) for row in plan.programs["2x4x4 tokens, regime0"].sent}
    assert ("all-gather", ("context",)) in sent, "keys and values come together"
    assert plan.total > plan.state
    assert plan.fits
    said = report(plan)
    assert "all-gather along context: " in said
    assert f"\na step of {meshed.accumulate} microbatches, regimes by their shares, and the update: " in said
    assert said.endswith("of 151.4 GB: fits")
    small = dataclasses.replace(plan, kind=dataclasses.replace(plan.kind, memory=plan.total))
    assert "does not fit: a larger fsdp or context" in report(small)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100:8", "devices='a100:8' is no kind and number; give one of h100, h200"),
        ("h200:0", "is no kind and number"),
        ("h200:12", "12 is no whole number of nodes of 8"),
    ],
)
def test_devices_that_cannot_be_described_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_devices(text)


def test_devices_are_a_kind_and_a_number():
    assert parse_devices("h100") == (KINDS["h100"], 1)
    assert parse_devices("h200:64") == (KINDS["h200"], 64)


def test_without_the_packages_for_it_the_extra_is_named(monkeypatch):
    missing = functools.partial(lambda find, name: None if "cuda13" in name else find(name), importlib.util.find_spec)
    monkeypatch.setattr(described.importlib.util, "find_spec", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ValueError, match=r"needs the offline-gpu extra; install it with pip install"):
        prepare_process()
