"""The same prompt and noise with dense attention and with another: both videos, and what tells them apart."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from fps_jax.evaluation.quality import psnr, relative_l2, ssim
from fps_jax.media.plots import COLORS, GREY, figure, save_png
from fps_jax.media.video import save_video, video_to_uint8
from fps_jax.progress import waiting
from fps_jax.sampling.pipeline import WanPipeline
from fps_jax.sampling.request import Request

AMPLIFICATION = 4  # of the difference shown
_PANEL = 320  # pixels: narrower videos are shown enlarged, so that the labels fit
_GAP = 4
_NOTES = {
    "psnr": "dB, peak 1, on the frames in float before they are encoded; null where both frames are equal",
    "ssim": "Wang et al. 2004: Gaussian window of 11 x 11, deviation 1.5, mean of the channels",
    "frames": "count from 1",
    "sampling_first_call": "seconds of prompt encoding and denoising, compilation (or loading the compiled program) included",
    "denoising_step": "seconds, mean of the steps after the first; compilation, which the first waits for, left out",
    "decoding_first_call": "seconds of the VAE; only the first of the two videos waits for its compilation",
}


@dataclass(frozen=True)
class Run:
    """One sample. `video`: floats in [0, 1]. `seconds`: see the notes in `quality.json`; None where nothing was measured."""

    latents: Float[np.ndarray, "1 16 f h w"]
    video: Float[np.ndarray, "F H W 3"]
    seconds: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """A video with dense attention and one with `attention`, and the quality of each frame of the second against the first."""

    attention: str
    dense: Run
    other: Run
    psnr: Float[np.ndarray, "F"]
    ssim: Float[np.ndarray, "F"]
    latents_relative_l2: float

    @property
    def speedup(self) -> float | None:
        """Seconds of a denoising step, dense over other; None for fewer than two steps."""
        dense, other = (run.seconds["denoising_step"] for run in (self.dense, self.other))
        return None if dense is None or not other else dense / other

    def record(self) -> dict[str, Any]:
        """The measurements, for JSON."""
        seconds = {"dense": self.dense.seconds, self.attention: self.other.seconds}
        return {
            "quality": {
                "psnr": _statistics(self.psnr, 3),
                "ssim": _statistics(self.ssim, 5),
                "latents_relative_l2": _rounded(self.latents_relative_l2, 6),
            },
            "seconds": {name: {k: _rounded(v, 4) for k, v in own.items()} for name, own in seconds.items()},
            "speedup_of_a_denoising_step": _rounded(self.speedup, 3),
            "notes": _NOTES,
        }

    def summary(self) -> str:
        """A paragraph for a person."""
        if not np.isfinite(self.psnr).any():
            return f"{self.attention} and dense attention gave the same {len(self.psnr)} frames, bit for bit."
        words = (
            f"{self.attention} against dense attention over {_count(len(self.psnr), 'frame')}: "
            f"{_words(self.psnr, 'PSNR', '.2f', ' dB')}, {_words(self.ssim, 'SSIM', '.4f')}; "
            f"the latents differ by {self.latents_relative_l2:.3g} (relative L2)."
        )
        if self.speedup is not None:
            dense, other = (run.seconds["denoising_step"] for run in (self.dense, self.other))
            words += (
                f" A denoising step took {dense:.3g} s with dense attention and {other:.3g} s with {self.attention}: "
                f"{_faster(self.speedup)} (mean of the steps after the first, compilation left out)."
            )
            if jax.default_backend() == "cpu":
                words += " These are times of a CPU, and say nothing of a GPU."
        return words


def _faster(speedup: float) -> str:
    return f"{speedup:.2f} times as fast" if speedup >= 1 else f"{1 / speedup:.2f} times slower"


def compare(
    pipe: WanPipeline,
    request: Request,
    *,
    other: WanPipeline | None = None,
    tell: Callable[[str], Any] = lambda line: None,
) -> Comparison:
    """Sample twice, dense first, and measure.

    Args:
      pipe: the model.
      request: one prompt; its attention and schedule are the second video's.
      other: the model of the second video, one that was trained with its attention say; `pipe` if left out.
      tell: called with a line about each stage.
    Raises: as `WanPipeline.__call__`, and ValueError for more than one prompt.
    """
    if not isinstance(request.prompt, str):
        raise ValueError(f"prompt={request.prompt!r} is not one text; compare one video at a time")
    # Decided once: tiles change the numbers a little, and must not in one of the two only.
    *_, rows, columns = request.resolve(pipe.config, pipe.schedule).latent_shape
    tiling = request.vae_tiling or pipe.needs_tiling(8 * rows, 8 * columns)
    request = dataclasses.replace(request, vae_tiling=tiling, output_type="latent")
    tell("1 of 2: dense attention")
    dense = _sample(pipe, dataclasses.replace(request, attention="dense", schedule=None))
    second = other or pipe
    attention = request.setting(second.schedule)
    tell(f"2 of 2: {attention}")
    run = _sample(second, request)
    tell("PSNR and SSIM")
    with waiting("PSNR and SSIM", show=pipe.show_progress):
        return Comparison(
            attention=attention,
            dense=dense,
            other=run,
            psnr=psnr(run.video, dense.video),
            ssim=ssim(run.video, dense.video),
            latents_relative_l2=relative_l2(run.latents, dense.latents),
        )


def _sample(pipe: WanPipeline, request: Request) -> Run:
    steps: list[tuple[int, float]] = []
    start = time.perf_counter()
    latents = pipe.sample(request, callback=lambda done, _: steps.append((done, time.perf_counter())))
    sampled = time.perf_counter()
    video = pipe.decode(latents, tiling=request.vae_tiling)
    seconds = {
        "sampling_first_call": sampled - start,
        "denoising_step": _seconds_a_step(steps),
        "decoding_first_call": time.perf_counter() - sampled,
    }
    return Run(latents=np.asarray(latents), video=video[0], seconds=seconds)


def _seconds_a_step(steps: list[tuple[int, float]]) -> float | None:
    """Mean over the steps after the first, which compiles. steps: (steps done, time)."""
    if len(steps) < 2:
        return None
    (first, start), (last, end) = steps[0], steps[-1]
    return (end - start) / (last - first)


def write(comparison: Comparison, folder: pathlib.Path, *, fps: float, subtitle: str = "") -> None:
    """Write dense.mp4, NAME.mp4 of the other, side_by_side.mp4 and quality.png into a folder that exists."""
    save_video(comparison.dense.video, folder / "dense.mp4", fps=fps)
    save_video(comparison.other.video, folder / f"{comparison.attention}.mp4", fps=fps)
    save_video(side_by_side(comparison), folder / "side_by_side.mp4", fps=fps)
    plot(comparison, folder / "quality.png", subtitle=subtitle)


def side_by_side(comparison: Comparison) -> UInt8[np.ndarray, "F h w 3"]:
    """Frames of dense, other, and their difference, amplified; above them what they are and the frame's quality."""
    dense, other = video_to_uint8(comparison.dense.video), video_to_uint8(comparison.other.video)
    count, height, width = dense.shape[:3]
    zoom = -(-_PANEL // width)
    height, width = height * zoom, width * zoom
    bar = 2 * max(12, round(width * 0.018))  # pixels, even for H.264
    out = np.zeros((count, bar + height, 3 * width + 2 * _GAP, 3), np.uint8)
    for i in range(count):
        difference = np.abs(dense[i].astype(np.int16) - other[i]) * AMPLIFICATION
        panels = (dense[i], other[i], np.minimum(difference, 255).astype(np.uint8))
        labels = (
            ("dense", f"frame {i + 1} of {count}"),
            (comparison.attention, _frame_quality(comparison.psnr[i], comparison.ssim[i])),
            (f"difference x {AMPLIFICATION}", ""),
        )
        for place, (panel, label) in enumerate(zip(panels, labels, strict=True)):
            columns = slice(place * (width + _GAP), place * (width + _GAP) + width)
            out[i, :bar, columns] = _label(*label, width, bar)
            out[i, bar:, columns] = panel.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return out


def _frame_quality(psnr: float, ssim: float) -> str:
    return f"{psnr:.1f} dB   SSIM {ssim:.3f}" if np.isfinite(psnr) else "equal"


def _label(left: str, right: str, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), "#202020")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=height * 0.55)
    draw.text((height * 0.4, height / 2), left, fill="white", font=font, anchor="lm")
    draw.text((width - height * 0.4, height / 2), right, fill="#c8c8c8", font=font, anchor="rm")
    return np.asarray(image)


