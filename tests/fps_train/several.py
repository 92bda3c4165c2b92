"""Processes of one run on this machine, as tests start, watch and end them."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from tests.fps_train.one_of_several import JOINED

ROOT = pathlib.Path(__file__).parents[2]
# Seconds. A busy machine takes minutes to compile what takes seconds alone.
PATIENCE = 600
_SLURM_PORTS = 65536 - 4096  # from here on; the job's number tells which


def free_port(least: int = 0) -> int:
    """A port that nothing listens on here; least: and that isn't below it."""
    for port in range(least, 65536) if least else [0]:
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    raise AssertionError("no port is free")


class Several:
    """Processes of one run: fps-train with these arguments each, and what tells them of each other.

    slurm: that is the environment of a step of two nodes, a process each, in place of arguments.
    """

    def __init__(
        self, folder: pathlib.Path, *arguments: list[str], count: int = 0, timeout: int = PATIENCE, slurm: bool = False
    ):
        folder.mkdir()
        port = free_port(_SLURM_PORTS if slurm else 0)
        paths = os.pathsep.join(str(ROOT / part) for part in ("", "train", "convert"))
        environment = os.environ | {
            "PYTHONPATH": paths,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.processes, self.folder = [], folder
        for number, own in enumerate(arguments):
            number = number if len(arguments) > 1 else count - 1  # alone, the last of `count`
            with (folder / f"out{number}").open("wb") as out, (folder / f"err{number}").open("wb") as err:
                command = [
                    sys.executable, "-m", "tests.fps_train.one_of_several", *own, f"--hosts.timeout={timeout}"
                ]  # fmt: skip
                if slurm:
                    environment |= {
                        "SLURM_JOB_ID": str(4096 * 5 + port - _SLURM_PORTS), "SLURM_STEP_NODELIST": "127.0.0.1,node2",
                        "SLURM_NTASKS": str(len(arguments)), "SLURM_PROCID": str(number), "SLURM_LOCALID": "0",
                        "JAX_LOCAL_DEVICE_IDS": "0,1",
                    }  # fmt: skip
                else:
                    command += [
                        f"--hosts.process-id={number}", f"--hosts.coordinator-address=127.0.0.1:{port}",
                        f"--hosts.num-processes={count or len(arguments)}",
                    ]  # fmt: skip
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Exit statuses."""
        until = time.monotonic() + seconds
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def until_step(self, run: pathlib.Path, step: int) -> None:
        """Waits until the run has done that step."""
        until = time.monotonic() + PATIENCE
        while max(steps(run), default=0) < step:
            assert all(p.poll() is None for p in self.processes), self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.1)

    def said(self) -> list[str]:
        """What each wrote to stderr."""
        time.sleep(0.3)  # the last words come through a process of their own
        return [file.read_text() for file in sorted(self.folder.glob("err*"))]

    def told(self) -> dict[tuple[str, int], set[str]]:
        """What `one_of_several` says, of all processes."""
        found: dict[tuple[str, int], set[str]] = {}
        for file in self.folder.glob("out*"):
            for what, step, value in re.findall(
                r"^(saved|average|restored|read) (\d+) (\w+)$", file.read_text(), re.MULTILINE
            ):
                found.setdefault((what, int(step)), set()).add(value)
        return found


def own_lines(said: str) -> list[str]:
    """Of stderr, without that it starts, which a busy machine hears, and that it has joined."""
    return re.sub(rf"^(starting \.\.\. \d+ s\n|{JOINED})", "", said, flags=re.MULTILINE).splitlines()


def steps(run: pathlib.Path) -> dict[int, dict]:
    """The lines of a run's steps, as far as they are written."""
    file = pathlib.Path(run) / "metrics.jsonl"
    content = file.read_text() if file.exists() else ""
    lines = map(json.loads, content[: content.rfind("\n") + 1].splitlines())
    return {line["step"]: line for line in lines if "loss" in line}
