"""What a model of the world knows: samples of captions, read by the checker.

    python -m benchmarks.claim.judge MODEL --clips 96 --output outputs/judged

samples captions of combinations that training never saw and says how many of their facts come true. MODEL: a run or a checkpoint.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Bool, UInt8

from benchmarks.claim import checker, world
from benchmarks.claim.strips import FACTS, Strip, strips, verdict
from benchmarks.record import write
from fps_jax.choices import Setting
from fps_jax.errors import parse, run_cli
from fps_jax.files import check_folder

_RESAMPLES = 2000


@dataclass(frozen=True)
class Judged:
    """Clips, what they should show, and which of `FACTS` each got right."""

    facts: tuple[world.Facts, ...]
    captions: tuple[str, ...]
    videos: UInt8[np.ndarray, "N F H W 3"]
    right: Bool[np.ndarray, "N 5"]

    @property
    def whole(self) -> Bool[np.ndarray, "N"]:
        """Clips with everything right."""
        return self.right.all(1)

    def record(self) -> dict[str, Any]:
        """Shares, with 95% intervals of the bootstrap over clips, and the share of each kind of motion."""
        motions = np.array([facts.motion for facts in self.facts])
        motion_right = self.right[:, FACTS.index("motion")]
        return {
            "clips": len(self.facts),
            "attributes": share(self.right[:, :4].mean(1)),
            "whole": share(self.whole),
            **{name: share(self.right[:, i]) for i, name in enumerate(FACTS)},
            "motions": {name: round(float(motion_right[motions == name].mean()), 4) for name in world.MOTIONS
                        if (motions == name).any()},
        }  # fmt: skip


def share(right: np.ndarray) -> dict[str, Any]:
    """Mean and its interval."""
    right = np.asarray(right, np.float64)
    return {"right": round(float(right.mean()), 4), "interval": interval(right, 4)}


def interval(values: np.ndarray, digits: int) -> list[float]:
    """95% interval of the mean, by the bootstrap over the first axis."""
    picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    return [round(float(q), digits) for q in np.quantile(values[picks].mean(1), [0.025, 0.975])]


def captions(count: int, seed: int, held_out: bool = True) -> tuple[tuple[world.Facts, ...], tuple[str, ...]]:
    """Facts and a wording of each, `count` of them."""
    drawn = []
    for index in range(count):
        rng = np.random.default_rng([seed, index, int(held_out)])
        facts = world.draw(rng, held_out)
        drawn.append((facts, world.caption(facts, rng)))
    facts, texts = zip(*drawn, strict=True)
    return facts, texts


def judge(facts: Sequence[world.Facts], texts: Sequence[str], videos: Any) -> Judged:
    """Reads clips. A caption that leaves the background out leaves it free. videos: as for `video_to_uint8`, with a batch axis."""
    from fps_jax.media.video import video_to_uint8

    videos = np.stack([video_to_uint8(video) for video in videos])
    told = [dataclasses.replace(f, background=world.parse(t).background) for f, t in zip(facts, texts, strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
    scores = [checker.score(f, checker.read(video)) for f, video in zip(told, videos, strict=True)]
    right = np.array([[score[name] for name in FACTS] for score in scores])
    return Judged(tuple(told), tuple(texts), videos, right)


def write_strips(judged: Judged, path: pathlib.Path, count: int = 16) -> None:
    """A png of the first clips: a strip each under its caption."""
    shown = zip(judged.captions[:count], judged.videos[:count], judged.right[:count], strict=True)
    strips([(text, [Strip("", video, verdict(right))]) for text, video, right in shown], path)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Sample captions of the world from a model and let the checker read the clips."""

    model: Annotated[str, tyro.conf.Positional]
    """A run or a checkpoint."""
    output: pathlib.Path
    """Folder to write judged.json and strips.png into."""
    clips: int = 96
    """How many captions."""
    seed: int = 100
    """Of captions and noise."""
    trained: bool = False
    """Captions of combinations that training saw, in place of held-out ones."""
    batch_size: int = 16
    """Clips sampled at a time."""
    steps: int = 12
    """Denoising steps."""
    guidance_scale: float = 2.5
    """Guidance."""
    attention: Setting | None = None
    """As for fps-sample."""
    schedule: str | None = None
    """As for fps-sample."""
    dtype: str = "float32"
    """Compute dtype."""
    publish: str | None = None
    """Name of a file in benchmarks/results that gets the numbers too."""


def check(options: Any) -> None:
    """Raises ValueError for numbers that no measurement has, OSError for an output that can't be made: before anything is loaded.

    options: has clips, batch_size, seed and output.
    """
    for name, least, most in (("clips", 1, 100_000), ("batch_size", 1, 4096), ("seed", 0, 2**32 - 1)):
        if not least <= getattr(options, name) <= most:
            raise ValueError(f"{name}={getattr(options, name)} is not in {least} to {most}")
    check_folder(options.output, "output")


def sample(options: Judge, facts: Sequence[world.Facts], texts: Sequence[str], pipe: Any = None) -> Judged:
    """Samples and reads. Sample i has noise of seed `options.seed` + i, whatever the batch."""
    from fps_jax.sampling.pipeline import WanPipeline

    pipe = pipe or WanPipeline.from_pretrained(options.model, dtype=options.dtype)
    videos = []
    for first in range(0, len(texts), options.batch_size):
        some = list(texts[first : first + options.batch_size])
        missing = options.batch_size - len(some)
        videos.extend(
            pipe(
                some + some[-1:] * missing,  # one program
                negative_prompt="",
                height=world.HEIGHT,
                width=world.WIDTH,
                num_frames=world.FRAMES,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                batch_guidance=True,
                seed=options.seed + first,
                attention=options.attention,
                schedule=options.schedule,
            )[: len(some)]
        )
    return judge(facts, texts, videos)


def _main(arguments: list[str]) -> None:
    options = parse(Judge, arguments, prog="python -m benchmarks.claim.judge")
    check(options)
    from fps_jax.compilation import enable_compilation_cache
    from fps_jax.files import write_json

    enable_compilation_cache()
    facts, texts = captions(options.clips, options.seed, not options.trained)
    judged = sample(options, facts, texts)
    options.output.mkdir(parents=True, exist_ok=True)
    record = judged.record()
    write_json(dataclasses.asdict(options) | {"output": str(options.output)} | record, options.output / "judged.json")
    write_strips(judged, options.output / "strips.png")
    if options.publish:
        write(
            options.publish,
            {"model": pathlib.Path(options.model).name, "attention": options.attention or "own", **record},
        )
    shares = ", ".join(f"{name} {record[name]['right']:.3f}" for name in ("attributes", "whole", *FACTS))
    print(f"{options.clips} clips: {shares}; motions {record['motions']}")


if __name__ == "__main__":
    sys.exit(run_cli(_main))
