"""Commands in processes of their own: none outlives whoever started it."""

import pathlib
import sys

import pytest

from fps_jax import processes


def test_whoever_interrupts_leaves_no_process_behind():
    said = []

    def interrupted(result: dict) -> None:
        said.append(result)
        raise KeyboardInterrupt

    code = "import os, time\nfrom fps_jax.processes import say\nsay({'id': os.getpid()})\ntime.sleep(100)"
    with pytest.raises(KeyboardInterrupt):
        processes.run([sys.executable, "-c", code], environment={}, hear=interrupted)
    assert not pathlib.Path(f"/proc/{said[0]['id']}").exists()
