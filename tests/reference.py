"""Golden files and the one measure of error that every parity test uses."""

import json
import os
import pathlib

import numpy as np
from safetensors.numpy import load_file

DATA = pathlib.Path(__file__).parent / "data"


def golden(name: str) -> dict[str, np.ndarray]:
    """Tensors of tests/data/<name>.safetensors."""
    return load_file(DATA / f"{name}.safetensors")


def rel_l2(got, want) -> float:
    """Relative L2 error, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    if log := os.environ.get("PARITY_LOG"):  # benchmarks/numerics.py collects what the tests measure
        with open(log, "a") as file:
            file.write(json.dumps([os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0], error]) + "\n")
    return error
