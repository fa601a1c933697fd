"""Files that are there whole or not at all."""

import errno
import os

import pytest

from mcseg.atomic import write_atomically
from mcseg.messages import one_line


def test_a_file_replaces_the_one_before_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    for content in ("one", "two"):
        write_atomically(path, lambda temporary, content=content: temporary.write_text(content))
        assert path.read_text() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_it_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.txt", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append((os.fstat(number).st_size, path.exists())), sync(number)))
    write_atomically(path, lambda temporary: temporary.write_text("four"))
    assert seen == [(4, False)]


@pytest.mark.parametrize("fault", [ValueError("no picture"), RuntimeError("no tensor")], ids=str)
def test_a_writer_that_fails_leaves_the_file_before(tmp_path, fault):
    def write(temporary):
        temporary.write_text("half")
        raise fault

    path = tmp_path / "a.txt"
    path.write_text("whole")
    with pytest.raises(type(fault), match=str(fault)):
        write_atomically(path, write)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.txt", "whole")]


def test_a_full_disk_is_told_in_one_line_with_the_file(tmp_path):
    """Also where a library has put an error of its own on top, as torch does."""

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


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists") as error:
        write_atomically(tmp_path / "file" / "a.txt", lambda temporary: temporary.write_text("x"))
    assert error.value.filename == str(tmp_path / "file")


def test_processes_have_temporary_names_of_their_own_unless_one_is_alone(tmp_path):
    names = []
    for exclusive in (False, True):
        write_atomically(
            tmp_path / "a.png",
            lambda temporary: (names.append(temporary.name), temporary.write_text("x")),
            exclusive=exclusive,
        )
    assert names == [f".a.{os.getpid()}.tmp.png", ".a.tmp.png"]
