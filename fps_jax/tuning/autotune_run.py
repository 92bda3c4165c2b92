"""The autotuner's sweep, in processes that may hang: one for each key and kind of kernel, each config with a deadline."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pallas_kernels
from fps_jax import processes
from fps_jax.tuning.autotune import SLOW, Task, brief
from fps_jax.tuning.defaults import DEADLINE
from pallas_kernels.sm90.config import ForwardConfig
from pallas_kernels.sm90.tuned import TuningKey

CHILD = ("-P", "-m", "fps_jax.tuning.autotune")  # arguments of Python
# For the estimate of a sweep's time; guesses, and on the safe side.
_START, _COMPILE, _CALLS, _RATE = 20.0, 6.0, 12, 400e12  # s a process, s a config, calls of a config, FLOP/s


@dataclass(frozen=True)
class Group:
    """Configs of one task that run in one process.

    Attributes:
      cluster: their cluster size.
      switches: the fields of a yes or no that they have other than the default: those make another kernel.
      configs: plain ones first, so that one that hangs costs few others.
    """

    cluster: int
    switches: frozenset[str]
    configs: tuple[ForwardConfig, ...]

    def is_like(self, other: "Group") -> bool:
        """Whether this is the other's kernel, or that with more switches: what not to try once the other hung."""
        return self.cluster == other.cluster and other.switches <= self.switches

    def __str__(self) -> str:
        return " ".join([f"cluster={self.cluster}", *sorted(self.switches)])


def groups(configs: Sequence[ForwardConfig]) -> list[Group]:
    """The configs by kernel, the plainest kernel first."""
    default = asdict(ForwardConfig())

    def changed(config: ForwardConfig) -> list[str]:
        return [name for name, value in asdict(config).items() if value != default[name]]

    found: dict[tuple[int, frozenset[str]], list[ForwardConfig]] = {}
    for config in sorted(configs, key=lambda c: len(changed(c))):
        switches = frozenset(n for n in changed(config) if isinstance(default[n], bool))
        found.setdefault((config.cluster, switches), []).append(config)
    order = sorted(found, key=lambda kernel: (len(kernel[1]), kernel[0], sorted(kernel[1])))
    return [Group(*kernel, tuple(found[kernel])) for kernel in order]


def expected_seconds(tasks: Sequence[Task]) -> float:
    """A rough guess of a sweep's time, before anything is known."""
    return sum(
        _START * len(groups(task.candidates)) + len(task.candidates) * (_COMPILE + _CALLS * task.flop / _RATE)
        for task in tasks
    )


def find_device(*, deadline: float = DEADLINE) -> dict[str, Any]:
    """{'gpu': name, 'jax': version} of what the sweep will run on; looked at in another process, as this one must not hold it.

    Raises: NotImplementedError where that is no Hopper GPU, OSError where it doesn't answer.
    """
    ended = _start({"device": True}, seconds=deadline)
    if not ended.said:
        why = f"no answer in {deadline:.0f} s" if ended.timed_out else _last_line(ended.complaint)
        raise OSError(f"the GPU can't be used: {why}")
    found = ended.said[0]
    if found["missing"] is not None:
        raise NotImplementedError(
            f"fps-tune {found['missing'].split(';')[0]}; --dry-run lists what it would measure there"
        )
    return found


