"""fps-train: fine-tune a DiT under the attention that it will be sampled with. jax is imported once the options are right."""

import dataclasses
import functools
import signal
import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from fps_jax.errors import parse, run_cli
from fps_train.config import PRESETS, TrainConfig
from fps_train.host_options import HostOptions


@dataclass(frozen=True, kw_only=True)
class Train(TrainConfig):
    """Fine-tune a Wan2.1 DiT with the attention that it will be sampled with.

    --preset NAME or --config RUN.toml give other defaults to all options; what stands beside them on the command line wins.
    """

    model: Annotated[str, tyro.conf.Positional] = ""
    """A converted checkpoint, an official or diffusers directory, a Hugging Face repo id, or another run."""
    resume: bool = False
    """Continue the run in --output from its newest checkpoint. Everything that makes its numbers has to be as it was."""
    dry_run: bool = False
    """Check everything and say what would be trained: sizes, regimes, programs. Nothing is written."""
    plan: str | None = None
    """Compile the run for GPUs that aren't there, h200:8 say, and say what it takes: bytes a device, traffic. Nothing is written.
    Needs the offline-gpu extra."""
    plan_sizes: tuple[str, ...] = ()
    """With --plan, sizes of videos, 480x832x81 say, in place of --data."""
    hosts: HostOptions = field(default_factory=HostOptions)


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-train."""
    status = run_cli(_run, argv)
    from fps_train.hosts import leave

    leave(status)
    sys.exit(status)


def _run(argv: list[str]) -> None:
    argv, config = _take(argv, "--config")
    argv, preset = _take(argv, "--preset")
    options: Train = parse(Train, argv, prog="fps-train", default=_defaults(config, preset))
    plain = TrainConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(TrainConfig)})
    if options.plan_sizes and options.plan is None:
        raise ValueError("plan_sizes was given without plan, which is what they are for; give --plan h200:8, say")
    if options.plan is not None:
        from fps_train.described import parse_devices, prepare_process

        kind, count = parse_devices(options.plan)
        prepare_process()
        from fps_train.cluster_plan import plan_run, report

        print(report(plan_run(plain, kind, count, functools.partial(print, file=sys.stderr), options.plan_sizes)))
        return
    if options.dry_run:
        from fps_train.describe import describe
        from fps_train.setup import prepare

        print(describe(prepare(plain)))
        return
    from fps_train.hosts import peers, start

    if options.hosts.several:
        start(options.hosts)
    from fps_train.agreement import Stopped, is_lead
    from fps_train.loop import train

    try:
        with peers():
            directory = train(plain, resume=options.resume)
    except Stopped as stopped:
        if is_lead():
            print(stopped, file=sys.stderr)
        if stopped.signal == signal.SIGINT:
            raise KeyboardInterrupt from None
        return
    if is_lead():
        print(
            f"{directory} has all {plain.steps} steps: fps-sample {directory} --prompt ... samples it", file=sys.stderr
        )


def _take(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """The value of an option that has to be known before the others are parsed, and what is left."""
    rest, value = [], None
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None:
                raise ValueError(f"{name} needs a value (see fps-train --help)")
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, value


def _defaults(config: str | None, preset: str | None) -> Train:
    if config is not None and preset is not None:
        raise ValueError(f"--config {config} and --preset {preset} both give defaults; choose one")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is none of {', '.join(PRESETS)}")
    given = PRESETS[preset or "paper"] if config is None else TrainConfig.load(config)
    return Train(**{f.name: getattr(given, f.name) for f in dataclasses.fields(TrainConfig)})
