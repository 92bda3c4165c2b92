"""fps-calibrate: measures the attention error of every candidate on your prompts, writes the fastest schedule within a budget."""

import dataclasses
import os
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fps_jax.commands.options import VideoOptions, load_pipeline, read_request, run_record
from fps_jax.errors import parse, run_cli
from fps_jax.files import read_json, write_json
from fps_jax.progress import progress_bar, waiting
from fps_jax.tuning.defaults import DENSITIES

if TYPE_CHECKING:
    from fps_jax.sampling.request import Request


@dataclass(frozen=True, kw_only=True)
class Calibrate(VideoOptions):
    """Choose an FPSAttention schedule by measurement.

    Runs the dense model on every prompt. At each step and layer it also computes what each candidate (granularity, window) would
    have given, and how far that is from dense attention (relative L2). Then it writes the schedule of least estimated time whose
    error, averaged over layers and prompts, stays within the budget at every step.
    """

    prompts: pathlib.Path
    """Text file with one prompt a line. Two or three that are typical of your use are a good start."""
    output: pathlib.Path = pathlib.Path("schedule.json")
    """The schedule. Beside it: .errors.json (all that was measured), .errors.png and .choice.png. Those of an earlier run are
    replaced."""
    error_budget: float | None = None
    """Largest relative L2 error of the attention output at any step, mean over layers and prompts. Left out: at each step twice the
    error that FP8 alone makes there."""
    max_regimes: int = 4
    """Largest number of regimes."""
    densities: tuple[float, ...] = DENSITIES
    """Windows to try, by the share of token pairs that they keep."""
    center_k: Literal["no", "yes", "both"] = "no"
    """Whether to take the mean off K before it is rounded: exact in the softmax; both measures with and without."""
    tile: tuple[int, int, int] | None = None
    """Tokens of a tile along frames, rows and columns; the one proposed for the size if left out."""
    query_tiles: int = 32
    """Tiles of queries, spread over the video, that errors are measured on."""
    reuse: pathlib.Path | None = None
    """An .errors.json of an earlier run: choose again, for another budget say, without running the model."""

    # Calibration measures the dense model, with the prompts of the file.
    prompt: Annotated[str, tyro.conf.Suppress] = ""
    attention: Annotated[Literal["dense"], tyro.conf.Suppress] = "dense"
    schedule: Annotated[None, tyro.conf.Suppress] = None
    latents: Annotated[None, tyro.conf.Suppress] = None
    fps: Annotated[int, tyro.conf.Suppress] = 16
    batch_guidance: Annotated[bool, tyro.conf.Suppress] = False


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-calibrate."""
    sys.exit(run_cli(lambda args: _calibrate(parse(Calibrate, args, prog="fps-calibrate")), argv))


def _calibrate(options: Calibrate) -> None:
    _check_output(options.output)
    prompts = _read_prompts(options.prompts)
    request = read_request(dataclasses.replace(options, prompt=prompts[0]))
    from fps_jax.attention.plan import AttentionPlan
    from fps_jax.checkpoints.open import open_model
    from fps_jax.tuning import calibration
    from pallas_kernels.sm90 import tuned

    grid = request.resolve(open_model(options.model).config).grid
    centerings = {"no": (False,), "yes": (True,), "both": (False, True)}[options.center_k]
    plans = calibration.candidates(AttentionPlan.build(grid, options.tile).layout, options.densities, centerings)
    calibration.check_choice(1.0 if options.error_budget is None else options.error_budget, options.max_regimes)
    if options.query_tiles < 1:
        raise ValueError(f"query_tiles={options.query_tiles} is less than 1; 32 are enough")
    tuned.tuned_entries()  # costs need it: a table that can't be read is found before the measurement, not after
    start = time.time()
    if options.reuse is None:
        errors, measured = _measure(options, request, prompts, plans)
    else:
        errors, measured = _read_errors(options.reuse, plans)
    budget = calibration.measured_budget(plans, errors) if options.error_budget is None else options.error_budget
    out = options.output
    with waiting("choose, and draw the choice"):
        result = calibration.choose_schedule(
            plans,
            errors,
            error_budget=budget,
            max_regimes=options.max_regimes,
            progress=_progress(measured.get("settings", {})),
        )

        from fps_jax.tuning import calibration_plots

        write_json(
            {**measured, "candidates": [_describe(p, c) for p, c in zip(result.plans, result.costs, strict=True)],
             "errors": [[[float(f"{e:.4g}") for e in layer] for layer in step] for step in errors]},
            out.with_suffix(".errors.json"),
        )  # fmt: skip
        calibration_plots.save_errors(result, budget, out.with_suffix(".errors.png"))
        calibration_plots.save_choice(result, budget, out.with_suffix(".choice.png"))
        result.schedule.save(out)  # last: where it stands, all of it stands
    print(result.summary(budget))
    print(
        f"wrote {out}, {out.stem}.errors.json, {out.stem}.errors.png and {out.stem}.choice.png in {time.time() - start:.0f} s"
    )


def _measure(options: Calibrate, request: "Request", prompts: list[str], plans: Any) -> tuple[Any, dict[str, Any]]:
    """Errors `[n, L, C]`, mean over prompts, and the record of the run."""
    import numpy as np

    from fps_jax.tuning import calibration

    pipe = load_pipeline(options, request)
    errors = []
    for number, prompt in enumerate(prompts, 1):
        prepared = pipe.prepare(dataclasses.replace(request, prompt=prompt))
        with progress_bar(f"measure prompt {number} of {len(prompts)}", True) as bar:
            errors.append(
                calibration.measure(
                    pipe.config.dit,
                    pipe.params["dit"],
                    prepared.inputs,
                    prepared.table,
                    plans=plans,
                    query_tiles=options.query_tiles,
                    guidance_scale=prepared.guidance_scale,
                    dtype=pipe.dtype,
                    progress=bar,
                )
            )
    return np.mean(errors, axis=0), {**run_record(options, request, pipe), "prompts": prompts}


def _progress(settings: dict[str, Any]) -> Any:
    """The progress of each step of a run that named its levels; None for one on a grid."""
    levels = {name: settings[name] for name in ("sigmas", "timesteps") if settings.get(name) is not None}
    if not levels:
        return None
    from fps_jax.attention.schedule import progress
    from fps_jax.sampling.flow import explicit_grid

    shift = settings["flow_shift"]
    return progress(explicit_grid(settings["solver"], shift, **levels).sigmas.astype("float64"), shift)


def _describe(plan: Any, cost: float) -> dict[str, Any]:
    return {
        "tile": plan.tile,
        "window": plan.windows[0],
        "density": round(plan.density, 6),
        "scales_per_tile": plan.scales_per_tile,
        "center_k": plan.center_k,
        "estimated_time_of_bf16_dense": round(float(cost), 6),
    }


def _read_errors(path: pathlib.Path, plans: Any) -> tuple[Any, dict[str, Any]]:
    """What an earlier run measured. Raises ValueError where it measured other candidates than this call would."""
    import numpy as np

    try:
        record = read_json(path)
        errors = np.array(record.pop("errors"), np.float64)
        if errors.ndim != 3 or not errors.size or not (np.isfinite(errors) & (errors >= 0)).all():
            raise ValueError("errors")
        if not isinstance(record.get("settings", {}), dict):
            raise TypeError("settings")
        _progress(record.get("settings", {}))  # which the choice needs
        known = [
            (c["tile"], c["window"], c["scales_per_tile"], c.get("center_k", False)) for c in record.pop("candidates")
        ]
    except FileNotFoundError:
        raise FileNotFoundError(f"reuse={str(path)!r} doesn't exist; name the .errors.json of an earlier run") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"reuse={str(path)!r} is no .errors.json that fps-calibrate wrote") from None
    if known != [(list(p.tile), list(p.windows[0]), p.scales_per_tile, p.center_k) for p in plans]:
        raise ValueError(
            f"reuse={str(path)!r} measured other candidates; give the size, --tile, --densities and --center-k of that run, or "
            "measure again"
        )
    if errors.shape[2] != len(plans):
        raise ValueError(
            f"reuse={str(path)!r} has errors of {errors.shape[2]} candidates and names {len(plans)}; measure again"
        )
    return errors, record


def _check_output(output: pathlib.Path) -> None:
    if output.suffix != ".json" or output.name == ".json":
        raise ValueError(f"output={str(output)!r} must end in .json")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"output folder {str(folder)!r} doesn't exist; make it first")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"output folder {str(folder)!r} can't be written; choose another --output")
    if output.is_dir():
        raise IsADirectoryError(f"output={str(output)!r} is a folder; name a file")


def _read_prompts(path: pathlib.Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"prompts={str(path)!r} doesn't exist; it is a text file with one prompt a line"
        ) from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ValueError(f"prompts={str(path)!r} is not a text file with one prompt a line") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"prompts={str(path)!r} holds no prompt; write one a line")
    return prompts
