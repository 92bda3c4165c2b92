"""From a video's pixels to latents to tokens: in every Wan2.1, 4 frames and 8 x 8 pixels a latent, 2 x 2 latents a token."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

Shape3 = tuple[int, int, int]  # along frames, rows and columns

PATCH = (1, 2, 2)  # latents a token
# Of latents a video: 55 times those of Wan's largest, 81 frames of 720 x 1280. A slip of the keyboard is told, not computed.
MAX_LATENTS = 2**24


def latent_grid(height: int, width: int, num_frames: int) -> Shape3:
    """Latents (F, Y, X) of a video of this size in pixels; num_frames = 4k + 1."""
    return (num_frames - 1) // 4 + 1, height // 8, width // 8


def video_size(latents: Sequence[int]) -> Shape3:
    """Height, width and frames of the video that latents (F, Y, X) are of: what `latent_grid` takes."""
    frames, rows, columns = latents
    return 8 * rows, 8 * columns, 4 * (frames - 1) + 1


def most_frames(frames: int) -> int:
    """The largest number of frames up to `frames` that Wan's VAE takes."""
    return (frames - 1) // 4 * 4 + 1


def token_grid(latents: Sequence[int], patch: Sequence[int] = PATCH) -> Shape3:
    """Tokens (F, Y, X) of so many latents (F, Y, X); the DiT's patches have `patch` latents."""
    frames, rows, columns = (n // p for n, p in zip(latents, patch, strict=True))
    return frames, rows, columns


def check_integer(name: str, value: Any) -> None:
    """Raises ValueError where the argument `name` is no whole number."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not a whole number; pass an int")


def check_integer_up_to(name: str, value: Any, most: int, why: str) -> None:
    """Raises ValueError where the argument `name` is no whole number, or above `most`; `why` explains the bound."""
    check_integer(name, value)
    if value > most:
        raise ValueError(f"{name}={_short(value)} is above {most:,}, {why}; use fewer")


def _short(value: int) -> str:
    """A number in a message: Python refuses to write one of thousands of digits."""
    return str(value) if abs(value) < 10**18 else f"{'-' if value < 0 else ''}10**18 and more"


def check_frame(
    height: int, width: int, num_frames: int, names: Sequence[str] = ("height=", "width=", "num_frames=")
) -> None:
    """Raises ValueError for a frame size or a number of frames that no Wan2.1 model makes.

    names: what a message calls them.
    """
    for name, value in zip(names, (height, width, num_frames), strict=True):
        check_integer_up_to(name.removesuffix("="), value, MAX_LATENTS, "more than any video of this model has")
    for name, value in zip(names, (height, width), strict=False):
        if value < 16 or value % 16:
            nearest = max(16, round(value / 16) * 16)
            raise ValueError(f"{name}{value} is not a positive multiple of 16 (VAE 8 x patch 2); use {nearest}")
    if num_frames < 1 or num_frames % 4 != 1:
        nearest = max(1, most_frames(num_frames + 1))
        raise ValueError(f"{names[2]}{num_frames} is not 4k+1 (Wan's VAE groups frames by 4); use {nearest}")
    count = math.prod(latent_grid(height, width, num_frames))
    if count > MAX_LATENTS:
        raise ValueError(
            f"{names[0]}{height} {names[1]}{width} {names[2]}{num_frames} makes {count:,} latents, more than {MAX_LATENTS:,} (720 "
            "x 1280 x 81 makes 302,400); use a smaller size or fewer frames"
        )
