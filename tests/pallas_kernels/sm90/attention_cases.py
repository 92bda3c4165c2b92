"""Attention calls for the Hopper kernel's tests, and what they should give: the method in NumPy, float64, written out once more."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import mosaic, reference
from pallas_kernels.interpret import interpret
from pallas_kernels.pattern import TilePattern
from pallas_kernels.sm90 import forward as fwd_sm90
from pallas_kernels.sm90 import quantize as quantize_sm90
from pallas_kernels.sm90.config import ForwardConfig
from pallas_kernels.testing import permuted_table, valid_slots
from tests.reference import rel_l2

BLOCK_KV = 128
TWO_STAGES = ForwardConfig(stages=2)  # the ring wraps in small cases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call. `padding`: of `valid_slots`; `table`: of `permuted_table`. `scales`: of a tile, None for no quantization.

    `value_tiles`: that share V's scales, None for all.
    """

    tile: int = 256
    tiles: int = 2
    query_tiles: int | None = None  # None: the same tokens as the keys
    heads: int = 1
    batch: int = 1
    head_dim: int = 128
    scales: int | None = 1
    value_tiles: int | None = None
    padding: str = "none"
    table: str = "ragged"
    inputs: str = "normal"
    dtype: str = "bfloat16"
    config: ForwardConfig = TWO_STAGES
    multiprocessors: int = 132  # of the GPU: fewer than the call has blocks, for a persistent launch

    @property
    def tokens_per_scale(self) -> int | None:
        return None if self.scales is None else self.tile // self.scales

    @property
    def tokens_per_value_scale(self) -> int | None:
        return None if self.value_tiles is None else self.tile * self.value_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A call, NumPy. `q`, `k`, `v` in the case's dtype, NaN at padding."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    key_tiles: np.ndarray
    counts: np.ndarray
    q_valid: np.ndarray
    k_valid: np.ndarray

    def args(self, case: Case) -> tuple[jax.Array, jax.Array, jax.Array, TilePattern]:
        """q, k, v and the pattern."""
        pattern = TilePattern.build(
            key_tiles=jnp.asarray(self.key_tiles),  # jax's, so that a table may be wrong
            counts=jnp.asarray(self.counts),
            valid=self.k_valid,
            q_valid=self.q_valid,
            tokens_per_scale=case.tokens_per_scale,
            tokens_per_value_scale=case.tokens_per_value_scale,
        )
        return jnp.asarray(self.q), jnp.asarray(self.k), jnp.asarray(self.v), pattern


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    query_tiles = case.tiles if case.query_tiles is None else case.query_tiles
    k_valid, q_valid = (valid_slots(case.padding, tiles, case.tile, rng) for tiles in (case.tiles, query_tiles))
    q, k, v = (
        rng.standard_normal((case.batch, tiles * case.tile, case.heads, case.head_dim), np.float32)
        for tiles in (query_tiles, case.tiles, case.tiles)
    )
    if case.value_tiles is not None:  # by channel and tile, from 2**-9 to 2**9: groups have other scales
        v *= 2.0 ** rng.integers(-9, 10, (1, case.tiles, 1, 1, case.head_dim)).repeat(case.tile, 2).reshape(
            1, -1, 1, case.head_dim
        ).astype(np.float32)
    if case.inputs == "outliers":  # a few channels 20x, as trained models have them
        for x in (q, k, v):
            x[..., :3] *= 20
    if case.inputs == "low":  # every score far below 0: a padded key that scored 0 would become the maximum
        q[..., 0], k[..., 0] = 40, -40
    if case.inputs == "rising":  # scores that grow with the keys: the maximum moves in most steps
        q[..., 0], k[..., 0] = 4, 3 * np.arange(k.shape[1])[None, :, None] / 64
    if case.inputs == "jumping":  # 150 powers of two up and down from block to block: more than float32 has
        q[..., 0], k[..., 0] = 40, 30 * (np.arange(k.shape[1]) // BLOCK_KV % 2)[None, :, None]
    # Rows rise, fall, rise or fall below 0, do neither: warps of each kind, and of all kinds.
    if case.inputs == "mixed":
        row = np.arange(q.shape[1])
        kind = np.where(row // 16 % 6 == 5, row % 5, row // 16 % 6)
        q[..., 0] = np.array([4, -4, 4, -4, 0], np.float32)[kind][None, :, None]
        q[..., 1] = np.array([0, 0, -60, -60, 1], np.float32)[kind][None, :, None]
        k[..., 0], k[..., 1] = 3 * np.arange(k.shape[1])[None, :, None] / 64, 60
    if case.inputs.startswith("broken"):  # inf in a key of tile 0, NaN in a channel of V
        k[0, 3, 0, 5], v[0, 1, 0, 7] = np.inf, np.nan
    if case.inputs == "broken_query":  # not for the fused passes: XLA loses it in their maximum on a CPU
        q[0, -case.tile // 2, -1, 9] = np.nan
    for x, valid in ((q, q_valid), (k, k_valid), (v, k_valid)):
        x[:, ~valid] = np.nan
    key_tiles, counts = permuted_table(case.table, case.heads, query_tiles, case.tiles, rng)
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    return Inputs(q=q, k=k, v=v, key_tiles=key_tiles, counts=counts, q_valid=q_valid, k_valid=k_valid)


def expected(case: Case, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """(output float64 [B, Sq, N, H], log-sum-exp [B, N, Sq]) by a loop over rows of the table."""
    group = case.tokens_per_scale
    q, k = _dequantized(x.q, x.q_valid, group, (2, 4)), _dequantized(x.k, x.k_valid, group, (2, 4))
    v = _dequantized(
        x.v, x.k_valid, group and (case.tokens_per_value_scale or x.k_valid.size), (2,), case.value_tiles is not None
    )
    batch, seq, heads, dim = q.shape
    out, lse = np.zeros((batch, seq, heads, dim)), np.zeros((batch, heads, seq))
    for b, n, row in np.ndindex(batch, heads, seq // case.tile):
        tiles, count = x.key_tiles[..., row, :], x.counts[..., row]
        if case.table == "per_head":
            tiles, count = tiles[n], count[n]
        rows = slice(row * case.tile, (row + 1) * case.tile)
        keys = (tiles[:count, None] * case.tile + np.arange(case.tile)).ravel()
        keys = keys[x.k_valid[keys]]
        scores = q[b, rows, n] @ k[b, keys, n].T / np.sqrt(dim) * np.log2(np.e)
        top = np.ceil(scores.max(1))
        p = np.exp2(scores - top[:, None])
        if case.scales is not None:
            p = _e4m3(448 * p) / 448
        total = p.sum(1)
        out[b, rows, n], lse[b, n, rows] = p @ v[b, keys, n] / total[:, None], (top + np.log2(total)) * np.log(2)
    valid = x.q_valid
    return np.where(valid[None, :, None, None], out, 0), np.where(valid[None, None], lse, 0)


def _dequantized(
    x: np.ndarray, valid: np.ndarray, group: int | None, axes: tuple[int, ...], powers_of_two: bool = False
) -> np.ndarray:
    """x in float64, rounded to e4m3 with a scale for `axes` of [B, groups, group, N, H]; 0 at padding."""
    x = np.where(valid[None, :, None, None], x.astype(np.float64), 0)
    if group is None:
        return x
    groups = x.reshape(x.shape[0], -1, group, *x.shape[2:])
    amax = np.abs(groups).max(axes, keepdims=True)
    scale = np.where(amax > 0, amax / 448, 1)
    if powers_of_two:
        scale = np.exp2(np.ceil(np.log2(scale)))
    return (_e4m3(np.round(groups / scale * 2048) / 2048) * scale).reshape(x.shape)


def _e4m3(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def call_kernel(case: Case, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """(output, log-sum-exp) of the kernel in interpret mode, races an error."""
    with interpret(detect_races=True):
        return _call(case, x)


def _call(case: Case, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    fwd_sm90.attention.clear_cache()  # it depends on the number of multiprocessors
    # The fused passes, which cost a third of a case in interpret mode, know nothing of the config: one config shows them.
    fused = case.scales is not None and case.config == TWO_STAGES
    quantize = quantize_sm90.quantize if fused else jax.jit(quantize_sm90.by_xla)
    with (
        mock.patch.object(fwd_sm90, "multiprocessors", return_value=case.multiprocessors),
        mock.patch.object(quantize_sm90, "quantize", quantize),
    ):
        out, lse = fwd_sm90.forward(*x.args(case), config=case.config)
        return np.asarray(out), np.asarray(lse)


def errors(case: Case) -> dict[str, Any]:
    """The kernel against `expected` and against the specification. Runs in `interpreted.run`."""
    x = make_inputs(case)
    out, lse = call_kernel(case, x)
    want, want_lse = expected(case, x)
    spec, spec_lse = jax.jit(reference.attention)(*x.args(case))  # seconds faster than operation by operation
    return {
        "dtype": str(out.dtype),
        "out": rel_l2(out, want),
        "channel": max(rel_l2(out[..., i], want[..., i]) for i in range(case.head_dim)),
        "lse": rel_l2(lse, want_lse),
        "reference": rel_l2(out, spec),
        "reference_lse": rel_l2(lse, spec_lse),
        "padding_is_0": not (out[:, ~x.q_valid].any() or lse[..., ~x.q_valid].any()),
    }


def broken_inputs(inputs: str, scales: int | None, config: ForwardConfig) -> dict[str, Any]:
    """Where the output is NaN for inf in a key and NaN in V, and in a query: (kernel, specification)."""
    case = Case(tile=128, tiles=3, heads=2, scales=scales, inputs=inputs, padding="tail", config=config)
    x = make_inputs(case)
    out, _ = call_kernel(case, x)
    spec, _ = jax.jit(reference.attention)(*x.args(case))
    return {"kernel": np.isnan(out.astype(np.float32)), "spec": np.isnan(np.asarray(spec, np.float32))}


def repeated() -> bool:
    case = Case(tile=256, tiles=2, config=ForwardConfig(stages=4))
    x = make_inputs(case)
    first, again = call_kernel(case, x), call_kernel(case, x)
    return all((a == b).all() for a, b in zip(first, again, strict=True))


def unseen_phases(case: Case) -> list[int]:
    """Barriers of a call whose last phase not all waited for who had waited for the others: the arrivals of a phase."""
    x, unseen = make_inputs(case), []
    with interpret():
        barrier = mosaic.private("pallas.mosaic_gpu.interpret.shared_memory").Barrier
        plain = barrier.deallocate

        def deallocate(self):
            if self.ref_count == 1 and any(seen != self.phase for seen in self.last_observed_phase_by_thread.values()):
                unseen.append(self.num_arrivals)
            plain(self)

        with mock.patch.object(barrier, "deallocate", deallocate):
            _call(case, x)
    return unseen


def without_lse() -> bool:
    """The same output with the log-sum-exp left out."""
    case = Case(tile=128, tiles=2)
    *x, pattern = make_inputs(case).args(case)
    with interpret():
        operands = quantize_sm90.quantize(*x, pattern=pattern)
        fixed = {"batch": 1, "dtype": jnp.dtype(jnp.bfloat16), "config": case.config}
        out, lse = jax.block_until_ready(fwd_sm90.attention(operands, pattern, **fixed))
        alone, nothing = fwd_sm90.attention(operands, pattern, **fixed, with_lse=False)
        return nothing is None and lse is not None and bool((out == alone).all())


def table_out_of_range() -> bool:
    """Whether a table that reaches beyond the keys, with a count of 0, computes as the table clipped to them does."""
    case = Case(tile=128, tiles=3)
    x = make_inputs(case)
    outside = np.array([[0, 9, 0], [-4, 1, 2], [1, 0, 0]], np.int32)
    clipped = np.array([[0, 2, 0], [0, 1, 2], [1, 0, 0]], np.int32)
    wrong = dataclasses.replace(x, key_tiles=outside, counts=np.array([2, 7, 0], np.int32))
    right = dataclasses.replace(x, key_tiles=clipped, counts=np.array([2, 3, 1], np.int32))
    return all((a == b).all() for a, b in zip(call_kernel(case, wrong), call_kernel(case, right), strict=True))
