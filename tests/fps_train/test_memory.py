"""What stays on a device is known before weights are read, and what doesn't fit is refused then."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import pytest

from fps_jax.checkpoints.runs import read_run
from fps_train import loop, memory
from fps_train.checkpoints import Checkpoints
from fps_train.config import LoraOptions
from fps_train.loop import train
from fps_train.memory import check_memory, device_bytes, enough_memory, kept_bytes, program_bytes, shard_bytes
from fps_train.programs import Programs
from fps_train.setup import abstract_start, prepare, start


@pytest.mark.parametrize(
    "changes",
    [{}, {"mesh": "fsdp=2"}, {"lora": LoraOptions(rank=2), "dtype": "bfloat16"}, {"teacher_weight": 0.5}],
    ids=str,
)
def test_what_is_kept_is_what_a_start_makes_and_a_gradient(options, changes):
    setup = prepare(dataclasses.replace(options, **changes))
    begun = start(setup)
    gradient = shard_bytes(begun.state.params)
    assert kept_bytes(abstract_start(setup)) == shard_bytes((begun.state, begun.frozen, begun.teacher)) + gradient


def test_a_run_that_goes_on_on_too_few_devices_is_refused_and_left_as_it_is(options, monkeypatch):
    one = kept_bytes(abstract_start(prepare(options)))
    train(dataclasses.replace(options, mesh="fsdp=2"), show=False)
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: one - 1)
    before = read_run(options.output).steps()
    with pytest.raises(
        ValueError, match=r"mesh='': weights, moments and gradient take 0\.\d GB of each device, which has 0"
    ):
        train(options, resume=True, show=False)
    assert read_run(options.output).steps() == before


def test_a_state_that_is_restored_is_the_only_one(options, monkeypatch):
    options = dataclasses.replace(
        options, attention="dense", schedule=None, steps=1, validation=dataclasses.replace(options.validation, every=0)
    )
    train(options, show=False)
    gc.collect()
    kept, alive = shard_bytes(abstract_start(prepare(options)).state), []
    restore, before = Checkpoints.restore, sum(a.nbytes for a in jax.live_arrays())

    def watched(self, like, step):
        alive.append(sum(a.nbytes for a in jax.live_arrays()) - before)
        return restore(self, like, step)

    monkeypatch.setattr(Checkpoints, "restore", watched)
    train(dataclasses.replace(options, steps=2), resume=True, show=False)
    assert alive[0] < 0.1 * kept  # of the state that was made to have its shapes


def test_a_step_that_has_no_room_is_refused_before_it_and_the_run_goes_on_where_it_has(options, monkeypatch):
    """At the start and at --resume, by what the compiled programs take beside weights, moments and gradient."""
    options = dataclasses.replace(
        options, attention="dense", schedule=None, accumulate=1, batch_size=4, steps=1,
        validation=dataclasses.replace(options.validation, every=0),
    )  # fmt: skip
    setup = prepare(options)
    begun = abstract_start(setup)
    programs = Programs(setup, begun)
    programs.compile(lambda line: None)
    more = [program_bytes(begun, name, program).more for name, program in programs.compiled().items()]
    kept = shard_bytes((begun.state, begun.frozen, begun.teacher))
    for size, program in zip(more, programs.compiled().values(), strict=True):  # a gradient is given or made
        assert size >= shard_bytes(begun.state.params) + program.memory_analysis().temp_size_in_bytes
    most = kept + max(more)

    def has(size):
        monkeypatch.setattr(memory, "device_bytes", lambda mesh: size)

    message = (
        r"^mesh='': a step takes 0\.\d GB of each device, which has 0\.\d GB: .* \(2x4x4 tokens, dense\); use more devices along "
        "fsdp or context or --remat full or a smaller --batch-size or --preset lora$"
    )
    has(most - 1)
    with pytest.raises(ValueError, match=message):
        train(options, show=False)
    assert read_run(options.output).steps() == []
    has(most)
    train(options, resume=True, show=False)
    assert read_run(options.output).steps() == [1]
    has(most - 1)
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(options, steps=2), resume=True, show=False)
    assert read_run(options.output).steps() == [1]


def test_what_xla_finds_no_room_for_is_said_in_one_line(options, monkeypatch):
    setup = prepare(dataclasses.replace(options, remat="full", batch_size=1, lora=LoraOptions(rank=2)))
    asked = r"\(Out of memory allocating 1125899906842624 bytes\.\)"
    message = (
        rf"^mesh='': no memory left on a device, which has \d+\.\d GB {asked}; use more devices along fsdp or context$"
    )
    with pytest.raises(MemoryError, match=message), enough_memory(setup):
        jnp.zeros(2**50, jnp.uint8).block_until_ready()
    monkeypatch.setattr(loop, "start", lambda *_: jnp.zeros(2**50, jnp.uint8))
    with pytest.raises(MemoryError, match="no memory left on a device"):
        train(options, show=False)
    with pytest.raises(jax.errors.JaxRuntimeError), enough_memory(setup):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Received message larger than max (5 vs. 4)")


def test_a_cpu_s_devices_share_the_machine_and_a_gpu_says_what_it_has(options):
    setup = prepare(options)
    one, two = (device_bytes(prepare(dataclasses.replace(options, mesh=mesh)).mesh) for mesh in ("", "fsdp=2"))
    assert one is not None
    assert two == one // 2
    check_memory(setup)

    class Gpu:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    class Mesh:
        def __init__(self, *stats):
            self.local_devices = list(map(Gpu, stats))

    assert device_bytes(Mesh({"bytes_limit": 80}, {"bytes_limit": 60})) == 60  # pyright: ignore[reportArgumentType]
    assert device_bytes(Mesh(None, {})) is None  # pyright: ignore[reportArgumentType]


def test_nothing_is_read_of_weights_that_have_no_room(options, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: 1000)
    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match="use more devices along fsdp or context, or --preset lora"):
        train(options, show=False)
    assert len(jax.live_arrays()) <= before
