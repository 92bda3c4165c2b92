"""The plots' one look, and how they are written. matplotlib is imported when one is drawn, and no state of pyplot is touched."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fps_jax.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart by colour-blind eyes too (jfly.uni-koeln.de/color); in this order.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"
_HEAD = 0.32  # inches that a title takes

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "text.parse_math": False,  # names of files and metrics are no formulas
    "axes.edgecolor": "#999999",
    "axes.formatter.useoffset": False,  # 0.9991, never 1e-4 + 9.99e-1
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "text.color": "#222222",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextlib.contextmanager
def figure(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 8,
    height: float = 4.5,
    title: str = "",
    subtitle: str = "",
    **subplots: Any,
) -> Iterator[tuple["Figure", np.ndarray]]:
    """A figure and its axes, `[rows, columns]`, to draw on and save inside the `with` block: that is where the style holds.

    Args:
      width, height: inches, of the whole; `save_png` makes 160 pixels of one.
      title, subtitle: above everything, at the left.
      subplots: passed on to `Figure.subplots` (sharex, height_ratios ...).
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.style.context(["default", _STYLE]):  # whatever a user's matplotlibrc says
        head = _HEAD * bool(title) + _HEAD * 0.75 * bool(subtitle)  # inches
        layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / height), w_pad=0.1, h_pad=0.08)
        made = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(made)
        top = {"x": 0.1 / width, "ha": "left", "va": "top"}
        made.text(y=1 - 0.08 / height, s=title, fontsize=12, fontweight="bold", **top)
        made.text(y=1 - (0.08 + _HEAD * 0.9 * bool(title)) / height, s=subtitle, color=GREY, **top)
        yield made, made.subplots(rows, columns, squeeze=False, **subplots)


def save_png(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a figure as png, 160 pixels an inch; the file appears when whole. Raises OSError if it can't be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    write_bytes(path, buffer.getvalue())
