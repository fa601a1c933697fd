"""Files that are there whole or not at all, whatever happens while they are written."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object], *, exclusive: bool = False) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it.

    After a crash or a full disk the file is the one from before, or the new one; never a part of it. Folders that are
    missing are made.

    Args:
        path: the file; one that is there is replaced.
        write: called with the temporary path, which is beside ``path`` and has the same suffix.
        exclusive: no other process writes this file at the same time. The temporary name is then always the same, so that
            what a killed process has left is written over, and large files do not gather.

    Raises:
        OSError: it could not be written, with the reason and ``path`` as ``filename``; no temporary file is left. Or its
            folder could not be made.
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
        while cause is not None and not isinstance(cause, OSError):  # torch's writer has errors of its own on top
            cause = cause.__context__
        if cause is None or cause.strerror is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # it has been renamed, or was never there
            temporary.unlink()
