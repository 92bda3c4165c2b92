"""What the specification says, computed on CPUs beside the GPU's work: a file a result, for `correct` and `whole`."""

import pathlib
import sys

import numpy as np

from benchmarks.gpu_cases.correct import write_references


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    write_references(folder)
    from benchmarks.gpu_cases.whole import small_latents

    for attention in ("dense", "fps"):
        for dtype in ("float32", "bfloat16"):
            part = folder / f".pipeline {attention} {dtype}.npy"
            np.save(part, small_latents(attention, dtype))
            part.rename(folder / f"pipeline {attention} {dtype}.npy")


if __name__ == "__main__":
    main()
