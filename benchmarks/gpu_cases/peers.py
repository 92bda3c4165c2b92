"""Other projects' kernels, where they are installed; quantization included where they do it inside."""

import importlib.util
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_cases.baselines import torch_normal, torch_seconds
from benchmarks.gpu_cases.timing import BF16_LIMIT, FP8_LIMIT, rates, size_of


def _missing(toy: bool, module: str) -> dict[str, Any] | None:
    if toy:
        return {"not available": "needs a GPU"}
    if importlib.util.find_spec(module) is None:
        return {"not available": f"{module} is not installed"}
    return None


def flash_attention_3(toy: bool, *, size: str, dtype: str) -> Iterator[dict[str, Any] | None]:
    """FlashAttention-3, dense; in FP8 with a scale a tensor, quantization not included."""
    yield None
    if missing := _missing(toy, "flash_attn_interface"):
        yield missing
        return
    import flash_attn_interface  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    shape = size_of(size, toy)
    q, k, v = (x.to(getattr(torch, dtype)) for x in torch_normal(shape, tokens_first=True))
    timing = torch_seconds(lambda: flash_attn_interface.flash_attn_func(q, k, v))
    yield rates(timing, shape.flop(), BF16_LIMIT if dtype == "bfloat16" else FP8_LIMIT)


def sage_attention(toy: bool, *, size: str) -> Iterator[dict[str, Any] | None]:
    """SageAttention, dense: INT8 QK and FP8 PV on Hopper."""
    yield None
    if missing := _missing(toy, "sageattention"):
        yield missing
        return
    import sageattention  # pyright: ignore[reportMissingImports]

    shape = size_of(size, toy)
    q, k, v = torch_normal(shape)
    yield rates(torch_seconds(lambda: sageattention.sageattn(q, k, v, tensor_layout="HND")), shape.flop(), FP8_LIMIT)


def sparge_attention(toy: bool, *, size: str, density: float) -> Iterator[dict[str, Any] | None]:
    """SpargeAttn with the share of keys kept as a top-k: INT8 QK and FP8 PV."""
    yield None
    if missing := _missing(toy, "spas_sage_attn"):
        yield missing
        return
    import spas_sage_attn  # pyright: ignore[reportMissingImports]

    shape = size_of(size, toy)
    q, k, v = torch_normal(shape)
    timing = torch_seconds(lambda: spas_sage_attn.spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=density))
    yield rates(timing, shape.flop(density), FP8_LIMIT)


def sliding_tile_attention(toy: bool) -> Iterator[dict[str, Any] | None]:
    """FastVideo's STA, bf16, on the grid that its tiles of 384 divide: 18 x 48 x 80, window (3, 3, 5) of (3, 6, 10) tiles."""
    yield None
    if missing := _missing(toy, "st_attn"):
        yield missing
        return
    import dataclasses

    import st_attn  # pyright: ignore[reportMissingImports]

    shape = dataclasses.replace(size_of("14B", toy), grid=(18, 48, 80))
    window, density = (3, 3, 5), 3 * 3 * 5 / (3 * 6 * 10)
    q, k, v = torch_normal(shape)
    call = lambda: st_attn.sliding_tile_attention(q, k, v, [window] * shape.heads, 0, False, "18x48x80")  # noqa: E731
    yield {"grid": shape.grid, "density": density, **rates(torch_seconds(call), shape.flop(density), BF16_LIMIT)}
