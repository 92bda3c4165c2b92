"""`make demo`: one prompt by two small trained models, dense and with FPSAttention, from the same noise, side by side.

    python -m benchmarks.claim.demo [--prompt "a red circle moves left"] [--output outputs/demo]

The models are those of the claim (docs/claim.md): rows a and e. The checker reads both videos and says what it finds wrong.
"""

import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.claim import world
from fps_jax.choices import Dtype, check_text
from fps_jax.errors import parse, run_cli
from fps_jax.files import check_folder
from fps_jax.progress import waiting

MODELS = pathlib.Path(__file__).parents[2] / "fps_jax" / "demo_models"
PROMPT = "a blue triangle moves right on a white background"  # a combination that training never saw
NAMES = {"dense": "dense", "fps": "FPSAttention"}  # folder -> words


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Sample a prompt dense and with FPSAttention, and show both."""

    prompt: str = PROMPT
    """One of the models' world, such as: a blue triangle grows on a black background."""
    output: pathlib.Path = pathlib.Path("outputs/demo")
    """Folder for demo.mp4 (dense left), demo.png and demo.json."""
    seed: int = 0
    """Of the noise that both start from."""
    dtype: Dtype = "float32"
    """Compute dtype."""
    models: pathlib.Path = MODELS
    """Folder of the two models, dense and fps."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    sys.exit(run_cli(_main, argv))


def _main(arguments: list[str]) -> None:
    options = parse(Demo, arguments, prog="make demo")
    if not options.prompt.strip():
        raise ValueError("prompt='' is empty; leave PROMPT out for the default one")
    for name in NAMES:
        if not (options.models / name).is_dir():
            raise FileNotFoundError(
                f"models={str(options.models)!r} holds no {name!r}; benchmarks.claim.export writes it"
            )
    check_text("prompt", options.prompt)
    check_folder(options.output, "output")
    start = time.monotonic()
    from benchmarks.claim.rows import mean_density
    from fps_jax.evaluation.compare import compare, side_by_side
    from fps_jax.files import write_json
    from fps_jax.media.video import save_video
    from fps_jax.sampling.pipeline import WanPipeline
    from fps_jax.sampling.request import Request

    request = Request(prompt=options.prompt, seed=options.seed, attention="fps")
    pipes = [
        WanPipeline.from_pretrained(options.models / name, dtype=options.dtype, show_progress=True) for name in NAMES
    ]
    facts = world.parse(options.prompt)
    if facts is None:
        _tell(f"the models know no such thing, and draw what they can: {known()}")
    resolved = request.resolve(pipes[1].config, pipes[1].schedule)
    frames, height, width = (world.FRAMES, world.HEIGHT, world.WIDTH)
    _tell(f"sampling {frames} frames of {width} x {height}, twice; the first time, most of it is compiling")
    comparison = compare(pipes[0], request, other=pipes[1], tell=_tell)
    options.output.mkdir(parents=True, exist_ok=True)
    videos = {"dense": comparison.dense.video, "fps": comparison.other.video}
    with waiting("check and draw"):
        verdicts = {name: verdict(options.prompt, video) for name, video in videos.items()}
        save_video(side_by_side(comparison), options.output / "demo.mp4", fps=world.FPS)
        sheet(options.prompt, videos, verdicts, options.output / "demo.png")
    assert resolved.schedule is not None  # attention="fps" has one
    density = mean_density(resolved.schedule, len(resolved.table.sigma))
    took = time.monotonic() - start
    record = {
        "prompt": options.prompt,
        "seed": options.seed,
        "dtype": options.dtype,
        "verdicts": verdicts,
        "density": round(density, 4),
        "seconds_in_all": round(took, 1),
        **comparison.record(),
    }
    write_json(record, options.output / "demo.json")
    print(f"{options.prompt}")
    for name, words in NAMES.items():
        print(
            f"  {words:12} {'every pair of tokens' if name == 'dense' else f'{density:.0%} of them'}: {verdicts[name]}"
        )
    print(
        f"  PSNR of FPSAttention to dense: {comparison.psnr.mean():.1f} dB (another model's video of the same words, not a copy)"
    )
    print(f"  done in {took:.0f} s: {options.output / 'demo.mp4'} (dense left), {options.output / 'demo.png'}")


def known() -> str:
    """What a prompt may say, for a person."""
    tables = (world.COLOURS, world.SHAPES, world.MOTIONS, world.BACKGROUNDS)
    colours, shapes, motions, backgrounds = (", ".join(table) for table in tables)
    return f"a ({colours}) ({shapes}) that ({motions}) on a ({backgrounds}) background"


def verdict(prompt: str, video: Any) -> str:
    """What the checker finds: "right", or the facts that aren't as the prompt says; of a prompt outside the world what it sees."""
    from benchmarks.claim import checker, strips
    from fps_jax.media.video import video_to_uint8

    seen = checker.read(video_to_uint8(video))
    facts = world.parse(prompt)
    if facts is None:
        values = [f"{name} {value or 'unclear'}" for name, value in seen._asdict().items() if name != "one_object"]
        return f"the checker sees {', '.join(values)}"
    score = checker.score(facts, seen)
    return strips.verdict([score[fact] for fact in strips.FACTS])


def sheet(prompt: str, videos: dict[str, Any], verdicts: dict[str, str], path: pathlib.Path) -> None:
    """A png: a strip of frames of each video under the prompt, with its verdict."""
    from benchmarks.claim.strips import Strip, strips
    from fps_jax.media.video import video_to_uint8

    rows = [Strip(NAMES[name], video_to_uint8(video), verdicts[name]) for name, video in videos.items()]
    strips([(prompt, rows)], path)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
