"""Steps on a mesh of eight virtual devices are the steps of one. Whole runs: test_loop."""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_jax.attention.sharded import ShardedAttention, on_mesh
from fps_jax.config import DiTConfig
from fps_jax.mesh import BATCH
from fps_jax.models.dit import DENSE, build_dit, dit
from fps_jax.models.params import abstract_params, flatten, init_params
from fps_jax.models.sharding import make_mesh, param_shardings
from fps_train import programs
from fps_train.collectives import traffic
from fps_train.config import FlowOptions, OptimizerOptions
from fps_train.regimes import training_regimes
from fps_train.setup import abstract_start, prepare
from fps_train.state import Parts, init_state, state_shardings
from fps_train.step import Interval, StepOptions, gradient, update
from tests.fps_train.models import batch
from tests.reference import rel_l2

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"context": 8},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 2, "context": 2, "tensor": 2},
]
# 12 heads on 8 devices, as the 1.3B model has them.
CONFIG = DiTConfig(
    task="t2v", dim=192, mlp_dim=96, num_heads=12, num_layers=2, text_dim=12, text_len=5, in_channels=4, out_channels=4, freq_dim=32
)  # fmt: skip
# eps: no division by noise. learning_rate: what a step changes is large beside the last bits of what it changes.
OPTIMIZER = OptimizerOptions(learning_rate=1.0, warmup=1, clip=0.1, ema=0.5, eps=1e-3)
# Three tiles of (2, 4, 2): not a multiple of the context axis. In the last both axes' edges are cut.
SCHEDULE = FPSSchedule(tile=(2, 3, 4), regimes=(Regime(until=1.0, scales_per_tile=1, window=(1, 1, 1)),))


def attention(setting):
    """setting: 'dense', a schedule's, or 'centered': 'fps' with `center_k`."""
    if setting == "dense":
        return DENSE
    schedule, flow = SCHEDULE.setting("fps" if setting == "centered" else setting), FlowOptions()
    if setting == "centered":
        (regime,) = schedule.regimes
        schedule = dataclasses.replace(schedule, regimes=(dataclasses.replace(regime, center_k=True),))
    (only,) = training_regimes(schedule, flow, grid=(2, 4, 4), num_layers=2, sampling_shift=3.0, sampling_steps=10)
    return only.attention


@functools.cache
def params():
    return jax.device_get(jax.jit(functools.partial(init_params, build_dit(CONFIG)))(jax.random.key(0)))


def step(sizes, setting, **changes):
    """What a step of two microbatches changes and keeps, by name, with the losses and the gradient's norm."""
    mesh = make_mesh(sizes)
    several = mesh if mesh.size > 1 else None
    options = StepOptions(Parts(CONFIG, changes.get("dtype", "float32")), FlowOptions(), mesh=several)
    options = dataclasses.replace(options, remat=changes.get("remat", "none"))
    make = functools.partial(init_state, options=OPTIMIZER, num_steps=10)
    shardings = state_shardings(jax.eval_shape(make, params()), mesh)
    state = jax.device_put(jax.jit(make)(params()), shardings)
    whole = Interval(jnp.float32(0), jnp.float32(1))
    sums, losses = jax.tree.map(jnp.zeros_like, state.params), []
    # "dense" has a mesh of eight times a sample; what a few roundings cost "fps" was measured on eight.
    size = 4 if setting == "sparse" else 8
    for first in (0, size):
        rows = jax.device_put(batch(first, size), NamedSharding(mesh, PartitionSpec(BATCH)))
        sums, micro = gradient(
            state.params, {}, None, rows, jnp.uint32(7), whole, sums, options=options,
            attention=on_mesh(attention(setting), several),
        )  # fmt: skip
        losses.append(micro.loss)
    for path, leaf in flatten(sums):
        assert leaf.sharding.is_equivalent_to(dict(flatten(shardings.params))[path], leaf.ndim), path
    state, seen = update(state, sums, jnp.stack(losses), options=OPTIMIZER, num_steps=10, mesh=several)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert got.sharding.is_equivalent_to(want, got.ndim)
    assert state.step == 1
    (adam,) = (part for part in state.optimizer if hasattr(part, "mu"))
    found = {
        "parameters": jax.tree.map(jnp.subtract, state.params, params()),
        "average": jax.tree.map(jnp.subtract, state.ema, params()),
        "first moments": adam.mu,
        "second moments": adam.nu,
        "gradient": sums,
    }
    return jax.device_get(({name: dict(flatten(tree)) for name, tree in found.items()}, losses, seen.grad_norm))


