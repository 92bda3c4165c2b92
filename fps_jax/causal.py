"""Block diffusion: what a causal model makes at a time, in how many steps, and which earlier frames it sees.

Sources: guandeh17/Self-Forcing (arXiv 2506.08009) configs/self_forcing_dmd.yaml; tianweiy/CausVid (arXiv 2412.07772)
configs/wan_causal_dmd.yaml. Frames are latent frames throughout.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fps_jax.choices import CausalPreset


@dataclass(frozen=True, kw_only=True)
class CausalConfig:
    """How a causal model makes video, block after block. Which of these a model was trained for is in none of its weights.

    Attributes:
      frames_per_block: n, latent frames that are denoised together; each sees the others, before and after it.
      steps: the timesteps that a block is denoised at, falling, in (0, 1000].
      shift: of the noise levels.
      warp: steps are places on the even grid, before the shift (1000, 937.5, ... of 1000, 750, ... at shift 5); else they are what
        the model is told, and each stands for the nearest of the 1000 shifted levels.
      window: W, latent frames that a block may attend, its own and the sink's among them; None for all.
      sink: S, the first latent frames of the video, attended for ever.
      first_frame_alone: the first block has a single frame.
      context_noise: the timestep that the model is told when a finished block's keys and values are computed.
    Raises: ValueError that names the field, its value and the rule.
    """

    frames_per_block: int = 3
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    window: int | None = None
    sink: int = 0
    first_frame_alone: bool = False
    context_noise: float = 0.0

    def __post_init__(self):
        if not _is_whole(self.frames_per_block) or self.frames_per_block < 1:
            raise ValueError(f"frames_per_block={self.frames_per_block!r} is not a whole number of 1 or more")
        self._check_steps()
        for name in ("warp", "first_frame_alone"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not True or False")
        if not _is_number(self.context_noise) or not 0 <= self.context_noise < 1000:
            raise ValueError(
                f"context_noise={self.context_noise!r} is not a timestep in [0, 1000); 0 says that blocks are clean"
            )
        self._check_window()

    def _check_steps(self) -> None:
        if not _is_number(self.shift) or self.shift <= 0:
            raise ValueError(f"shift={self.shift!r} is not a positive number; Self-Forcing uses 5, CausVid 8")
        steps = self.steps
        if not isinstance(steps, tuple | list) or not steps or not all(_is_number(s) and 0 < s <= 1000 for s in steps):
            raise ValueError(f"steps={steps!r} is not a list of timesteps in (0, 1000]; the closing 0 is left out")
        object.__setattr__(self, "steps", tuple(steps))
        if any(b >= a for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps={list(steps)} don't fall; each must be below the last")
        if self.warp and not all(float(step).is_integer() for step in self.steps):
            raise ValueError(
                f"steps={list(steps)} with warp=True are places on a grid of 1000, whole numbers; "
                "give warp=False for what the model is told"
            )

    def _check_window(self) -> None:
        n, window, sink = self.frames_per_block, self.window, self.sink
        if window is not None and (not _is_whole(window) or window < 1):
            raise ValueError(
                f"window={window!r} is not a whole number of latent frames; None attends all (upstream's -1)"
            )
        if not _is_whole(sink) or sink < 0:
            raise ValueError(f"sink={sink!r} is not a whole number of latent frames, 0 or more")
        if window is None:
            if sink:
                raise ValueError(f"sink={sink} without a window: all frames are attended; give a window, or sink=0")
            return
        if window < n:
            raise ValueError(
                f"window={window} is less than frames_per_block={n}, and a block attends itself; use {n} or more"
            )
        if window - sink < n:
            raise ValueError(
                f"window={window} counts the sink={sink} and the block of {n} frames; use window={sink + n} or more, "
                f"or a sink of {window - n} or less"
            )

    @property
    def slot_frames(self) -> int:
        """Latent frames that enter and leave a cache together: the most of which blocks, window and sink are multiples."""
        sizes = [self.frames_per_block, self.window or 0, self.sink, int(self.first_frame_alone)]
        return math.gcd(*sizes)

    def block(self, start: int) -> tuple[int, int]:
        """(first frame, end) of the block that starts at a frame. Raises ValueError where none does."""
        n, alone = self.frames_per_block, self.first_frame_alone
        if start < 0 or ((start - alone) % n and not (alone and start == 0)):
            raise ValueError(f"no block starts at latent frame {start}; {self._rule} come before it")
        return start, start + (1 if alone and start == 0 else n)

    def blocks(self, num_frames: int) -> tuple[tuple[int, int], ...]:
        """(first frame, end) of each block of so many latent frames.

        Raises: ValueError where blocks don't end there.
        """
        self.check_frames(num_frames)
        return tuple(self._up_to(num_frames))

    def _up_to(self, num_frames: int) -> Iterator[tuple[int, int]]:
        end = 0
        while end < num_frames:
            block = self.block(end)
            end = block[1]
            yield block

    def check_frames(self, num_frames: Any, name: str = "latent frames") -> None:
        """Raises ValueError where so many latent frames, 1 or more, are no whole blocks."""
        n, alone = self.frames_per_block, int(self.first_frame_alone)
        if _is_whole(num_frames) and num_frames >= 1 and (num_frames - alone) % n == 0:
            return
        if not _is_whole(num_frames) or num_frames < 1:
            raise ValueError(f"{name}={num_frames!r} is not a whole number of 1 or more")
        less = (num_frames - alone) // n * n + alone
        use = f"use {less} or {less + n}" if less >= 1 else f"use {less + n}"
        raise ValueError(f"{name}={num_frames} are no whole blocks: {self._rule}; {use}")

    @property
    def _rule(self) -> str:
        blocks = f"k blocks of frames_per_block={self.frames_per_block}"
        return f"one frame and {blocks}" if self.first_frame_alone else blocks

    def words(self) -> str:
        """For people: "blocks of 3 latent frames, denoised at 1000 750 500 250 (shift 5, warped), attending all frames"."""
        sink = f", the first {self.sink} among them" if self.sink else ""
        seen = "all frames" if self.window is None else f"{self.window} frames{sink}"
        alone = ", the first frame alone" if self.first_frame_alone else ""
        noise = f", context noise {self.context_noise:g}" if self.context_noise else ""
        steps = " ".join(f"{step:g}" for step in self.steps)
        return (
            f"blocks of {self.frames_per_block} latent frames{alone}, denoised at {steps} (shift {self.shift:g}"
            f"{', warped' if self.warp else ''}), attending {seen}{noise}"
        )

    def attended(self, end: int) -> tuple[int, ...]:
        """The latent frames that a block ending at `end` attends, its own among them, rising."""
        if self.window is None or end <= self.window:
            return tuple(range(end))
        return (*range(self.sink), *range(end - (self.window - self.sink), end))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def preset_name(causal: CausalConfig) -> CausalPreset | None:
    """The preset that this is; None for none of them."""
    return next((name for name, preset in CAUSAL_PRESETS.items() if preset == causal), None)


CAUSAL_PRESETS: dict[CausalPreset, CausalConfig] = {
    # guandeh17/Self-Forcing configs/self_forcing_dmd.yaml and default_config.yaml: DMD and SiD models.
    "self-forcing": CausalConfig(),
    # tianweiy/CausVid configs/wan_causal_dmd.yaml: what the model is told, looked up among the levels.
    "causvid-3": CausalConfig(steps=(1000, 757, 522), shift=8.0, warp=False),
    # tianweiy/CausVid configs/wan_causal_dmd_warp_4step_cfg2.yaml.
    "causvid-4": CausalConfig(shift=8.0),
}
