"""How long work says how far it is: a function to call, and a bar on the terminal that is one."""

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[int, int], None]  # (done, in all), of whatever is counted: steps, chunks of frames
Moved = Callable[[int], object]  # bytes read or written since the last call


@contextlib.contextmanager
def progress_bar(label: str, show: bool | None) -> Iterator[Progress]:
    """A `Progress` that moves a bar on stderr. show: None for only on a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, disable=None if show is None else not show, dynamic_ncols=True) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextlib.contextmanager
def bytes_bar(label: str, total: int) -> Iterator[Moved]:
    """A bar on stderr for what takes longer than two seconds; only on a terminal, so that logs hold whole lines."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
        yield bar.update