on_one_device = functools.cache(functools.partial(step, None))


class Bar(NamedTuple):
    """Relative L2 errors: of each leaf, and of all leaves of a kind (moments say) together. scalars: of losses and norm."""

    leaf: float
    whole: float
    scalars: float = 1e-5


BARS = {
    "exact": Bar(1e-5, 1e-5),
    # A value at the middle of two numbers may fall to either side where sums are taken in another order; a few did, and so with the
    # mean of the keys, which `center_k` takes off. Measured: 7e-5 of the whole step, 1.4e-3 of the smallest leaf behind the codes.
    "FP8": Bar(5e-3, 1e-4),
    # Held against float32. On one device bf16, half a unit of which is 2e-3, moves the whole by 5.3e-3, losses and norm by 5e-4 and
    # the keys' bias, of which attention takes differences alone, by 2e-2.
    "bf16": Bar(4e-2, 8e-3, 2e-3),
}


@pytest.mark.parametrize(
    ("setting", "sizes", "changes", "bar"),
    # Data and fsdp alone leave samples whole, and attention as it is: "sparse" is "fps" without rounding there.
    [("dense", sizes, {}, "exact") for sizes in MESHES]
    + [
        ("sparse", MESHES[2], {}, "exact"),
        ("sparse", MESHES[3], {"dtype": "bfloat16", "remat": "full"}, "bf16"),
        ("sparse", MESHES[4], {"remat": "full"}, "exact"),
    ]
    + [("fps", sizes, {}, "FP8") for sizes in MESHES]
    + [("centered", MESHES[3], {}, "FP8")],
    ids=lambda value: ",".join(f"{a}={n}" for a, n in value.items()) if isinstance(value, dict) else None,
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(setting, sizes, changes, bar, capfd):
    """In float32 and without remat: what it changes of parameters and average, moments, summed gradient, losses and norm.

    AdamW with weight decay, clipping and accumulation included.
    """
    bar = BARS[bar]
    (found, losses, norm), (want, want_losses, want_norm) = step(sizes, setting, **changes), on_one_device(setting)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err, "XLA gathered what it should share out"
    assert want_norm > 10 * OPTIMIZER.clip, "clipped"
    np.testing.assert_allclose(losses, want_losses, rtol=bar.scalars)
    np.testing.assert_allclose(norm, want_norm, rtol=bar.scalars)
    for kind, leaves in want.items():
        for path, leaf in leaves.items():
            # No leaf's gradient is 0 but for rounding: the keys' biases, which all keys share, go through norms and rotations
            assert rel_l2(found[kind][path], leaf) <= bar.leaf, (kind, path)
        got, wanted = (np.concatenate([leaf.ravel() for leaf in of[kind].values()]) for of in (found, want))
        assert rel_l2(got, wanted) <= bar.whole, kind


def test_with_one_sample_a_device_weights_stay_cut_and_so_do_their_gradients(capfd):
    """Then a sample's numbers are fewer than the weights beside them, and XLA would move those, by way of whole ones: the time
    embedding's. And where all of context had the text, gradients of its keys' and values' weights were summed whole."""
    mesh = make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    # What XLA moves is a matter of sizes: as many text tokens as the real models have
    config = dataclasses.replace(CONFIG, num_layers=1, text_dim=64, text_len=512, freq_dim=256)
    shapes = abstract_params(build_dit(config))

    def on(shapes, shardings):
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=s), shapes, shardings)

    def loss(params, *inputs):
        return jnp.square(dit(config, params, *inputs, attention=on_mesh(DENSE, mesh)).velocity).mean()

    rows = NamedSharding(mesh, PartitionSpec(BATCH))
    inputs = (on(jax.ShapeDtypeStruct((2, *size), jnp.float32), rows) for size in ((4, 2, 8, 8), (), (512, 64)))
    shardings = param_shardings(shapes, mesh)
    compiled = jax.jit(jax.grad(loss), out_shardings=shardings).lower(on(shapes, shardings), *inputs).compile()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    for sums in traffic(compiled.as_text(), dict(mesh.shape)):
        if sums.kind == "all-reduce" and set(sums.axes) <= set(BATCH):  # norms and biases; XLA for CPUs scatters no sum
            assert sums.sent < 4 * config.dim**2 / mesh.shape["tensor"], "a weight's whole gradient"


