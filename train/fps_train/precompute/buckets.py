"""Buckets: the sizes that clips are cut to, which clip goes into which, and the table of it."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fps_jax.config import Task
from fps_jax.media.images import cover_box
from fps_jax.sizes import Shape3, check_frame, latent_grid, most_frames
from fps_train.precompute.clips import Clip, ClipError, Dropped
from fps_train.precompute.frames import Probe

_NAMES_SHOWN = 3  # of the clips that share a reason
_MANY = 4  # buckets, from where on the table says what they cost


class Size(NamedTuple):
    """Of a bucket's videos: frames at the data's rate and pixels."""

    height: int
    width: int
    num_frames: int

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames}"

    @property
    def latent_grid(self) -> Shape3:
        return latent_grid(self.height, self.width, self.num_frames)

    @classmethod
    def parse(cls, text: str) -> "Size":
        """'480x832x81', height, width, frames. Raises ValueError for another form or a size that Wan can't make."""
        if not re.fullmatch(r"\d{1,6}x\d{1,6}x\d{1,6}", text):
            raise ValueError(f"buckets: {text!r} is not HEIGHTxWIDTHxFRAMES, as in 480x832x81")
        size = cls(*map(int, text.split("x")))
        check_frame(*size)
        return size


class Placed(NamedTuple):
    """A clip and the bucket that it is cut for.

    Attributes:
      content: hash of its file.
      kept: share of the picture that is left when it covers the size.
      cut: there are frames beyond the bucket's.
      enlarged: the picture has fewer pixels than the size.
    """

    clip: Clip
    content: str
    size: Size
    kept: float
    cut: bool
    enlarged: bool


class Rule(NamedTuple):
    """Which sizes there are.

    Attributes:
      sizes: fixed ones; or a single one whose num_frames is the largest (`exact=False`): a clip then has the largest 4k+1 frames
        up to it that are there.
      min_frames: a video shorter than that is dropped. Images are not asked.
      task: i2v and flf2v predict what follows a given frame, so images are nothing for them.
    """

    sizes: tuple[Size, ...]
    exact: bool
    min_frames: int
    fps: int
    task: Task

    @property
    def limit(self) -> int:
        """Frames of a clip that can matter."""
        return max(size.num_frames for size in self.sizes)

    def place(self, clip: Clip, content: str, probe: Probe) -> Placed:
        """The bucket that keeps most of a clip, counted in picture area times frames; the first of equal ones.

        Raises: ClipError for a clip that fits into none.
        """
        if clip.is_image and self.task != "t2v":
            raise ClipError(f"an image, and {self.task} learns what follows a frame")
        least = 1 if clip.is_image else self.min_frames
        if self.limit < least:
            raise ClipError(f"a video, and a bucket of {self.limit} is for images unless --min-frames is {self.limit}")
        if probe.frames < least:
            raise ClipError(f"shorter than {least} frames at {self.fps} fps", f"{probe.frames}")
        if self.exact:
            fitting = [size for size in self.sizes if least <= size.num_frames <= probe.frames]
        else:
            fitting = [size._replace(num_frames=most_frames(probe.frames)) for size in self.sizes]
        if not fitting:
            shortest = min(size.num_frames for size in self.sizes)
            raise ClipError(f"shorter than the shortest bucket, {shortest} frames", f"{probe.frames}")
        kept = {size: _kept(probe, size) for size in fitting}
        size = max(fitting, key=lambda size: kept[size] * size.num_frames)
        return Placed(
            clip=clip,
            content=content,
            size=size,
            kept=kept[size],
            cut=probe.longer or probe.frames > size.num_frames,
            enlarged=probe.height < size.height or probe.width < size.width,
        )


def _kept(probe: Probe, size: Size) -> float:
    # Sizes of square pixels; cover_box wants whole ones, and nothing here hangs on the fraction.
    height, width = max(1, round(probe.height)), max(1, round(probe.width))
    left, top, right, bottom = cover_box(height, width, size.height, size.width)
    return (right - left) * (bottom - top) / (height * width)


def table(placed: Sequence[Placed], dropped: Sequence[Dropped], rule: Rule, *, texts_cut: int, text_len: int) -> str:
    """What becomes of every clip, for people: a line a bucket, then what is dropped and why."""
    by_size: dict[Size, list[Placed]] = defaultdict(list)
    for size in rule.sizes if rule.exact else ():
        by_size[size] = []
    for one in placed:
        by_size[one.size].append(one)
    lines = [f"{'bucket':16} {'clips':>7} {'longer, cut':>12} {'picture cropped':>26} {'enlarged':>9}"]
    for size in sorted(by_size, reverse=True):
        group = by_size[size]
        lost = [1 - one.kept for one in group] or [0.0]
        cropped = f"{100 * sum(lost) / len(lost):.0f}% on average, {100 * max(lost):.0f}% at most"
        lines.append(
            f"{size.name:16} {len(group):7} {sum(one.cut for one in group):12} {cropped:>26} "
            f"{sum(one.enlarged for one in group):9}"
        )
    lines.append(f"kept {len(placed)} of {len(placed) + len(dropped)}; {rule.fps} frames a second")
    if texts_cut:
        lines.append(f"captions longer than {text_len} tokens, cut there: {texts_cut}")
    if dropped:
        lines += ["dropped:", *reasons(dropped)]
    if len(by_size) > _MANY and not rule.exact:
        lines.append(
            f"each of the {len(by_size)} buckets compiles programs of its own in training; --buckets keeps to a few sizes"
        )
    return "\n".join(lines)


def reasons(dropped: Iterable[Dropped]) -> list[str]:
    """A line a reason, the most frequent first: how many, and which they are."""
    by_reason: dict[str, list[Dropped]] = defaultdict(list)
    for one in dropped:
        by_reason[one.reason].append(one)
    lines = []
    for reason, group in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        names = [one.source + f" ({one.detail})" * bool(one.detail) for one in group[:_NAMES_SHOWN]]
        more = [f"and {len(group) - _NAMES_SHOWN} more"] if len(group) > _NAMES_SHOWN else []
        lines.append(f"  {len(group):6}  {reason}: {', '.join(names + more)}")
    return lines
