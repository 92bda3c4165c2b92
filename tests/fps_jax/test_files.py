"""A new directory stands whole in its place or not at all, and never in the place of what must stay."""

import os
import pathlib

import pytest

from fps_jax.files import append_bytes, new_directory, read_json, write_together
from tests.full_disk import full_beyond


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


def test_files_that_belong_together_are_all_there_or_none(tmp_path, monkeypatch):
    first, second = tmp_path / "a.mp4.json", tmp_path / "a.mp4"
    replace = pathlib.Path.replace

    def full(self, target):
        if target == second:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(
        OSError, match=r"can't write '.*a.mp4': No space left on device; choose another path or make room"
    ):
        write_together({first: b"{}", second: b"video"})
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    write_together({first: b"{}", second: b"video"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.mp4.json": b"{}", "a.mp4": b"video"}


def test_files_that_would_have_been_replaced_together_are_all_put_back(tmp_path, monkeypatch):
    """The record of a new video beside the old video would say what isn't so."""
    first, second = tmp_path / "a.mp4.json", tmp_path / "a.mp4"
    write_together({first: b"old record", second: b"old video"})
    replace = pathlib.Path.replace
    failed = []

    def full(self, target):
        if target == second and not failed:
            failed.append(target)
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(OSError, match=r"can't write '.*a.mp4': No space left on device"):
        write_together({first: b"new record", second: b"new video"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.mp4.json": b"old record",
        "a.mp4": b"old video",
    }
    write_together({first: b"new record", second: b"new video"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.mp4.json": b"new record",
        "a.mp4": b"new video",
    }


def test_a_pipe_or_a_huge_file_is_told_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe.json is no regular file; give a file that holds its bytes"):
        read_json(tmp_path / "pipe.json")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(10**12)  # takes no room
    with pytest.raises(ValueError, match=r"huge.json has 1,000,000,000,000 bytes, more than the 64,000,000"):
        read_json(tmp_path / "huge.json")


def test_a_mount_point_and_the_empty_working_directory_are_no_destination(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, message in (
        (".", "is the working directory, which can't be renamed"),
        ("/proc", "exists and is not empty"),
    ):
        with pytest.raises((ValueError, OSError), match=message), new_directory(place):
            pass
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: pathlib.Path(path).name == "mount")
    with pytest.raises(ValueError, match="mount is a mount point, which can't be renamed"), new_directory("mount"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mount"]


def test_what_is_appended_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines"
    append_bytes(path, b"one\n")
    with full_beyond(6), pytest.raises(OSError, match="File too large; make room, then --resume") as told:
        append_bytes(path, b"two\n", "make room, then --resume")
    assert told.value.filename == str(path)
    assert path.read_bytes() == b"one\n"  # the kernel took "tw"
    append_bytes(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    with pytest.raises(IsADirectoryError, match="Is a directory") as told:
        append_bytes(tmp_path, b"x")
    assert told.value.filename == str(tmp_path)
