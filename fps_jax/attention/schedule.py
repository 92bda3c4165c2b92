"""The denoising-step-aware schedule: which granularity and which window hold at which point of denoising. Data, not code.

Source: FPSAttention (arXiv 2506.04648) section 3.4. Progress, the default and the file format are ours.
"""

import dataclasses
import json
import os
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fps_jax.attention.attend import PlannedAttention, TokenAttention
from fps_jax.attention.plan import AttentionPlan
from fps_jax.attention.tiles import TileLayout, check_shape3, propose_tiles
from fps_jax.attention.windows import check_density, propose_window
from fps_jax.choices import Setting, choices
from fps_jax.files import MAX_JSON, check_regular, write_json
from fps_jax.sizes import Shape3

# Step i of n is at i / n only up to the grid's end points, which differ by a thousandth (one training timestep) between
# samplers, and to float32's rounding. A step that is meant to start a regime must not fall short of it by that.
_END_POINTS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Regime:
    """What holds while progress < `until`.

    Attributes:
      until: end, in (0, 1].
      scales_per_tile: FP8 scales of Q and K in a tile; None for no quantization.
      window: key tiles along (F, Y, X); None for the whole grid, or as `density` says.
      density: in place of a window: the share of token pairs to keep, from which a window is proposed for the grid.
      center_k: take the mean off K before it is rounded; only with quantization. Absent from JSON where it is false.
    """

    until: float
    scales_per_tile: int | None = None
    window: Shape3 | None = None
    density: float | None = None
    center_k: bool = False

    def __post_init__(self):
        # compared, not converted: JSON may hold an int that no float can
        if not isinstance(self.until, int | float) or isinstance(self.until, bool) or not 0 < self.until <= 1:
            raise ValueError(
                f"until={self.until!r} is not a number in (0, 1]; it is the progress at which a regime ends"
            )
        if self.window is not None:
            object.__setattr__(self, "window", check_shape3("window", self.window, "tiles, 1 or more"))
        if self.density is not None:
            check_density(self.density)
        if self.window is not None and self.density is not None:
            raise ValueError(f"window={self.window} and density={self.density} are both given; give one of them")
        scales = self.scales_per_tile
        if scales is not None and (not isinstance(scales, int) or isinstance(scales, bool) or scales < 1):
            raise ValueError(f"scales_per_tile={scales!r} is not a whole number of 1 or more; null is no quantization")
        if not isinstance(self.center_k, bool):
            raise ValueError(f"center_k={self.center_k!r} is not true or false")
        if self.center_k and scales is None:
            raise ValueError("center_k=True without scales_per_tile: nothing is rounded; give scales, or leave it out")


