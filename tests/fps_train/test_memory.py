"""What stays on a device is known before weights are read, and what doesn't fit is refused then."""

import dataclasses

import jax
import pytest

from fps_jax.checkpoints.runs import read_run
from fps_train import memory
from fps_train.config import LoraOptions
from fps_train.loop import train
from fps_train.memory import check_memory, device_bytes, kept_bytes, shard_bytes
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
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: one - 1)
    train(dataclasses.replace(options, mesh="fsdp=2"), show=False)
    before = read_run(options.output).steps()
    with pytest.raises(
        ValueError, match=r"mesh='': weights, moments and gradient take 0\.\d GB of each device, which has 0"
    ):
        train(options, resume=True, show=False)
    assert read_run(options.output).steps() == before


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
