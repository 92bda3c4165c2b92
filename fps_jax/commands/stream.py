"""fps-stream: an endless video from a causal model, written while it is made."""

import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from fps_jax.choices import Switch, check_fps, check_text, choices, strongest
from fps_jax.commands.options import StreamOptions, causal_config, check_output
from fps_jax.commands.profiled import profiled
from fps_jax.errors import parse, run_cli
from fps_jax.files import MAX_JSON, check_regular
from fps_jax.progress import Quiet, waiting

if TYPE_CHECKING:
    from fps_jax.media.fragments import FragmentWriter
    from fps_jax.sampling.block import Block
    from fps_jax.sampling.session import Session

_LATEST = 1e9  # seconds of video, 30 years: what is later was meant otherwise


@dataclass(frozen=True, kw_only=True)
class Stream(StreamOptions):
    """Make a video block after block from a causal Wan2.1 checkpoint (Self-Forcing, CausVid), and write it as it is made."""

    prompt: str
    """What the video shows."""
    output: pathlib.Path = pathlib.Path("out.mp4")
    """The file to write, .mp4. It plays at every moment, up to what was written last."""
    overwrite: bool = False
    """Replace the output, if it exists, once the first block is made."""
    blocks: int | None = None
    """How many blocks to make; left out, the video goes on until Ctrl-C."""
    script: pathlib.Path | None = None
    """A JSON file of other prompts: [{"at": 12.5, "prompt": "...", "how": "continue"}, ...], at in seconds of video, rising; how is
    continue (the default), recache or cut."""
    image: pathlib.Path | None = None
    """A picture that the video begins with, where the model's first block is one frame (--first-frame-alone)."""
    video: pathlib.Path | None = None
    """A clip that the video begins with, and goes on from."""
    video_frames: int | None = None
    """How many of the clip's frames, the last ones, at --fps; all if left out. Whole blocks: 9, 21, 33, ... for Self-Forcing's."""
    profile: pathlib.Path | None = None
    """A new folder for where the time goes: profile.html to look at, profile.json, and a trace of jax.profiler. Blocks are then
    made in turn, where else one begins while the one before is written."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-stream."""
    sys.exit(run_cli(lambda args: _stream(parse(Stream, args, prog="fps-stream")), argv))


def _stream(options: Stream) -> None:
    script = [] if options.script is None else read_script(options.script)
    _check(options)
    with profiled(options.profile, f"fps-stream {options.output.name}", options.output):
        _run(options, script)


def _run(options: Stream, script: list[dict[str, Any]]) -> None:
    from fps_jax.media.fragments import fragmented_mp4

    session = _session(options)
    started = time.perf_counter()
    with fragmented_mp4(options.output, fps=options.fps) as writer:
        try:
            _write(session, script, writer, options.fps, ahead=options.profile is None)
        except KeyboardInterrupt:  # the normal end of a video without end
            if options.blocks is not None or not writer.frames:
                raise
    print(
        f"wrote {options.output}: {writer.frames} frames in {time.perf_counter() - started:.1f} s",
        file=Quiet(sys.stderr),
    )
    if script:
        print(
            f"script: {len(script)} entries were not reached, the first at {script[0]['at']:g} s",
            file=Quiet(sys.stderr),
        )


def _session(options: Stream) -> "Session":
    """The stream, which is checked in full before the checkpoint's weights are read."""
    from fps_jax.checkpoints.open import open_model
    from fps_jax.profiling.stages import stage
    from fps_jax.sampling.stream import CausalPipeline
    from fps_jax.sampling.stream_plan import StreamPlan

    model = open_model(options.model)
    causal = causal_config(options, model.config)
    given, plan = None, StreamPlan.build
    settings: dict[str, Any] = {"seed": options.seed, "blocks": options.blocks, "kv_cache": options.kv_cache}
    size = (options.height, options.width)
    *_, rows, columns = plan(model.config, causal, options.prompt, size=size, **settings).latent_shape
    if options.image is not None or options.video is not None:
        from fps_jax.sampling.given import given_latent_frames

        with waiting("read what is given"):
            given = _given(options, 8 * rows, 8 * columns)
        frames = given_latent_frames(given, model.config, causal)
        plan(model.config, causal, options.prompt, size=size, given=frames, **settings)
        print(f"given: {len(given)} frames of {options.image or options.video}", file=Quiet(sys.stderr))
    pipe = CausalPipeline.from_pretrained(model.directory, causal=causal, dtype=options.dtype, show_progress=True)
    with stage("prepare"), waiting("prepare"):
        return pipe.session(options.prompt, height=options.height, width=options.width, given=given, **settings)


