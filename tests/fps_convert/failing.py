"""What every test of bad input looks at: the one line, the exit status, and that nothing changed."""

import pathlib

import pytest

import fps_convert.cli


def snapshot(root: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"dir" for p in sorted(root.rglob("*"))}


def fails(capsys, *argv) -> str:
    """The one line that `fps-convert *argv` ends with."""
    with pytest.raises(SystemExit) as stop:
        fps_convert.cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err
