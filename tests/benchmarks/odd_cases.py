"""Cases that misbehave, for the tests of the runner. Called in a process of their own."""

import subprocess
import sys
import time


def good(toy: bool, *, seconds: float = 1.5) -> dict:
    return {"part": "good", "ok": True, "seconds": seconds}


def wrong(toy: bool) -> dict:
    return {"part": "bad", "ok": False, "rel_l2": float("nan")}


def hang(toy: bool):
    """Says one thing, starts a process that would outlive it, and never ends."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield {"part": "before", "child": child.pid}
    time.sleep(100)


def fail(toy: bool):
    yield {"part": "before"}
    raise RuntimeError("no such instruction")
