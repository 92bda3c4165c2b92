"""What a stream will be, known and checked before a checkpoint's weights are read."""

import dataclasses
from numbers import Integral
from typing import Any

from fps_jax.attention.cache import CacheLayout
from fps_jax.causal import CAUSAL_PRESETS, CausalConfig
from fps_jax.choices import CausalPreset, KVCacheFormat, check_choice, check_text
from fps_jax.config import WanConfig, check_preset_size
from fps_jax.sampling.request import Request
from fps_jax.sizes import Shape3, check_integer, latent_grid, token_grid

TRAINED_FRAMES = 21  # latent frames of the videos that Self-Forcing and CausVid were trained on


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """What a stream will be, known from a checkpoint's config before its weights are read.

    Attributes:
      latent_shape: of one latent frame, `(1, 16, 1, H/8, W/8)`.
      layout: of the cache.
    """

    latent_shape: tuple[int, ...]
    layout: CacheLayout

    @classmethod
    def build(
        cls,
        config: WanConfig,
        causal: CausalConfig,
        prompt: str,
        *,
        seed: int = 0,
        blocks: int | None = None,
        given: int = 0,
        size: tuple[int | None, int | None] = (None, None),
        tile: Shape3 | None = None,
        window: tuple[int, int] | None = None,
        kv_cache: KVCacheFormat = "same",
    ) -> "StreamPlan":
        """Checks the arguments of `CausalPipeline.session`. Raises ValueError as that does.

        Args:
          given: latent frames that come before the blocks that are made.
          size: height and width.
        """
        if blocks is not None and (not isinstance(blocks, Integral) or isinstance(blocks, bool) or blocks < 1):
            raise ValueError(f"blocks={blocks!r} is not a whole number of 1 or more; None is a stream without end")
        check_prompt(prompt)
        check_integer("seed", seed)
        check_choice("kv_cache", kv_cache, KVCacheFormat)
        for name, sizes in (("tile", tile), ("window", window)):
            for n in () if sizes is None else sizes:
                check_integer(name, n)
        request = Request(prompt=prompt, seed=seed, height=size[0], width=size[1], num_frames=1).filled(config)
        assert request.height is not None
        assert request.width is not None
        num_frames = None
        if blocks is not None:
            alone = int(causal.first_frame_alone and not given)
            num_frames = given + causal.frames_per_block * (int(blocks) - alone) + alone
        elif causal.window is None:
            n = causal.frames_per_block
            causal = dataclasses.replace(causal, window=max(TRAINED_FRAMES // n, 2) * n)
        latent_shape = (1, config.dit.out_channels, *latent_grid(int(request.height), int(request.width), 1))
        space = token_grid(latent_shape[2:], config.dit.patch_size)[1:]
        scales = 1 if kv_cache == "fp8" else None
        layout = CacheLayout.build(
            causal, space, num_frames=num_frames, tile=tile, window=window, scales_per_tile=scales
        )
        return cls(latent_shape, layout)


def causal_of(config: WanConfig, causal: CausalConfig | CausalPreset | None) -> CausalConfig:
    """How a checkpoint of this config makes its blocks: as `causal` says, or as the checkpoint itself does.

    Raises: ValueError where neither says it, for a model that isn't t2v, and for the name of a preset that is of a smaller model.
    """
    preset = causal if isinstance(causal, str) else None
    if preset is not None:
        check_choice("causal", preset, CausalPreset)
        causal = CAUSAL_PRESETS[preset]
    if causal is not None and not isinstance(causal, CausalConfig):
        raise ValueError(f"causal={causal!r} is not a CausalConfig or the name of a preset")
    if config.task != "t2v":
        raise ValueError(f"this is a {config.task} model; block diffusion is for t2v models")
    if preset is not None:
        check_preset_size(preset, config.dit)
    causal = causal or config.causal
    if causal is None:
        names = " or ".join(f"causal={name!r}" for name in CAUSAL_PRESETS)
        raise ValueError(f"this checkpoint doesn't say how it makes blocks; give {names}, or a CausalConfig (--preset)")
    return causal


def check_prompt(prompt: Any) -> None:
    """Raises ValueError for what is no text, or an empty one."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt={prompt!r} is not a text; give a few words")
    check_text("prompt", prompt)