def run(
    tasks: Sequence[Task], *, tell: Callable[[str], None], deadline: float = DEADLINE
) -> Iterator[tuple[Task, list[dict[str, Any]]]]:
    """Measures every candidate of each task, task by task.

    A config that takes a process down with it is out, and the next process goes on after it. One that hangs (says nothing for
    `deadline` seconds) is out with all that `Group.is_like` it, in this task and in later ones.

    Args:
      tell: called with lines about the progress.
    Yields: (task, results): as `autotune.sweep` has them, or with 'failed' (why) in place of numbers, and 'hung' where it did.
    """
    progress = _Progress(tell, sum(len(task.candidates) for task in tasks))
    hung: list[Group] = []
    for number, task in enumerate(tasks, 1):
        progress.say_left()
        tell(f"key {number} of {len(tasks)}: {key_name(task.key)}: {task.plan.brief()}")
        results: list[dict[str, Any]] = []
        lost = None  # why nothing more of this task can be measured
        for group in groups(task.candidates):
            left, why = list(group.configs), lost
            if why is None and (like := next((h for h in hung if group.is_like(h)), None)):
                why = f"not run: {like} hung"
            while left and why is None:
                ended, new, begun = _run_process(task, left, results, progress, deadline)
                results += new
                left = left[len(new) :]
                if not left:
                    break
                said = f"no answer in {deadline:.0f} s" if ended.timed_out else _last_line(ended.complaint)
                # Inputs, quantization or the safe config: no config is to blame, and others would fare alike.
                if not begun:
                    why = lost = f"not run: the process didn't come to it ({said})"
                elif ended.timed_out:
                    results.append({**progress.failed(left.pop(0), f"HUNG: {said}"), "hung": True})
                    why = f"not run: {group} hung"
                    hung.append(group)
                else:
                    results.append(progress.failed(left.pop(0), f"failed: {said}"))
            results += [progress.failed(config, why or "") for config in left]
        yield task, results


def key_name(key: TuningKey) -> str:
    """'sparse, 2 scales' for people."""
    scales = "bf16" if key.scales == 0 else f"{key.scales} scale{'s' * (key.scales > 1)}"
    return f"{key.density}, {scales}"


def _run_process(
    task: Task,
    configs: Sequence[ForwardConfig],
    known: Sequence[dict[str, Any]],
    progress: "_Progress",
    deadline: float,
) -> tuple[processes.Ended, list[dict[str, Any]], bool]:
    """(how it went, results of the first configs, whether the one after those had begun)."""
    results: list[dict[str, Any]] = []
    starts = 0

    def hear(said: dict[str, Any]) -> None:
        nonlocal starts
        if "starting" in said:
            starts += 1
        else:
            results.append(said)
            progress.measured(said)

    times = [r["seconds"] for r in known if r["ok"]]
    asked = {
        "task": asdict(task),
        "configs": [asdict(config) for config in configs],
        "best": min(times) if times else None,
    }
    ended = _start(asked, silence=deadline, hear=hear)
    return ended, results, starts > len(results)


class _Progress:
    """Counts configs and says how each went."""

    def __init__(self, tell: Callable[[str], None], total: int):
        self.tell, self.total, self.done = tell, total, 0
        self.start = time.monotonic()

    def say_left(self) -> None:
        if self.done:
            left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
            self.tell(f"about {math.ceil(left / 60)} min left")

    def measured(self, result: dict[str, Any]) -> None:
        if not result["ok"]:
            outcome = f"WRONG: relative L2 {_number(result['rel_l2_safe'])} from the safe config's output"
        elif result.get("slow"):
            outcome = f"{result['seconds'] * 1e3:9.3f} ms in a short try, {SLOW} times the best or more"
        else:
            outcome = f"{result['seconds'] * 1e3:9.3f} ms {result['tflops']:6.0f} TFLOP/s"
        self._say(ForwardConfig(**result["config"]), outcome)

    def failed(self, config: ForwardConfig, why: str) -> dict[str, Any]:
        """The result of a config that has none."""
        self._say(config, why)
        return {"config": asdict(config), "ok": False, "failed": why}

    def _say(self, config: ForwardConfig, outcome: str) -> None:
        self.done += 1
        self.tell(f"[{self.done:3}/{self.total}] {brief(config):30} {outcome}")


def _number(value: float | str) -> str:
    """What isn't finite came as a word."""
    return value if isinstance(value, str) else f"{value:.1e}"


def _start(asked: dict[str, Any], **limits: Any) -> processes.Ended:
    root = str(pathlib.Path(pallas_kernels.__file__).parents[1])  # the child imports what this process did
    return processes.run(
        [sys.executable, *CHILD, json.dumps(asked)],
        environment={
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "TF_CPP_MIN_LOG_LEVEL": "2",
        },
        **limits,
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it ended without a word"
