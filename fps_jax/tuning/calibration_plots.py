"""The two pictures of a calibration: what was measured, and what was chosen."""

import pathlib

import numpy as np

from fps_jax.media import plots
from fps_jax.tuning.calibration import Calibration, budget_words


def save_errors(result: Calibration, error_budget: float | np.ndarray, path: pathlib.Path) -> None:
    """Attention error against denoising step, mean over layers: one panel a window, one line a granularity (the paper's Fig. 5)."""
    by_step = result.errors.mean(1)
    budget = np.broadcast_to(error_budget, len(by_step))
    windows = list(dict.fromkeys(plan.windows[0] for plan in result.plans))
    scales = list(dict.fromkeys(plan.scales_per_tile for plan in result.plans))
    columns = min(3, len(windows))
    rows = -(-len(windows) // columns)
    grid = result.plans[0].grid
    with plots.figure(
        rows,
        columns,
        width=3.4 * columns + 0.6,
        height=2.5 * rows + 0.9,
        title="Attention error over the denoising steps",
        subtitle=f"relative L2 of the attention output against dense, mean over layers; grid {grid}, tile {result.plans[0].tile}",
        sharex=True,
        sharey=True,
    ) as (figure, axes):
        for ax in axes.flat[len(windows) :]:
            ax.remove()
        steps = np.arange(1, len(by_step) + 1)
        for ax, window in zip(axes.flat, windows, strict=False):
            for color, scale in zip(plots.COLORS, scales, strict=False):
                index = next(
                    i for i, p in enumerate(result.plans) if p.windows[0] == window and p.scales_per_tile == scale
                )
                if result.plans[index].whole_grid and scale is None:
                    continue  # dense itself
                label = "not quantized" if scale is None else f"FP8, {scale} scale{'s' * (scale > 1)} a tile"
                ax.plot(steps, by_step[:, index], color=color, label=label, marker="o" if len(steps) < 12 else None)
            ax.plot(steps, budget, color=plots.GREY, linestyle="--", linewidth=1)
            ax.set_title(f"window {window}, density {result.plans[index].density:.2f}")
            ax.set_yscale("log")
        for ax in axes[-1]:
            ax.set_xlabel("step")
            ax.xaxis.get_major_locator().set_params(integer=True)
        for row in axes:
            row[0].set_ylabel("relative L2 error")
        handles = {}
        for ax in axes.flat[: len(windows)]:
            handles |= {label: line for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        axes.flat[0].legend(handles.values(), handles.keys(), loc="best")
        axes.flat[0].annotate(
            f"budget {budget_words(error_budget)}",
            (steps[-1], budget[-1]),
            ha="right",
            va="bottom",
            fontsize=7,
            color=plots.GREY,
        )
        plots.save_png(figure, path)


def save_choice(result: Calibration, error_budget: float | np.ndarray, path: pathlib.Path) -> None:
    """The schedule: error of each layer where it is used, and the estimated time of each step."""
    steps = np.arange(len(result.chosen))
    budget = np.broadcast_to(error_budget, len(steps))
    own = result.errors[steps, :, result.chosen]  # [n, L]
    dense = [plan.whole_grid and not plan.quantize for plan in result.plans]
    own[np.array(dense)[result.chosen]] = 0
    with plots.figure(
        3,
        1,
        width=8,
        height=7,
        title="The schedule chosen",
        subtitle=f"budget {budget_words(error_budget)}; "
        f"{result.speed_up:.2f} times the speed of bf16 dense attention by the cost formula",
        sharex=True,
        height_ratios=(1, 1, 1.3),
    ) as (figure, axes):
        top, middle, bottom = axes[:, 0]
        top.step(steps + 1, result.costs[result.chosen], where="mid", color=plots.COLORS[0])
        top.set_ylim(0, max(1.05, 1.1 * result.costs[result.chosen].max()))
        top.set_ylabel("time (bf16 dense = 1)")
        starts = [0, *(np.flatnonzero(np.diff(result.chosen)) + 1)]
        for start in starts:
            plan = result.plans[result.chosen[start]]
            what = (
                "dense"
                if dense[result.chosen[start]]
                else f"{plan.windows[0]}\n"
                + ("not quantized" if plan.scales_per_tile is None else f"FP8 x{plan.scales_per_tile}")
            )
            top.annotate(what, (start + 0.6, 0.03), xycoords=("data", "axes fraction"), fontsize=7, va="bottom")
            for ax in (top, middle):
                ax.axvline(start + 0.5, color="#bbbbbb", linewidth=0.8)
        middle.plot(
            steps + 1,
            own.mean(1),
            color=plots.COLORS[1],
            label="mean over layers",
            marker="o" if len(steps) < 12 else None,
        )
        middle.plot(steps + 1, own.max(1), color=plots.COLORS[4], linewidth=1, label="worst layer")
        middle.plot(steps + 1, budget, color=plots.GREY, linestyle="--", linewidth=1, label="budget")
        middle.set_ylabel("relative L2 error")
        middle.set_ylim(bottom=0)
        middle.legend()
        image = bottom.imshow(
            own.T,
            aspect="auto",
            origin="lower",
            cmap="viridis",
            vmin=0,
            vmax=max(own.max(), budget.max()),
            extent=(0.5, len(steps) + 0.5, -0.5, own.shape[1] - 0.5),
        )
        bottom.grid(False)
        bottom.set_ylabel("layer")
        bottom.set_xlabel("step")
        for axis in (bottom.xaxis, bottom.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=bottom, label="relative L2 error")
        plots.save_png(figure, path)
