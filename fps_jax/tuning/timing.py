"""Seconds of a call on a GPU."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

_ROUNDS = 7
_ROUND_SECONDS = 0.06  # calls are queued for that long, so that the host's 50 us a call hide behind the GPU


def median_seconds(call: Callable[[], Any], limit: float = math.inf, *, rounds: int = _ROUNDS) -> dict[str, Any]:
    """Times a call that returns arrays, after one that warms up.

    A round queues the call often enough to fill 60 ms, and waits once.

    Args:
      limit: seconds above which two single calls are enough.
      rounds: of which the median is taken.
    Returns: 'seconds': median of the rounds, 'spread': (slowest - fastest) / median, 'calls': how many in all. Of a call slower
      than `limit`: 'seconds' of the faster of two, 'calls', and 'slow': True.
    """
    import jax

    def seconds(repeats: int) -> float:
        result = None
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repeats

    seconds(1)
    single = min(seconds(1), seconds(1))
    if single > limit:
        return {"seconds": single, "calls": 2, "slow": True}
    repeats = max(1, min(50, round(_ROUND_SECONDS / single)))
    return summary([seconds(repeats) for _ in range(rounds)], repeats)


def summary(rounds: Sequence[float], repeats: int) -> dict[str, Any]:
    """What `median_seconds` returns, of rounds timed in another way: seconds a call in each, and calls in a round."""
    median = statistics.median(rounds)
    return {"seconds": median, "spread": (max(rounds) - min(rounds)) / median, "calls": len(rounds) * repeats}
