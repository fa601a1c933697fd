"""Atomic file writes."""

import errno
import os

import pytest

from mcseg.atomic import write_atomically
from mcseg.messages import one_line


def test_the_new_file_replaces_the_old_one_and_no_temporary_file_remains(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    for content in ("one", "two"):
        write_atomically(path, lambda temporary, content=content: temporary.write_text(content))
        assert path.read_text() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_the_content_is_flushed_before_the_rename(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.txt", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append((os.fstat(number).st_size, path.exists())), sync(number)))
    write_atomically(path, lambda temporary: temporary.write_text("four"))
    assert seen == [(4, False)]


@pytest.mark.parametrize("fault", [ValueError("no picture"), RuntimeError("no tensor")], ids=str)
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, fault):
    def write(temporary):
        temporary.write_text("half")
        raise fault

    path = tmp_path / "a.txt"
    path.write_text("whole")
    with pytest.raises(type(fault), match=str(fault)):
        write_atomically(path, write)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.txt", "whole")]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    """Also if a library raises its own error over the OSError, as torch does."""

    def write(temporary):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    for case in (write, lambda temporary: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))):
        with pytest.raises(OSError, match="No space left on device") as error:
            write_atomically(tmp_path / "a.txt", case)
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "a.txt"))
        assert one_line(error.value).startswith(f"{tmp_path}/a.txt: No space left on device; free some space")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists") as error:
        write_atomically(tmp_path / "file" / "a.txt", lambda temporary: temporary.write_text("x"))
    assert error.value.filename == str(tmp_path / "file")


def test_temporary_names_differ_between_processes_unless_exclusive(tmp_path):
    names = []
    for exclusive in (False, True):
        write_atomically(
            tmp_path / "a.png",
            lambda temporary: (names.append(temporary.name), temporary.write_text("x")),
            exclusive=exclusive,
        )
    assert names == [f".a.{os.getpid()}.tmp.png", ".a.tmp.png"]