def _given(options: Stream, height: int, width: int) -> Any:
    """The frames that the video begins with, at its size."""
    if options.image is not None:
        from fps_jax.media.images import load_image

        return load_image(options.image, height, width, tell_crop=True)
    from fps_jax.media.clips import read_clip

    assert options.video is not None
    return read_clip(options.video, fps=options.fps, height=height, width=width, last=options.video_frames)


def _write(
    session: "Session", script: list[dict[str, Any]], writer: "FragmentWriter", fps: float, *, ahead: bool
) -> None:
    """Blocks into the file, to the last; entries leave the script when a block that began with them, or after them, is written.

    ahead: a block begins before the one before it is written. In turn, the time of each stage is its own.
    """
    from fps_jax.profiling.stages import stage

    coming = list(script)  # of blocks that are yet to begin

    def switch() -> None:
        due = take_due(coming, (writer.frames + session.begun_frames) / fps)
        if due is not None:
            session.switch(due["prompt"], due["how"])

    def in_turn() -> Iterator["Block"]:
        while session.blocks is None or session.index < session.blocks:
            switch()
            yield next(session)

    blocks = session.ahead(switch) if ahead else in_turn()
    for number in itertools.count(1):
        begun, start = time.perf_counter(), writer.frames / fps
        with waiting(f"block {number}"):  # the first compiles; a large one takes long
            block = next(blocks, None)
            if block is None:
                return
            with stage("write", block.index):
                writer.push(block.frames)
        take_due(script, start)
        took = time.perf_counter() - begun
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in block.seconds.items())
        name = f"block {block.index + 1}{' (given)' if block.given else ''}"
        print(
            f"{name}: {writer.frames} frames, {len(block.frames) / took:.2f} frames/s ({stages})",
            file=Quiet(sys.stderr),
        )


def _check(options: Stream) -> None:
    """What can be known without jax or a checkpoint."""
    if options.output.suffix != ".mp4":
        raise ValueError(f"output={str(options.output)!r} must end in .mp4")
    check_output(options.output, overwrite=options.overwrite)
    if options.blocks is not None and options.blocks < 1:
        raise ValueError(f"blocks={options.blocks} is not 1 or more; leave it out for a video without end")
    if not options.prompt.strip():
        raise ValueError(f"prompt={options.prompt!r} is not a text; give a few words")
    check_fps(options.fps)
    if options.image is not None and options.video is not None:
        raise ValueError(f"image={str(options.image)!r} and video={str(options.video)!r} were given; give one of them")
    if options.video_frames is not None and options.video is None:
        raise ValueError(
            f"video_frames={options.video_frames} is of --video, which isn't given; give a clip, or leave it out"
        )
    if options.video_frames is not None and options.video_frames < 1:
        raise ValueError(f"video_frames={options.video_frames} is not 1 or more; leave it out for all of the clip")


def take_due(script: list[dict[str, Any]], seconds: float) -> dict[str, Any] | None:
    """Takes out of a script what is due, and gives it as one: the newest prompt, in the strongest of their ways; or None."""
    due: list[dict[str, Any]] = []
    while script and script[0]["at"] <= seconds:
        due.append(script.pop(0))
    if not due:
        return None
    return due[-1] | {"how": strongest(entry["how"] for entry in due)}


def read_script(path: pathlib.Path) -> list[dict[str, Any]]:
    """The prompts of a script, in order. Raises FileNotFoundError, or ValueError that names the file and what is wrong in it."""
    if not path.exists():
        raise FileNotFoundError(f"script={str(path)!r} doesn't exist")
    try:
        check_regular(path, MAX_JSON)
        script = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a pipe or a folder, too many bytes, no text, no JSON
        raise ValueError(f"script={str(path)!r} is not a JSON file ({error})") from None
    if not isinstance(script, list):
        raise ValueError(f"script={str(path)!r} is not a list of prompts, each with 'at' and 'prompt'")
    read: list[dict[str, Any]] = []
    for i, entry in enumerate(script):
        where = f"script={str(path)!r}, entry {i}"
        if not isinstance(entry, dict) or not {"at", "prompt"} <= set(entry) <= {"at", "prompt", "how"}:
            raise ValueError(f"{where}: give an object of 'at', 'prompt' and, where it isn't 'continue', 'how'")
        at, prompt, how = entry["at"], entry["prompt"], entry.get("how", "continue")
        if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at <= _LATEST:
            raise ValueError(f"{where}: at={at!r:.40} is not a number of seconds, 0 to {_LATEST:g}")
        if read and at <= read[-1]["at"]:
            raise ValueError(f"{where}: at={at:g} is not after the entry before it, at {read[-1]['at']:g}")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where}: prompt={prompt!r} is not a text; give a few words")
        check_text(f"{where}: prompt", prompt)
        if how not in get_args(Switch):
            raise ValueError(f"{where}: how={how!r} is not one of {choices(Switch)}")
        read.append({"at": at, "prompt": prompt, "how": how})
    return read
