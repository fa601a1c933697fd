"""Atomic file writes: a crash or a full disk leaves either the old file or the complete new one."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object], *, exclusive: bool = False) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it.

    After a crash or a full disk, ``path`` is the old file or the complete new one. Missing folders are created.

    Args:
        path: the file to write; an existing one is replaced.
        write: called with the temporary path, which is in the same folder as ``path`` and has the same suffix.
        exclusive: set this if no other process writes the file at the same time. The temporary name is then always the
            same, so that the next write overwrites what a killed process left, and large leftovers do not pile up.

    Raises:
        OSError: the file cannot be written (``filename`` is ``path``, and the temporary file is removed), or its folder
            cannot be created.
    """
    owner = "" if exclusive else f".{os.getpid()}"
    temporary = path.with_name(f".{path.stem}{owner}.tmp{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # torch's writer raises its own error over the OSError
            cause = cause.__context__
        if cause is None or cause.strerror is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # renamed already, or never created
            temporary.unlink()
