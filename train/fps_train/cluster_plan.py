"""What a run needs of GPUs that nobody has rented yet: bytes a device, what is sent, and how fast a step can be at best."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import jax

from fps_train.collectives import Traffic, seconds, traffic
from fps_train.config import TrainConfig
from fps_train.described import NODE, DeviceKind, described_devices
from fps_train.memory import ProgramBytes, program_bytes, shard_bytes
from fps_train.plan import peak_flops
from fps_train.programs import Programs
from fps_train.setup import Setup, abstract_start, prepare

_WORKSPACE = 0.94  # of a GPU's memory: the rest is CUDA's, NCCL's and what an allocator can't use


@dataclass(frozen=True)
class ProgramPlan:
    """One compiled program. seconds: at least, by arithmetic and by traffic.

    Attributes:
      share: of a run's microbatches; 0 for the update.
      kernels: the targets of its custom calls: cuDNN's, cuBLAS's, Pallas's.
    """

    size: ProgramBytes
    sent: tuple[Traffic, ...]
    kernels: tuple[str, ...]
    arithmetic_seconds: float = 0.0
    traffic_seconds: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class ClusterPlan:
    """A run on described devices.

    Attributes:
      state, frozen: bytes a device that stay there.
      whole_state: bytes of one copy of the state.
      gradient: bytes a device of a step's gradient.
      accumulate: microbatches of a step.
      total: bytes a device at the worst moment.
    """

    kind: DeviceKind
    devices: int
    state: int
    frozen: int
    whole_state: int
    gradient: int
    accumulate: int
    programs: dict[str, ProgramPlan] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.state + self.frozen + max(p.size.more for p in self.programs.values())

    @property
    def step_seconds(self) -> float:
        """Of a mean step, if arithmetic ran at peak and traffic at full speed, one after the other; the update moves its state."""
        micro = sum(p.share * (p.arithmetic_seconds + p.traffic_seconds) for p in self.programs.values())
        moved = 2 * self.state + self.gradient
        return self.accumulate * micro + self.programs["update"].traffic_seconds + moved / self.kind.bandwidth

    @property
    def fits(self) -> bool:
        return self.total <= _WORKSPACE * self.kind.memory


def plan_run(
    options: TrainConfig, kind: DeviceKind, count: int, say: Callable[[str], None], sizes: tuple[str, ...] = ()
) -> ClusterPlan:
    """Compiles a run's programs for `count` devices of a kind. The process is one of `fps_train.described.prepare_process`.

    sizes: of the videos, for a run whose data aren't there.

    Raises: as `prepare`; ValueError for a mesh that leaves devices idle.
    """
    devices = described_devices(kind, count)
    used = math.prod(options.mesh_sizes.values())
    if used < count:
        raise ValueError(f"mesh={options.mesh!r} takes {used} of the {count} devices; fsdp={count} takes all of them")
    with jax.default_device(devices[0]):
        setup = prepare(options, devices, sizes)
        return plan_setup(setup, kind, say)


def plan_setup(setup: Setup, kind: DeviceKind, say: Callable[[str], None]) -> ClusterPlan:
    """The same for a run that is prepared, on the devices of its mesh."""
    begun = abstract_start(setup)
    programs = Programs(setup, begun)
    programs.compile(say)
    count, axes = setup.mesh.size, dict(setup.mesh.shape)
    peak = peak_flops(setup.mesh.devices.flat[0])
    flops, shares = programs.flops(), programs.shares()
    state, params, frozen = map(shard_bytes, (begun.state, begun.state.params, (begun.frozen, begun.teacher)))
    found = {}
    for name, program in programs.compiled().items():
        text = program.as_text()
        sent = tuple(traffic(text, axes))
        found[name] = ProgramPlan(
            program_bytes(begun, name, program),
            sent,
            tuple(sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))),
            flops.get(name, 0.0) / (count * peak) if peak else 0.0,
            seconds(sent, axes, kind),
            shares.get(name, 0.0),
        )
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(begun.state))
    return ClusterPlan(kind, count, state, frozen, whole, params, setup.options.accumulate, found)


def report(plan: ClusterPlan) -> str:
    """In words, a line each."""

    def gb(size: float) -> str:
        return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

    lines = [
        f"{plan.devices} x {plan.kind.name}, described: compiled for them, not run",
        f"parameters, moments and average: {gb(plan.state)} a device"
        + (f", frozen weights {gb(plan.frozen)}" if plan.frozen else ""),
    ]
    for name, program in plan.programs.items():
        lines.append(f"{name}: {gb(program.size.temporaries)} temporary, {gb(program.size.results)} results a device")
        for row in program.sent:
            if row.sent >= 0.01 * sum(other.sent for other in program.sent):
                along = "+".join(row.axes) or "some devices"
                lines.append(f"  {row.kind} along {along}: {row.count} times, a device sends {gb(row.sent)}")
        if program.arithmetic_seconds:
            lines.append(
                f"  at least {program.arithmetic_seconds:.2f} s of arithmetic at bf16 peak, "
                f"{program.traffic_seconds:.2f} s of traffic"
            )
    if any(program.arithmetic_seconds for program in plan.programs.values()):
        times = f"{plan.accumulate} microbatch{'es' * (plan.accumulate > 1)}"
        lines.append(
            f"a step of {times}, regimes by their shares, and the update: {plan.step_seconds:.2f} s, "
            f"{1 / plan.step_seconds:.3g} steps/s, with arithmetic at peak and traffic one after the other; traffic at "
            f"{plan.kind.link / 1e9:.0f} GB/s a GPU in a node of {NODE} and {plan.kind.network / 1e9:.0f} GB/s a GPU out of it"
        )
    room = f"of {gb(plan.kind.memory)}"
    verdict = (
        "fits" if plan.fits else "does not fit: a larger fsdp or context, --remat full, or --preset lora needs less"
    )
    lines.append(f"in all {gb(plan.total)} a device {room}: {verdict}")
    return "\n".join(lines)
