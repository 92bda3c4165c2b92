"""The time of a call: enough calls for a median, and two where one is slow."""

import time

from fps_jax.tuning.timing import median_seconds


def test_a_slow_call_is_timed_twice_and_a_fast_one_often():
    calls = []

    def call():
        calls.append(None)
        time.sleep(0.01)

    slow = median_seconds(call, limit=0.001)
    assert (slow["slow"], slow["calls"], len(calls)) == (True, 2, 3)
    assert 0.01 <= slow["seconds"] < 1
    fast = median_seconds(call)
    assert "slow" not in fast
    assert fast["calls"] % 7 == 0
    assert len(calls) == 3 + 3 + fast["calls"]
    assert 0.01 <= fast["seconds"] < 1
