"""What the claim compares: models, and how each is sampled.

The schedule has three regimes: whole pictures of three frames while layout is decided and in the middle, of two in the last quarter
of the steps. `flat` is one regime, the wider of the two windows: of those that reach everywhere it is the narrowest, and it is
wider than the three are on the mean.
"""

import pathlib
from dataclasses import dataclass

import numpy as np

from fps_jax.attention.schedule import FPSSchedule
from fps_jax.choices import Setting

SCHEDULES = pathlib.Path(__file__).parent / "schedules"
STEPAWARE, FLAT = SCHEDULES / "fps.json", SCHEDULES / "flat.json"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      letter: its name.
      words: what it is, for a person.
      models: runs inside the claim's folder, one for each training seed.
      attention: in sampling.
      schedule: None for dense.
    """

    letter: str
    words: str
    models: tuple[str, ...]
    attention: Setting
    schedule: pathlib.Path | None = STEPAWARE

    def places(self) -> tuple[tuple[str, str], ...]:
        """(what is measured of one model, that model), for each training seed."""
        several = len(self.models) > 1
        return tuple((f"{self.letter}{i}" if several else self.letter, model) for i, model in enumerate(self.models))

    def density(self, steps: int) -> float:
        """Share of token pairs that self-attention keeps, mean over the steps of sampling."""
        if self.schedule is None:
            return 1.0
        return mean_density(FPSSchedule.load(self.schedule).setting(self.attention), steps)


def mean_density(schedule: FPSSchedule, steps: int) -> float:
    """Of a schedule that names its grid, over that many steps."""
    assert schedule.grid is not None
    plans = schedule.plans(schedule.grid)
    return float(np.mean([plans[int(i)].density for i in schedule.regime_at(np.arange(steps) / steps)]))


ROWS = (
    Row("a", "dense", ("dense",), "dense", None),
    Row("b", "FP8 only, untrained", ("dense",), "fp8"),
    Row("c", "sparse only, untrained", ("dense",), "sparse"),
    Row("d", "FP8 + sparse, untrained", ("dense",), "fps"),
    Row("e", "FP8 + sparse, trained under it", ("recover_e0", "recover_e1"), "fps"),
    Row("f", "dense, trained as long", ("recover_f0", "recover_f1"), "dense", None),
    Row("g", "FP8 + sparse, one regime, trained", ("recover_g",), "fps", FLAT),
    Row("h", "e, sampled dense", ("recover_e0",), "dense", None),
)
