"""--profile, which commands share."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

from fps_jax.progress import Quiet


@contextlib.contextmanager
def profiled(folder: pathlib.Path | None, what: str, output: pathlib.Path) -> Iterator[None]:
    """`fps_jax.profiling.stages.profile`, and a word of where it is; nothing for None.

    Args:
      output: a file that the command writes, which mustn't lie where the profile's folder is put.
    Raises: ValueError or OSError for a folder that can't be written, or isn't empty.
    """
    if folder is None:
        yield
        return
    place, written = folder.expanduser().resolve(), output.expanduser().resolve()
    if place == written or place in written.parents:
        raise ValueError(f"profile={str(folder)!r} is where {str(output)!r} is written; give a folder of its own")
    from fps_jax.profiling.stages import profile

    with profile(folder, what):
        yield
    print(f"wrote {folder / 'profile.html'}", file=Quiet(sys.stderr))
