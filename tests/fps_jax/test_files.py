"""A new directory stands whole in its place or not at all, and never in the place of what must stay."""

import os
import pathlib

import pytest

from fps_jax.files import new_directory


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    out = tmp_path / "a" / "out"

    def fail():
        with new_directory(out) as fresh:
            (fresh / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
    with new_directory(out) as fresh:
        (fresh / "one").write_text("1")
        assert not out.exists()
    assert (out.stat().st_mode & 0o777) == 0o777 & ~_umask()
    with pytest.raises(RuntimeError), new_directory(out, overwrite=True) as fresh:
        raise RuntimeError
    assert [path.name for path in out.iterdir()] == ["one"]
    with new_directory(out, overwrite=True) as fresh:
        (fresh / "two").write_text("2")
    assert [path.name for path in out.iterdir()] == ["two"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("kept")
    rename = pathlib.Path.rename

    def fail(self, target):
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), new_directory(out, overwrite=True) as fresh:
        (fresh / "new").write_text("x")
    assert (out / "old").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_working_directory_is_never_overwritten(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "inner").mkdir()
    for place in (tmp_path, tmp_path / "inner"):
        monkeypatch.chdir(place)
        with (
            pytest.raises(ValueError, match="is the home or the working directory"),
            new_directory(tmp_path, overwrite=True),
        ):
            pass
    assert (tmp_path / "file").exists()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
