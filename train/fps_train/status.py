"""How far a run is, on stderr: a bar on a terminal, a line now and then in a log."""

import contextlib
import sys
import time
from typing import Any

from fps_jax.progress import LINE, LOG, WATCHED, moving, repeated, silence, still

_LATE = 4  # times the last step's seconds: what takes longer is waited for (a program that compiles, a checkpoint)


class Status:
    """Told of each step. show: False for silence, None or True for a bar on a terminal and lines elsewhere.

    In its `with` block the bar's clock goes on while nothing moves, and a log has a line of what is waited for.
    """

    def __init__(self, first: int, steps: int, show: bool | None):
        self._steps, self._bar, self._silent = steps, None, show is False
        self._start = self._began = self._since = self._told = time.monotonic()
        self._step, self._done, self._wait = first, 0, LINE
        if not self._silent and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc="train", initial=first, total=steps, dynamic_ncols=True, unit="step")
        self._alive = contextlib.ExitStack()

    def __enter__(self) -> "Status":
        if not self._silent:
            self._alive.enter_context(repeated(self._beat, 1.0 if self._bar is not None else LINE / 10))
        return self

    def __exit__(self, *_: Any) -> None:
        self._alive.close()
        if self._bar is not None:
            self._bar.close()

    def _beat(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            return
        now = time.monotonic()
        waited = now - self._since
        late = waited >= self._wait or now - self._start < WATCHED
        if late and silence(self._told) >= self._wait:
            self._told, self._wait = now, max(self._wait, still(waited))
            print(
                f"step {min(self._step + 1, self._steps)} of {self._steps} ... {waited:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def say(self, line: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif not self._silent:
            print(line, file=sys.stderr, flush=True)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """values: of the step's line in metrics.jsonl."""
        now = time.monotonic()
        if not self._done:  # compiling isn't what the other steps will take
            self._began = now - values["seconds"]
        self._done += 1
        self._step, self._since = step, now
        self._wait = moving(now - self._start, max(LINE, _LATE * values["seconds"]))
        numbers = (
            f"loss {values['loss']:.4f}, {values['seconds']:.3g} s a step, {values['tokens_per_second']:,.0f} tokens/s"
        )
        if "mfu" in values:
            numbers += f", MFU {values['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(numbers)
            return
        if self._silent or (now - self._told < moving(now - self._start, LOG) and step != self._steps):
            return
        self._told = now
        left = (now - self._began) / self._done * (self._steps - step)
        print(f"step {step} of {self._steps}: {numbers}, {_clock(left)} left", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
