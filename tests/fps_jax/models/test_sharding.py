"""Meshes over the devices of several nodes, and what of real models they cut. Steps on meshes: tests/fps_train/test_mesh.py."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from fps_jax.config import WAN_T2V_1_3B, WAN_T2V_14B
from fps_jax.mesh import AXES
from fps_jax.models.dit import build_dit
from fps_jax.models.params import abstract_params
from fps_jax.models.sharding import make_mesh, undivided


@dataclass(frozen=True)
class Device:
    """As GPUs of several processes are numbered."""

    process_index: int
    id: int


def nodes(count: int, each: int) -> list[Device]:
    """In no order."""
    return [Device(node, 2048 * node + i) for i in reversed(range(each)) for node in reversed(range(count))]


@pytest.mark.parametrize(
    ("sizes", "inside"),
    [
        ({"fsdp": 2, "context": 8}, {"context"}),
        ({"fsdp": 4, "context": 4}, {"context"}),
        ({"data": 2, "fsdp": 2, "context": 2, "tensor": 2}, {"fsdp", "context", "tensor"}),
        ({"fsdp": 2, "context": 4, "tensor": 2}, {"context", "tensor"}),
        ({"context": 16}, set()),
    ],
)
def test_the_last_axes_lie_inside_a_node(monkeypatch, sizes, inside):
    """Of two nodes of eight; along those axes all devices are of one process, and neighbours follow each other."""
    monkeypatch.setattr(jax, "devices", lambda: nodes(2, 8))
    grid = make_mesh(sizes).devices
    assert [device.id for device in grid.flat] == [*range(8), *range(2048, 2056)]
    for number, axis in enumerate(AXES):
        if sizes.get(axis, 1) == 1:
            continue
        first = grid.take([0], number)
        stays = all(
            device.process_index == other.process_index
            for k in range(sizes[axis])
            for device, other in zip(grid.take([k], number).flat, first.flat, strict=True)
        )
        assert stays == (axis in inside), axis


def test_devices_that_stay_idle_in_another_process_are_no_mesh(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: nodes(2, 2))
    with pytest.raises(
        ValueError, match="mesh='fsdp=2' takes 2 devices and there are 4 in 2 processes; fsdp=4 takes all of"
    ):
        make_mesh({"fsdp": 2})


@pytest.mark.parametrize(
    ("config", "sizes", "want"),
    [
        (WAN_T2V_14B, {"fsdp": 12}, (("fsdp",), 5120)),
        (WAN_T2V_14B, {"fsdp": 8, "context": 8}, None),
        (WAN_T2V_1_3B, {"fsdp": 20, "context": 2}, (("fsdp", "context"), 1536)),
        (WAN_T2V_1_3B, {"fsdp": 48, "tensor": 2}, None),
        (WAN_T2V_1_3B, {"tensor": 3}, (("tensor",), 8960)),
    ],
)
def test_meshes_that_leave_a_real_model_s_matrices_whole_are_known(config, sizes, want):
    mesh: Any = SimpleNamespace(shape=dict.fromkeys(AXES, 1) | sizes)  # more devices than there are here
    assert undivided(abstract_params(build_dit(config.dit)), mesh) == want
