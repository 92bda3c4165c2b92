"""LoRAs as they are merged into weights: changes of parameters, low-rank pairs or differences, in our names and shapes.

Nothing of files is here: `open.open_lora` reads one. A trainer's own adapters are `fps_jax.models.lora`'s.
"""

import pathlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fps_jax.models.params import Params, flatten, unflatten

Place = tuple[str, int | None]  # a parameter's path, and its layer where it is stacked


@dataclass(frozen=True, eq=False)
class LowRank:
    """scale x (A B): `a` `[in, r]`, `b` `[r, out]` in their file's dtype, views of the mapped file."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def dense(self, amount: float = 1.0) -> np.ndarray:
        """`amount` times the change, float32."""
        return (np.float32(amount * self.scale) * self.a.astype(np.float32)) @ self.b.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Difference:
    """scale x `values`, in the parameter's shape."""

    values: np.ndarray
    scale: float = 1.0

    def dense(self, amount: float = 1.0) -> np.ndarray:
        """`amount` times the change, float32."""
        return np.float32(amount * self.scale) * self.values.astype(np.float32)


@dataclass(frozen=True, eq=False)
class LoRA:
    """A LoRA file that was opened and checked against a model.

    Attributes:
      path: the file.
      changes: by parameter and layer.
      report: JSON-ready: what was used and how it was scaled, what was left out.
    """

    path: pathlib.Path
    changes: dict[Place, list[LowRank | Difference]] = field(repr=False)
    report: dict[str, Any]

    @property
    def summary(self) -> str:
        """One line for people."""
        used = self.report
        ranks = ", ".join(f"{rank}" for rank in used["ranks"]) or "none"
        left = f", {len(used['left_out'])} tensors left out" if used["left_out"] else ""
        scales = ", ".join(f"{scale:g}" for scale in used["alpha_over_rank"]) or "1"
        return (
            f"LoRA {self.path.name}: {used['used']} of {used['tensors']} tensors change {used['parameters']} parameters "
            f"(rank {ranks}, alpha / rank {scales}: {used['alpha_from']}){left}"
        )


@dataclass(frozen=True, eq=False)
class Scaled:
    """A LoRA and how much of it: 1 is what it was trained as."""

    lora: LoRA
    scale: float = 1.0


def changed(loras: list[Scaled]) -> dict[str, list[int | None]]:
    """Paths of parameters that any of them changes, and the layers."""
    found: dict[str, list[int | None]] = {}
    for path, layer in sorted({place for scaled in loras for place in scaled.lora.changes}, key=str):
        found.setdefault(path, []).append(layer)
    return found


def merge(values: np.ndarray, place: Place, loras: list[Scaled], dtype: Any = None) -> np.ndarray:
    """A parameter (of one layer) with all changes added in float32, rounded once, to `dtype` or its own.

    `values` itself where nothing changes it and the dtype is the same. Raises ValueError for NaN or inf in the sum.
    """
    dtype = values.dtype if dtype is None else np.dtype(dtype)
    changes = [(scaled, change) for scaled in loras for change in scaled.lora.changes.get(place, ())]
    if not changes:
        return values.astype(dtype, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        total = values.astype(np.float32)
        for scaled, change in changes:
            total += change.dense(scaled.scale)
        merged = total.astype(dtype)
    largest = max(total.max(), -total.min())  # NaN if one is; cheaper than a look at each
    if not largest <= float(jnp.finfo(dtype).max):
        names = ", ".join(dict.fromkeys(str(scaled.lora.path) for scaled, _ in changes))
        where = place[0] if place[1] is None else f"{place[0]} of layer {place[1]}"
        raise ValueError(f"{where} has NaN or inf as {dtype} with {names} merged; use a smaller scale or another dtype")
    return merged


class MergedLoRAs:
    """LoRAs in the weights of a DiT on its device.

    Attributes:
      loras: those that are merged now.
    """

    def __init__(self):
        self.loras: list[Scaled] = []
        # What LoRAs changed, as it was before, in host memory: sums start from it, so that nothing is rounded twice.
        self._before: dict[str, np.ndarray] = {}

    def set(self, params: dict[str, Params], loras: list[Scaled]) -> None:
        """Puts the weights of exactly these LoRAs in place of `params["dit"]`; as they were, if one of them can't be merged."""
        leaves = dict(flatten(params["dit"]))
        params["dit"] = {}  # so that each leaf is freed when its successor stands
        layers = changed([*self.loras, *loras])
        try:
            self._put(leaves, layers, loras)
        except BaseException:  # also an interrupted merge is none
            self._put(leaves, layers, self.loras)
            raise
        finally:
            params["dit"] = unflatten(leaves)
        self.loras = loras

    def clear(self, params: dict[str, Params]) -> None:
        """Takes all out again, bit for bit, and forgets what was before."""
        self.set(params, [])
        self._before.clear()

    def _put(self, leaves: dict[str, Any], layers: dict[str, list[int | None]], loras: list[Scaled]) -> None:
        for path, numbers in layers.items():
            if path not in self._before:
                self._before[path] = np.asarray(leaves[path])
            before = self._before[path]
            merged = np.array(before)

            def put(layer: int | None, path=path, before=before, merged=merged) -> None:
                at = ... if layer is None else layer
                merged[at] = merge(before[at], (path, layer), loras)

            with ThreadPoolExecutor(4) as threads:  # NumPy lets go of the interpreter's lock
                list(threads.map(put, numbers))
            leaves[path] = jax.device_put(merged, leaves[path].sharding)