@pytest.mark.parametrize("sizes", [{"context": 4, "tensor": 2}, {"fsdp": 2, "context": 4}])
@pytest.mark.parametrize("length", [8, 5], ids=["shared out", "whole"])
def test_cross_attention_on_a_mesh_is_one_device_s_whether_it_divides_the_text_or_not(sizes, length):
    many = on_mesh(DENSE, make_mesh(sizes))
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, n, 4, 16)), jnp.float32) for n in (16, length, length, 16))
    (got, got_vjp), (want, vjp) = (jax.vjp(jax.jit(one.cross), q, k, v) for one in (many, DENSE))
    for a, b in zip((got, *got_vjp(d_out)), (want, *vjp(d_out)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", ["fps", "fp8", "centered"])
def test_fp8_attention_over_context_alone_is_one_device_s_bit_for_bit(setting):
    """With `center_k` too where the mean is: of keys whose sum is exact in any order."""
    one = attention(setting)
    mesh = make_mesh({"context": 8})
    many = on_mesh(one, mesh)
    assert isinstance(many, ShardedAttention)
    assert (one.layout.num_tiles, many.layout.num_tiles) == (2, 8)
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, 32, 4, 16)), jnp.float32) for _ in range(4))
    k = jnp.round(64 * k + 100) / 64  # and something in common, that centring has a meaning

    def both(attention):
        def run(q, k, v):
            out = attention(*map(attention.layout.to_tiles, (q, k, v)), layer=jnp.int32(0), taps=None)
            return attention.layout.from_tiles(out)

        out, vjp = jax.vjp(jax.jit(run), q, k, v)
        return jax.device_get((out, *vjp(d_out)))

    got, want = both(many), both(one)
    np.testing.assert_array_equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):  # sums of the devices' parts, in another order
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", ["sparse", "fp8", "centered"])
def test_what_is_gathered_over_context_are_codes_in_fp8_and_what_is_summed_has_the_operands_dtype(setting):
    """A byte for each number of K and V, forward and backward, beside their scales; dK and dV in bf16."""
    many = on_mesh(attention(setting), make_mesh({"context": 8}))
    shape = jax.ShapeDtypeStruct((2, many.layout.num_stored, 4, 16), jnp.bfloat16)

    def run(q, k, v):
        return many(q, k, v, layer=jnp.int32(0), taps=None).astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(run, (0, 1, 2)))
    program = str(jax.make_jaxpr(gradients)(shape, shape, shape))
    found = re.findall(r":(\w+)\[([\d,]+)\]\S* = (all_gather|reduce_scatter)", program)
    whole = f"2,{many.layout.num_stored},4,16"
    gathers = [dtype for dtype, size, kind in found if kind == "all_gather" and size == whole]
    assert gathers == (["bf16"] * 2 if setting == "sparse" else ["u8"] * 4)
    assert [dtype for dtype, _, kind in found if kind == "reduce_scatter"] == ["bf16"] * 2
    if (
        setting == "centered"
    ):  # 16 bits XLA widens on a CPU, bytes it leaves; forward's and backward's gathers it makes one
        rows = traffic(gradients.lower(shape, shape, shape).compile().as_text(), dict(many.mesh.shape))
        (sent,) = [row.sent for row in rows if row.kind == "all-gather"]
        numbers, scales = math.prod(shape.shape), 2 * 4 * many.layout.num_tiles  # one of K's for a tile and head
        assert sent == 7 / 8 * (2 * numbers + 4 * scales)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "fsdp=16", "batch_size": 16}, "takes 16 devices and there are 8; fsdp=8 takes all of them"),
        ({"mesh": "tensor=4"}, "tensor=4 does not divide the model's 2 heads"),
        ({"mesh": "context=3", "attention": "dense", "schedule": None}, "context=3 does not divide the 32 tokens"),
        ({"mesh": "fsdp=6", "batch_size": 6}, "fsdp=6 does not divide the 32 rows or .* hold whole; use 4 or 8$"),
        ({"mesh": "fsdp=2,context=3"}, "fsdp=2 x context=3 = 6 does not divide the 32 rows .*; use 4 or 8$"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(options, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(options, **changes))


def test_the_peak_that_mfu_is_a_share_of_is_all_devices(options, monkeypatch):
    monkeypatch.setattr(programs, "peak_flops", lambda: 1e12)
    setup = prepare(dataclasses.replace(options, mesh="fsdp=2"))
    assert programs.Programs(setup, abstract_start(setup)).peak_flops == 2e12
