"""What the commands and functions of this folder take where nothing is said. Command lines read it before jax is imported."""

from typing import Literal

DENSITIES = (0.08, 0.12, 0.2, 0.33, 0.5, 1.0)  # of the windows that calibration tries
SPARSE_DENSITY = 0.2  # of the window that stands for the tuned table's class 'sparse'
DensityClass = Literal["sparse", "dense"]
Scales = Literal[0, 1, 2]  # in a block of 128 keys; 0 is bf16
# Of the tuned table's keys, most valuable first.
CLASSES: tuple[DensityClass, ...] = ("sparse", "dense")
SCALES: tuple[Scales, ...] = (1, 2, 0)
DEADLINE = 90.0  # seconds for one config: compiling takes some 5, timing 3
