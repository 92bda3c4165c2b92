"""Dense attention by others, on the real tokens without padding: what ours is compared with. cuDNN's is in `attention`."""

import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu_cases.timing import BF16_LIMIT, FP8_LIMIT, Size, median_seconds, rates, size_of
from fps_jax.tuning.timing import summary

_NEEDS = {"not available": "needs a GPU"}


def torch_seconds(call: Callable[[], Any]) -> dict[str, Any]:
    """As `timing.median_seconds`, with CUDA events."""
    import torch  # pyright: ignore[reportMissingImports]

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(1, min(50, round(0.06 / (time.perf_counter() - start))))
    rounds = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        rounds.append(begin.elapsed_time(end) / 1e3 / repeats)
    return summary(rounds, repeats)


def _normal(size: Size, dtype: Any, tokens: int | None = None) -> list[Any]:
    import jax

    shape = (1, size.tokens if tokens is None else tokens, size.heads, size.head_dim)
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3)]


def cudnn_fp8(toy: bool, *, size: str) -> Iterator[dict[str, Any] | None]:
    """cuDNN's FP8 attention with one scale a tensor, through jax's private wrapper: quantization not included."""
    yield None
    if toy:
        yield _NEEDS
        return
    import jax
    import jax.numpy as jnp

    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    shape = size_of(size, toy)
    q, k, v = (x.astype(jnp.float8_e4m3fn) for x in _normal(shape, jnp.bfloat16))
    one = jnp.ones((1, 1, 1, 1), jnp.float32)
    # The fixed scale of P is 448; the output, in FP8, of random inputs is small.
    scales = {**dict.fromkeys(fused.fp8_params_keys, one), "scale_s": 448 * one, "descale_s": one / 448}
    attention = jax.jit(
        lambda q, k, v: fused.dot_product_attention(
            q, k, v, fp8_params=scales, scale=shape.head_dim**-0.5, use_fp8=True
        )
    )
    yield rates(median_seconds(lambda: attention(q, k, v), toy), shape.flop(), FP8_LIMIT)


def mosaic(toy: bool, *, size: str, block_kv: int, steps: int) -> Iterator[dict[str, Any] | None]:
    """jax's own Pallas kernel, float16, which its shared memory is hard-wired to; it wants whole blocks of keys."""
    if toy:
        yield None
        yield _NEEDS
        return
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    shape = size_of(size, toy)
    tokens = -(-shape.tokens // 128) * 128
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=block_kv, max_concurrent_steps=steps)
    like = jax.ShapeDtypeStruct((1, tokens, shape.heads, shape.head_dim), jnp.float16)
    attention = jax.jit(lambda q, k, v: attention_mgpu.attention(q, k, v, config)).lower(like, like, like).compile()
    yield None
    q, k, v = _normal(shape, jnp.float16, tokens)
    yield rates(median_seconds(lambda: attention(q, k, v), toy), shape.flop(), BF16_LIMIT)


def torch_sdpa(toy: bool, *, size: str, backend: str) -> Iterator[dict[str, Any] | None]:
    """torch's scaled_dot_product_attention, bf16. `backend`: CUDNN_ATTENTION or FLASH_ATTENTION."""
    if toy:
        yield None
        yield _NEEDS
        return
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    yield None
    shape = size_of(size, toy)
    q, k, v = torch_normal(shape)
    with torch.inference_mode(), sdpa_kernel(getattr(SDPBackend, backend)):
        timing = torch_seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    yield rates(timing, shape.flop(), BF16_LIMIT)


def torch_normal(size: Size, tokens_first: bool = False) -> list[Any]:
    """q, k, v [1, N, S, H], or [1, S, N, H]."""
    import torch  # pyright: ignore[reportMissingImports]

    axes = (size.tokens, size.heads) if tokens_first else (size.heads, size.tokens)
    return [torch.randn(1, *axes, size.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
