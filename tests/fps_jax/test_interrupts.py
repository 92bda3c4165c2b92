"""Ctrl-C in the middle of compiled code: the loop ends with the step under way, and a command with 130."""

import os
import signal
import threading
import time

import jax
import pytest

from fps_jax.interrupts import interrupt_on_sigterm, watched
from fps_jax.sampling.denoise import denoise
from fps_jax.sampling.guidance import Inputs
from fps_jax.sampling.solvers import solver_table
from tests.checkpoints import TINY, tiny_dit


@pytest.fixture(autouse=True)
def _ctrl_c_is_python_s():
    """A test runner's worker may leave Ctrl-C to the process that started it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(10)  # Python's handler comes at once


def test_a_signal_is_seen_from_another_thread_and_by_an_event_loop_too():
    read, write = os.pipe()
    os.set_blocking(write, False)
    outer = signal.set_wakeup_fd(write)
    try:
        with watched() as interrupted:
            assert not interrupted()
            with pytest.raises(KeyboardInterrupt):
                _send(signal.SIGINT)
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
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_others_handle_is_theirs(number):
    """A server that shuts down in its own time, a job that asks to be queued again: the loop isn't ended under them."""
    came = []
    before = signal.signal(number, lambda *_: came.append(number))
    try:
        with watched() as interrupted:
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 10
            while not came and time.monotonic() < deadline:
                time.sleep(0.01)
            assert came == [number]
            assert not interrupted()
    finally:
        signal.signal(number, before)


def test_a_sigterm_of_a_command_is_seen():
    before = signal.getsignal(signal.SIGTERM)
    interrupt_on_sigterm()
    try:
        with watched() as interrupted:
            with pytest.raises(KeyboardInterrupt):
                _send(signal.SIGTERM)
            assert interrupted()
    finally:
        signal.signal(signal.SIGTERM, before)


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
