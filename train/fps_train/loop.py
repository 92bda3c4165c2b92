"""The run: steps, with what is seen, saved and validated on the way."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fps_jax.compilation import enable_compilation_cache
from fps_jax.models.dit import stage_name
from fps_train.agreement import Stopped, is_lead, lead_decides, option_facts, together
from fps_train.batch import Batch
from fps_train.checkpoints import Checkpoints, shapes
from fps_train.config import TrainConfig
from fps_train.memory import check_memory, check_programs, enough_memory
from fps_train.metrics import Metrics
from fps_train.placement import put_rows
from fps_train.programs import Programs
from fps_train.regimes import TrainingRegime, regime_of
from fps_train.run import check_new, check_resume, run_facts, see_run, start_run
from fps_train.setup import Setup, Start, prepare, start
from fps_train.status import Status
from fps_train.step import Micro, Seen
from fps_train.validate import Videos, validation_loss


class _Pending(NamedTuple):
    """A step that was sent to the device, not yet looked at."""

    step: int
    regimes: list[str]
    micros: list[Micro]
    seen: Seen
    work: tuple[int, float]  # tokens, floating-point operations


def train(options: TrainConfig, *, resume: bool = False, show: bool | None = None) -> pathlib.Path:
    """Runs all steps of a run, from its start or from its newest checkpoint; returns its folder.

    Args:
      resume: continue the run in `options.output`.
      show: False for silence; else a bar on stderr where that is a terminal, and lines where it isn't.
    Raises: ValueError, FileNotFoundError or FileExistsError before anything is written, for what can't be run; FloatingPointError
      for a NaN or inf, with nothing saved of it; OSError for a disk that is full; ValueError before the first step, or MemoryError,
      where a device has too little memory; `Stopped` on SIGTERM or SIGINT.
    """
    enable_compilation_cache()

    def check() -> tuple[Setup, tuple, str | None]:
        setup = prepare(options)
        check_memory(setup)
        record = (options, setup.model, setup.parts, setup.schedule, setup.data.fingerprint)
        if resume:
            return setup, record, check_resume(setup.directory, *record)
        if is_lead():
            check_new(setup.directory)  # before minutes of reading weights
        return setup, record, options.init_from

    setup, record, init_from = together(
        check,
        lambda found: {
            "resume": resume,
            **option_facts(options),
            **run_facts(*found[1]),
            "the validation prompts (a hash)": found[0].data.prompts_fingerprint,
        },
    )
    with enough_memory(setup):
        _go(setup, record, init_from, resume, show)
    return setup.directory


def _go(setup: Setup, record: tuple, init_from: str | None, resume: bool, show: bool | None) -> None:
    """`train` from where all processes agree on what to do."""
    options = setup.options
    begun = start(setup, init_from)
    if not resume:
        together(lambda: start_run(setup.directory, *record) if is_lead() else None)
        together(lambda: see_run(setup.directory))
    with Checkpoints(setup.directory / "checkpoints", options.checkpoint) as checkpoints:
        first = 0
        latest = lead_decides(lambda: checkpoints.latest or 0)
        if resume and latest:
            # Its shapes alone: two states would need twice the memory that a step does.
            begun = dataclasses.replace(begun, state=shapes(begun.state))
            restored = checkpoints.restore(begun.state, latest)
            begun, first = dataclasses.replace(begun, state=restored.state), int(restored.notes["step"])
            del restored
        if first >= options.steps:
            if is_lead():
                told = f"{setup.directory} has all {options.steps} steps already; give more --steps to go on"
                print(told, file=sys.stderr)
            return
        with (
            _metrics(setup.directory, first, options) as metrics,
            Status(first, options.steps, show if is_lead() else False) as status,
        ):
            _Loop(setup, begun, first, checkpoints, metrics, status).run()


def _metrics(
    directory: pathlib.Path, first: int, options: TrainConfig
) -> contextlib.AbstractContextManager[Metrics | None]:
    return Metrics(directory, first, dataclasses.asdict(options)) if is_lead() else contextlib.nullcontext()


class _Loop:
    """One process's work on a run, from step `first` on."""

    def __init__(
        self, setup: Setup, begun: Start, first: int, checkpoints: Checkpoints, metrics: Metrics | None, status: Status
    ):
        self.setup, self.options = setup, setup.options
        self.state, self.frozen, self.teacher = begun.state, begun.frozen, begun.teacher
        self.first, self.checkpoints, self.metrics, self.status = first, checkpoints, metrics, status
        self.programs = Programs(setup, begun)
        self.validated: tuple[int, float] | None = None  # step and loss of the newest validation
        self.saved = first if first else None
        self._dtype = jnp.dtype(setup.options.dtype)
        by_shape = {bucket.latent_shape: bucket for bucket in setup.buckets}
        held_out = setup.batches.validation(self.options.batch_size) if self.options.validation.every else []
        self.validation = [
            (by_shape[batch.latents.shape[1:]], np.array(numbers), self._device_batch(batch, len(numbers)))
            for numbers, batch in held_out
        ]
        self.videos = self._make_videos()

    def run(self) -> None:
        """All steps that are left."""
        options = self.options
        self.programs.compile(self.status.say)
        together(self._check_room)
        self._dense_videos()
        if self.first == 0:
            self._validate(0)
        waiting: _Pending | None = None
        reading = self.setup.batches.iterate(self.first * options.accumulate)
        with _signals() as asked, contextlib.closing(reading) as microbatches:
            self._clock = time.monotonic()
            for step in range(self.first + 1, options.steps + 1):
                sent = self._step(step, microbatches)
                if waiting is not None:
                    self._see(waiting)
                waiting = sent
                stop = asked.after(step)
                save = step % options.checkpoint.every == 0 or step == options.steps or stop
                look = options.validation.every and (step % options.validation.every == 0 or step == options.steps)
                if save or look:
                    self._see(waiting)  # before anything is kept of it
                    waiting = None
                if look and not stop:
                    self._validate(step)
                if save:
                    self._save(step)
                if stop:
                    self.checkpoints.wait()
                    raise Stopped(stop, step)
        self.checkpoints.wait()

    def _check_room(self) -> None:
        begun = Start(self.state, self.frozen, self.teacher)
        check_programs(self.setup, begun, self.programs.compiled())

    def _dense_videos(self) -> None:
        """The dense model's validation videos, where there are none yet. Its weights live no longer than this call."""
        videos = self.videos
        if videos is None or self.options.from_scratch or not lead_decides(lambda: not videos.has_reference):
            return
        if self.first == 0:
            dit = self._joined(self.state.params)
        else:
            dit = self.setup.model.load("dit", self._dtype, self.setup.dit_shardings)
        self.status.say("sampling the dense model's validation videos, once")
        videos.dense(dit)

    def _step(self, step: int, microbatches: Iterator[tuple[int, Batch]]) -> _Pending:
        options, sums = self.options, None
        names, micros, tokens, flops = [], [], 0, 0.0
        for number, batch in itertools.islice(microbatches, options.accumulate):
            bucket = self.setup.buckets[self.setup.batches.bucket(number)]
            regime: TrainingRegime = bucket.regimes[regime_of(bucket.regimes, options.seed, number)]
            sums, micro = self.programs.gradient(
                self.state.params, self._device_batch(batch, options.batch_size), bucket, regime, sums
            )
            names.append(regime.name)
            micros.append(micro)
            tokens += options.batch_size * bucket.num_tokens
            flops += options.batch_size * self.programs.sample_flops(bucket, regime)
        losses = jnp.stack([micro.loss for micro in micros])
        self.state, seen = self.programs.update(self.state, sums, losses)
        return _Pending(step, names, micros, seen, (tokens, flops))

    def _see(self, done: _Pending) -> None:
        """Waits for a step, writes its line, and raises FloatingPointError where it wasn't finite."""
        micros: list[Micro] = jax.device_get(done.micros)
        seen: Seen = jax.device_get(done.seen._replace(not_finite={}))
        if not seen.finite:
            raise FloatingPointError(self._not_finite(done, micros))
        seconds = time.monotonic() - self._clock
        self._clock = time.monotonic()
        errors: dict[str, list[float]] = {}
        for name, micro in zip(done.regimes, micros, strict=True):
            errors.setdefault(name, []).append(float(micro.error))
        tokens, flops = done.work
        values: dict[str, Any] = {
            "loss": float(np.mean([micro.loss for micro in micros])),
            "error": {name: float(np.mean(own)) for name, own in errors.items()},
            "grad_norm": float(seen.grad_norm),
            "learning_rate": float(seen.learning_rate),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        peak = self.programs.peak_flops
        if peak is not None:
            values["mfu"] = round(flops / seconds / peak, 4)
        self._write(done.step, values)
        self.status.step(done.step, values)

    def _not_finite(self, done: _Pending, micros: list[Micro]) -> str:
        kept = "nothing is saved" if self.saved is None else f"step {self.saved} is saved"
        advice = f"{kept}, the weights are as before; try --dtype float32, a lower learning rate, or look at the data"
        for micro in micros:
            if micro.first_bad >= 0:
                where = stage_name(self.setup.config.dit, int(micro.first_bad))
                return f"NaN or inf at step {done.step} in the forward, first in {where}; {advice}"
        for path, bad in jax.device_get(done.seen.not_finite).items():
            if bad.any():
                layer = f", layer {int(np.argmax(bad))}" if len(bad) > 1 else ""
                return f"NaN or inf at step {done.step} in the gradient of {path}{layer}; {advice}"
        return f"NaN or inf at step {done.step} in the loss; {advice}"

    def _validate(self, step: int) -> None:
        values: dict[str, Any] = {}
        if self.validation:
            values["raw"] = validation_loss(self.state.params, self.frozen, self.validation, options=self.setup.step)
            if self.state.ema is not None and step:
                values["ema"] = validation_loss(self.state.ema, self.frozen, self.validation, options=self.setup.step)
            self.validated = (step, values.get("ema", values["raw"])["mean"])
        every = self.options.validation.video_every or self.options.validation.every
        if self.videos is not None and step and (step % every == 0 or step == self.options.steps):
            weights = self.state.params if self.state.ema is None else self.state.ema
            values["videos"] = self.videos.sample(self._joined(weights), step)
        if values:
            self._write(step, {"validation": values})
            self.status.say(f"step {step}, validation: {json.dumps(values)}")
        self._clock = time.monotonic()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(step, values)

    def _save(self, step: int) -> None:
        at, loss = self.validated or (None, None)
        loss = loss if at == step else None
        self.checkpoints.save(
            self.state,
            {"step": step, "microbatches": step * self.options.accumulate, "data": self.setup.data.fingerprint},
            loss,
        )
        self.saved = step
        self._clock = time.monotonic()

    def _make_videos(self) -> Videos | None:
        options, data = self.options, self.setup.data
        if not options.validation.videos or not options.validation.every or not data.validation_prompts:
            return None
        return Videos(
            self.setup.directory,
            self.setup.config,
            lambda: self.setup.model.load("vae", jnp.float32),
            data.validation_prompts,
            data.empty_text,
            self.setup.buckets,
            self.setup.schedule,
            self.setup.sampling_shift,
            options.validation,
            dtype=options.dtype,
            fps=data.fps,
            mesh=self.setup.step.mesh,
        )

    def _joined(self, trained: Any) -> Any:
        return self.setup.parts.join(trained, self.frozen)

    def _device_batch(self, batch: Batch, rows: int) -> Batch:
        batch = batch._replace(sample=(np.asarray(batch.sample) % 2**32).astype(np.uint32))
        return put_rows(batch, self.setup.mesh, rows)


class _Asked:
    """Whether a signal asks the run to stop."""

    number: int = 0

    def after(self, step: int) -> int:
        """The signal, 0 for none. Of several processes all get it at the same step, soon after one of them was sent it."""
        if jax.process_count() == 1:
            return self.number
        return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0


@contextlib.contextmanager
def _signals() -> Iterator[_Asked]:
    """Notes the first SIGTERM or SIGINT, for the step under way to end well; the second one acts as ever.

    Of several processes SIGTERM goes to JAX's runtime, which tells the others, and Ctrl-C becomes a SIGTERM.
    """
    asked, before = _Asked(), {}
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield asked
        return

    def note(number, frame):
        asked.number = number
        for each, handler in before.items():
            signal.signal(each, handler)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    for each in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,):
        before[each] = signal.signal(each, note)
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
