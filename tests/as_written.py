"""A file as others see it while it is written."""

import io
import pathlib


def watch_writes(monkeypatch, path: pathlib.Path) -> list[bytes]:
    """What a file that is then opened by `Path.open` to be written holds after each write that the system is asked for."""
    seen: list[bytes] = []
    real = pathlib.Path.open

    class Watched(io.FileIO):
        def write(self, part, /) -> int:
            count = super().write(part)
            seen.append(path.read_bytes())
            return count

    def watched(self, mode="r", *args, **options):
        return Watched(self, mode) if self == path and mode == "wb" else real(self, mode, *args, **options)

    monkeypatch.setattr(pathlib.Path, "open", watched)
    return seen
