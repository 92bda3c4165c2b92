"""CausalPipeline: a prompt in, video out block after block, without end.

Memory is constant in the length of the video: the cache is a ring, the VAE's is of a chunk, and nothing else is kept.
"""

import dataclasses
import inspect
import os
from collections.abc import Iterator
from typing import Any

from fps_jax.causal import CausalConfig
from fps_jax.checkpoints.open import open_model
from fps_jax.choices import CausalPreset, KVCacheFormat
from fps_jax.foreign import check_no_foreign_of_stream
from fps_jax.sampling.block import Block
from fps_jax.sampling.pipeline import WanPipeline
from fps_jax.sampling.session import Session
from fps_jax.sampling.snapshot import load_session
from fps_jax.sampling.stream_plan import causal_of
from fps_jax.sizes import Shape3


@dataclasses.dataclass
class CausalPipeline:
    """A Wan2.1 checkpoint that was made causal (Self-Forcing, CausVid), and makes video block after block.

    Attributes:
      wan: the checkpoint itself.
      causal: its blocks, steps and window.
    """

    wan: WanPipeline
    causal: CausalConfig

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        causal: CausalConfig | CausalPreset | None = None,
        dtype: str = "bfloat16",
        show_progress: bool | None = None,
    ) -> "CausalPipeline":
        """Load a checkpoint.

        Args:
          path, dtype, show_progress: as of `WanPipeline.from_pretrained`.
          causal: how it makes its blocks, or the name of a preset; None for what the checkpoint says. No torch file says it.
        Raises: as `WanPipeline.from_pretrained`; ValueError where nothing says how blocks are made, the model isn't t2v, or the
          preset is of a smaller one.
        """
        model = open_model(path)
        causal = causal_of(model.config, causal)  # told before the weights are read, which can take minutes
        return cls(WanPipeline.from_pretrained(model.directory, dtype=dtype, show_progress=show_progress), causal)

    @classmethod
    def of(cls, wan: WanPipeline, causal: CausalConfig | CausalPreset | None = None) -> "CausalPipeline":
        """The same from a pipeline that is loaded. Raises ValueError as `from_pretrained`."""
        return cls(wan, causal_of(wan.config, causal))

    def save_pretrained(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write the checkpoint in our format, with how it makes its blocks: it is then loaded without `causal`.

        Raises: as `WanPipeline.save_pretrained`.
        """
        config = dataclasses.replace(self.wan.config, causal=self.causal)
        dataclasses.replace(self.wan, config=config).save_pretrained(path, overwrite=overwrite)

    def stream(self, prompt: str, *, seed: int = 0, blocks: int | None = None, **options: Any) -> Iterator[Block]:
        """The video, block after block, made as they are taken.

        Args:
          prompt, seed, blocks, options: as of `session`.
        Raises: as `session`; FloatingPointError that names block, step and layer of a NaN or inf.
        """
        return self.session(prompt, seed=seed, blocks=blocks, **options)

    def session(
        self,
        prompt: str,
        *,
        seed: int = 0,
        blocks: int | None = None,
        height: int | None = None,
        width: int | None = None,
        tile: Shape3 | None = None,
        window: tuple[int, int] | None = None,
        kv_cache: KVCacheFormat = "same",
        given: Any = None,
        **foreign: Any,
    ) -> Session:
        """A stream whose prompt may change while it runs.

        Args:
          prompt: a text.
          seed: of all noise. Noise is a function of seed, latent frame and step.
          blocks: how many to make; None for no end. A model without a window of its own then has one of 21 latent frames, as many
            as it was trained on; with `blocks` it attends all.
          height, width: pixels, multiples of 16; None for the checkpoint's own.
          tile: tokens of a tile, along frames a divisor of what enters and leaves the cache together; None for the proposed one.
          window: key tiles along rows and columns, within the frames that a block attends (FPSAttention); None for all.
          kv_cache: what is kept of the frames so far: 'same', keys and values in the compute dtype; 'fp8', their e4m3 codes and
            scales, half of bf16's bytes, and self-attention is then FP8 too.
          given: what the video begins with, and goes on from: frames `[T, H, W, 3]` (uint8, or floats in [0, 1]; another size is
            resized to cover the video's and cropped around its centre), a picture (array, PIL image or path), or latents
            `[16, f, H/8, W/8]` as `Block.latents`. They have to be whole blocks, and come out of the stream first, as the VAE
            shows them.
          foreign: names that a stream doesn't have, guidance's among them, which is distilled into the model.
        Raises: ValueError for an argument that breaks a rule; OSError for a picture that can't be read; TypeError for `foreign`.
        """
        check_no_foreign_of_stream(foreign, inspect.signature(self.session).parameters.keys() - {"foreign"})
        return Session(
            self,
            prompt,
            seed=seed,
            blocks=blocks,
            height=height,
            width=width,
            tile=tile,
            window=window,
            kv_cache=kv_cache,
            given=given,
        )

    def load_session(self, path: str | os.PathLike) -> Session:
        """A session that `Session.save` wrote, which goes on with the same bits where the weights are the same.

        Raises: FileNotFoundError; ValueError for a file that is none, is damaged, or is of another model or other settings.
        """
        return load_session(self, path)
