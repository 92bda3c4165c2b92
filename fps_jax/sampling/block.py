"""A block of a stream: where its session was before, as it is begun, and as it is handed out."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt8


class Block(NamedTuple):
    """What a stream yields.

    Attributes:
      index: of the block in the stream, from 0.
      frames: the video's next frames: of the first latent frame of a video 1, of each other 4.
      latents: normalised.
      prompt: that the block was made by.
      seconds: what each stage took, by its name: 'denoise' (all steps, and the pass that fills the cache) and 'decode'. With
        `ahead` they run beside each other: 'denoise' from its beginning on, and of 'decode' what was waited for.
      given: it was not made, but is of the frames that the stream was given.
    """

    index: int
    frames: UInt8[np.ndarray, "T H W 3"]
    latents: Float[np.ndarray, "16 m H/8 W/8"]
    prompt: str
    seconds: dict[str, float]
    given: bool = False


class Place(NamedTuple):
    """Where a session is: what a block that is begun changes of it, and of its rollout."""

    next_frame: int
    made: int
    index: int
    finished: list[tuple[int, Array | np.ndarray]]
    given: np.ndarray | None


@dataclasses.dataclass
class Begun:
    """A block that the device was told to make, and that is counted, until its frames are handed out.

    Attributes:
      frames: how many of the video.
      started, seconds: when its denoising began, and what that took; None while it isn't known to be done.
      before: where the session was.
      decoding: what the device decodes of it, by latent frame.
    """

    index: int
    latents: Array | np.ndarray
    prompt: str
    given: bool
    frames: int
    started: float
    before: Place
    seconds: float | None
    decoding: dict[int, Array] = dataclasses.field(default_factory=dict)
