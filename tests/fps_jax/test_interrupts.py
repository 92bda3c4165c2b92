"""Ctrl-C in the middle of compiled code: the loop ends with the step under way, and a command with 130."""

import os
import signal
import threading
import time

import jax
import pytest

from fps_jax.interrupts import watched
from fps_jax.sampling.denoise import denoise
from fps_jax.sampling.guidance import Inputs
from fps_jax.sampling.solvers import solver_table
from tests.checkpoints import TINY, tiny_dit


def test_a_signal_is_seen_from_another_thread_and_by_an_event_loop_too():
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: None)
    read, write = os.pipe()
    os.set_blocking(write, False)
    outer = signal.set_wakeup_fd(write)
    try:
        with watched() as interrupted:
            assert not interrupted()
            os.kill(os.getpid(), signal.SIGINT)
            seen = []
            thread = threading.Thread(target=lambda: seen.append(interrupted()))
            thread.start()
            thread.join()
            assert seen == [True]
            assert interrupted()  # and stays so
        assert signal.set_wakeup_fd(outer) == write
        assert signal.SIGINT in os.read(read, 100)
    finally:
        signal.set_wakeup_fd(outer)
        signal.signal(signal.SIGINT, before)
        os.close(read)
        os.close(write)


def test_in_another_thread_nothing_is_watched():
    seen = []

    def work():
        with watched() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_ctrl_c_and_an_error_of_the_callback_end_the_loop_within_a_step(capfd):
    """All steps are one compiled program, in which the main thread is: what Python would do about the signal comes after it."""
    keys = jax.random.split(jax.random.key(3), 2)
    inputs = Inputs(jax.random.normal(keys[0], (1, 16, 3, 4, 6)), jax.random.normal(keys[1], (1, 7, 32)))
    table = solver_table("euler", "wan", 40, 3.0)
    done = []

    def interrupt(step, steps):
        done.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        denoise(TINY, tiny_dit(), inputs, table, progress=interrupt)
    assert 3 <= done[-1] <= 5
    done.clear()

    def fail(step, steps):
        done.append(step)
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        denoise(TINY, tiny_dit(), inputs, table, progress=fail)
    assert done == [1]
    assert "Traceback" not in capfd.readouterr().err
    seen = []
    out = denoise(TINY, tiny_dit(), inputs, table, seen=lambda step, latents: seen.append((step, latents)))
    assert [step for step, _ in seen] == list(range(40))  # the program is whole again
    assert abs(seen[-1][1] - out).max() == 0
    assert abs(seen[0][1] - out).max() > 0