@dataclass(frozen=True, kw_only=True)
class FPSSchedule:
    """Regimes over denoising progress, and what stays dense.

    Progress is 1 - u, where u is the un-shifted time of the noise level, sigma = shift u / (1 + (shift - 1) u): on a grid of n
    sampling steps it is i / n at step i, up to the grid's end points, whatever the shift.

    Attributes:
      regimes: rising `until`, the last exactly 1.
      grid: tokens (F, Y, X) that it was made for; None for any.
      tile: None for the one proposed for the grid.
      dense_steps: this many first sampling steps attend everything unrounded.
      dense_layers: these layers do so at every step.
    Raises: ValueError that names the field, its value and the rule.
    """

    regimes: tuple[Regime, ...]
    grid: Shape3 | None = None
    tile: Shape3 | None = None
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        if not isinstance(self.regimes, tuple | list) or not self.regimes:
            raise ValueError(f"regimes={self.regimes!r} is not a non-empty list of regimes")
        object.__setattr__(self, "regimes", tuple(self.regimes))
        if not all(isinstance(regime, Regime) for regime in self.regimes):
            raise ValueError(
                f"regimes={self.regimes!r} are not all Regime(...); FPSSchedule.from_dict takes dictionaries"
            )
        ends = [regime.until for regime in self.regimes]
        if any(b <= a for a, b in zip([0.0, *ends], ends, strict=False)) or ends[-1] != 1:
            raise ValueError(f"regimes end at {ends}; until must rise, and the last must be exactly 1")
        for name in ("grid", "tile"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_shape3(name, getattr(self, name), "tokens"))
        if not _is_count(self.dense_steps):
            raise ValueError(f"dense_steps={self.dense_steps!r} is not a whole number of 0 or more")
        if not isinstance(self.dense_layers, tuple | list) or not all(map(_is_count, self.dense_layers)):
            raise ValueError(f"dense_layers={self.dense_layers!r} is not a list of layers, numbered from 0")
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))
        if self.grid is not None and self.tile is not None:
            TileLayout(self.grid, self.tile)

    @classmethod
    def default(cls, grid: Shape3 | None = None) -> "FPSSchedule":
        """The paper's three regimes: coarse and sparse, fine and dense, between. Ends and densities are ours, until calibrated.

        Granularities are those of the tile proposed for `grid`; without a grid 1, 4 and 2 scales a tile.
        """
        coarse, intermediate, fine = (1, 2, 4) if grid is None else _proposed_layout(grid).granularities
        return cls(
            grid=grid,
            regimes=(
                Regime(until=0.25, scales_per_tile=coarse, density=0.12),
                Regime(until=0.75, scales_per_tile=fine, density=0.33),
                Regime(until=1.0, scales_per_tile=intermediate, density=0.20),
            ),
        )

    @classmethod
    def from_dict(cls, record: Any) -> "FPSSchedule":
        """From the parsed JSON, version 1. Raises ValueError for unknown, missing or wrong entries."""
        if not isinstance(record, dict) or record.get("version") != 1:
            version = record.get("version") if isinstance(record, dict) else None
            raise ValueError(f"version={version!r} is not 1; this is no schedule of a version that we read")
        fields = {key: value for key, value in record.items() if key != "version"}
        _check_keys(fields, cls, "the schedule")
        regimes = fields.get("regimes")
        if not isinstance(regimes, list) or not all(isinstance(r, dict) for r in regimes):
            raise ValueError(f"regimes={regimes!r} is not a list of objects")
        for i, regime in enumerate(regimes):
            _check_keys(regime, Regime, f"regime {i}")
        return cls(**{**fields, "regimes": tuple(Regime(**regime) for regime in regimes)})

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        record = {"version": 1, **json.loads(json.dumps(dataclasses.asdict(self)))}
        for regime in record["regimes"]:
            if not regime["center_k"]:
                del regime["center_k"]  # so that releases that don't know it read the schedules that don't need it
        return record

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FPSSchedule":
        """Read a JSON file. Raises FileNotFoundError, or ValueError that names the file and what is wrong in it."""
        try:
            check_regular(path, MAX_JSON)
            text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise FileNotFoundError(f"schedule={str(path)!r} doesn't exist; fps-calibrate makes one") from None
        except ValueError:  # a folder, a pipe, no UTF-8, too large
            raise ValueError(f"schedule={str(path)!r} is not a JSON file; fps-calibrate makes one") from None
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"schedule={str(path)!r} is not JSON ({error}); fps-calibrate makes one") from None
        except ValueError as error:
            raise ValueError(f"schedule={str(path)!r}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file, whole or not at all."""
        write_json(self.to_dict(), path)

    def setting(self, name: Setting) -> "FPSSchedule":
        """'fps': itself. 'fp8': with whole-grid windows. 'sparse': without quantization."""
        drop = {
            "fps": {},
            "fp8": {"window": None, "density": None},
            "sparse": {"scales_per_tile": None, "center_k": False},
        }
        if name not in drop:
            raise ValueError(f"attention={name!r} is not one of {choices(Setting)}")
        return dataclasses.replace(
            self, regimes=tuple(dataclasses.replace(regime, **drop[name]) for regime in self.regimes)
        )

    def resolve(self, grid: Shape3) -> "FPSSchedule":
        """The same for one grid, with nothing left to propose: grid, tile and windows are filled in.

        Raises: ValueError for a schedule of another grid, a tile that doesn't fit, or a granularity that the tile doesn't allow.
        """
        if self.grid is not None and self.grid != grid:
            raise ValueError(
                f"schedule is for a grid of {self.grid} tokens and this video has {grid} (latent frames, rows and columns of 16 "
                "pixels); calibrate one for this size, or take grid and tile out of it (null)"
            )
        layout = _proposed_layout(grid) if self.tile is None else TileLayout(grid, self.tile)

        def fill(regime: Regime) -> Regime:
            if regime.scales_per_tile is not None:
                layout.tokens_per_scale(regime.scales_per_tile)
            if regime.density is None:
                return regime
            return dataclasses.replace(regime, window=propose_window(layout, regime.density), density=None)

        return dataclasses.replace(
            self, grid=grid, tile=layout.tile, regimes=tuple(fill(regime) for regime in self.regimes)
        )

    def plans(self, grid: Shape3) -> tuple[AttentionPlan, ...]:
        """The plan of each regime on a grid. Raises as `resolve`."""
        own = self.resolve(grid)
        return tuple(
            AttentionPlan.build(grid, own.tile, r.window, r.scales_per_tile, center_k=r.center_k) for r in own.regimes
        )

    def regime_at(self, progress: Any) -> Any:
        """int32 index of the regime at a progress in [0, 1], a NumPy or jax array: the first whose `until` is beyond it."""
        xp = jnp if isinstance(progress, jax.Array) else np
        index = xp.zeros(xp.shape(progress), np.int32)
        for regime in self.regimes[:-1]:
            index = index + (progress >= regime.until).astype(np.int32)
        return index

    def segments(
        self, sigma: np.ndarray, shift: float, grid: Shape3, num_layers: int
    ) -> tuple[tuple[int, TokenAttention], ...]:
        """(number of steps, attention) in order for the noise levels of a sampler, steps of equal attention joined.

        Raises: ValueError as `resolve`, and for a dense layer that the model doesn't have.
        """
        beyond = [layer for layer in self.dense_layers if layer >= num_layers]
        if beyond:
            raise ValueError(
                f"dense_layers={list(self.dense_layers)} names layer {beyond[0]}; the model has layers 0 to {num_layers - 1}"
            )
        plans = self.plans(grid)
        regimes = self.regime_at(progress(np.asarray(sigma, np.float64), shift) + _END_POINTS)
        joined: list[tuple[int, TokenAttention]] = []
        for step, regime in enumerate(regimes):
            dense = step < self.dense_steps
            attention = PlannedAttention(
                plans[0].dense() if dense else plans[regime], () if dense else self.dense_layers
            )
            if joined and joined[-1][1] == attention:
                joined[-1] = (joined[-1][0] + 1, attention)
            else:
                joined.append((1, attention))
        return tuple(joined)

    def describe(self, grid: Shape3) -> str:
        """One line for a person: the regimes with their densities on a grid."""
        plans = self.plans(grid)
        regimes = [f"until {r.until:g}: {plan.brief()}" for r, plan in zip(self.regimes, plans, strict=True)]
        return f"tile {plans[0].tile}; " + "; ".join(regimes)


def progress(sigma: Any, shift: float) -> Any:
    """Denoising progress 1 - u of a noise level, where sigma = shift u / (1 + (shift - 1) u). 0 is noise, 1 is clean."""
    return 1 - sigma / (shift - (shift - 1) * sigma)


def _proposed_layout(grid: Shape3) -> TileLayout:
    return TileLayout(grid, propose_tiles(grid)[0].tile)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_keys(record: dict, kind: type, what: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [key for key in record if key not in fields]
    if unknown:
        raise ValueError(f"{what} has an unknown entry {unknown[0]!r}; it may have {', '.join(fields)}")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in record]
    if missing:
        raise ValueError(f"{what} lacks {missing[0]!r}; docs/attention.md has the format, and fps-calibrate writes it")
