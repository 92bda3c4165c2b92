"""Which of several processes this one is, without jax: options of fps-train beside those of the run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """One of several processes that train one run together, on one host or many. Start each with the same other options."""

    detect: bool = False
    """Let JAX find coordinator, number and id: from Slurm, Open MPI, or Kubernetes (with the kubernetes package)."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, the port a free one, where the others can reach it."""
    num_processes: int | None = None
    """Processes in all."""
    process_id: int | None = None
    """Number of this one, from 0."""
    timeout: int = 300
    """Seconds that a process waits at its start until all are there."""

    def __post_init__(self):
        given = {
            "coordinator_address": self.coordinator_address,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
        }
        missing = [name for name, value in given.items() if value is None]
        if self.detect and len(missing) < 3:
            raise ValueError(
                "hosts.detect finds coordinator_address, num_processes and process_id; leave those or it out"
            )
        if 0 < len(missing) < 3:
            raise ValueError(
                f"hosts.{missing[0]} is missing; give all of coordinator_address, num_processes, process_id, or hosts.detect"
            )
        if self.timeout < 1:
            raise ValueError(f"hosts.timeout={self.timeout} is not a number of seconds; 300 is the default")
        if self.num_processes is None or self.process_id is None or self.coordinator_address is None:
            return
        if self.num_processes < 1:
            raise ValueError(f"hosts.num_processes={self.num_processes} is not a number of 1 or more")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"hosts.process_id={self.process_id} is not in 0 to {self.num_processes - 1}")
        host, _, port = self.coordinator_address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(
                f"hosts.coordinator_address={self.coordinator_address!r} is not HOST:PORT, 10.0.0.1:55527 say"
            )

    @property
    def several(self) -> bool:
        """Whether the run is shared at all."""
        return self.detect or self.num_processes is not None