def plot(comparison: Comparison, path: pathlib.Path, *, subtitle: str = "") -> None:
    """Write a png of PSNR and SSIM against the frame, with their means and the worst frames."""
    frames = np.arange(1, len(comparison.psnr) + 1)
    title = f"{comparison.attention} against dense attention, frame by frame"
    with figure(2, 1, height=5, title=title, subtitle=subtitle, sharex=True) as (drawing, axes):
        rows = (("PSNR, dB", comparison.psnr, ".2f"), ("SSIM", comparison.ssim, ".4f"))
        for ax, color, (name, values, form) in zip(axes[:, 0], COLORS, rows, strict=False):
            ax.set_ylabel(name)
            if not np.isfinite(values).all():  # a gap in the line
                ax.text(0.5, 0.5, "equal frames are left out", color=GREY, ha="center", transform=ax.transAxes)
                values = np.where(np.isfinite(values), values, np.nan)
            ax.plot(frames, values, color=color, marker="o" if len(frames) <= 40 else None)
            if np.isnan(values).all():
                continue
            mean, worst = np.nanmean(values), int(np.nanargmin(values))
            ax.axhline(mean, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label=f"mean {mean:{form}}")
            ax.plot(
                frames[worst], values[worst], "o", markersize=7, markerfacecolor="none", markeredgecolor=COLORS[-1],
                label=f"worst {values[worst]:{form}}, frame {frames[worst]}", linestyle="none",
            )  # fmt: skip
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
        drawing.align_ylabels()
        axes[-1, 0].set_xlabel("frame")
        axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
        save_png(drawing, path)


def _statistics(values: np.ndarray, digits: int) -> dict[str, Any]:
    worst = int(np.argmin(values))
    return {
        "mean": _rounded(values.mean(), digits),
        "worst": _rounded(values[worst], digits),
        "worst_frame": worst + 1,
        "frames": [_rounded(value, digits) for value in values],
    }


def _words(values: np.ndarray, name: str, form: str, unit: str = "") -> str:
    finite = values[np.isfinite(values)]
    equal = "" if len(finite) == len(values) else f" over the {len(finite)} frames that differ"
    worst = "" if len(values) == 1 else f" (worst {values.min():{form}}, frame {values.argmin() + 1})"
    return f"{name} {finite.mean():{form}}{unit}{equal}{worst}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _rounded(value: float | None, digits: int) -> float | None:
    """For JSON, which has neither inf nor NaN."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits)
