"""From a video's pixels to latents to tokens: in every Wan2.1, 4 frames and 8 x 8 pixels a latent, 2 x 2 latents a token."""

from collections.abc import Sequence

Shape3 = tuple[int, int, int]  # along frames, rows and columns

PATCH = (1, 2, 2)  # latents a token


def latent_grid(height: int, width: int, num_frames: int) -> Shape3:
    """Latents (F, Y, X) of a video of this size in pixels; num_frames = 4k + 1."""
    return (num_frames - 1) // 4 + 1, height // 8, width // 8


def token_grid(latents: Sequence[int], patch: Sequence[int] = PATCH) -> Shape3:
    """Tokens (F, Y, X) of so many latents (F, Y, X); the DiT's patches have `patch` latents."""
    frames, rows, columns = (n // p for n, p in zip(latents, patch, strict=True))
    return frames, rows, columns
