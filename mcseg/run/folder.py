"""The folder of a run: its name, its lock, and its removal if it holds no results."""

import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

LOCK = ".lock"  # file in the folder of a run


@contextmanager
def exclusive_lock(folder: Path, verb: str) -> Iterator[None]:
    """Lock a folder against a second ``mcseg fit`` or ``mcseg compare``.

    The operating system releases the lock when this process ends, also after a crash. On Windows, and on file systems
    without locks, nothing is locked.

    Args:
        folder: created if it is missing.
        verb: ``fit`` or ``compare``, for the message.

    Raises:
        RuntimeError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise RuntimeError(
                    f"{folder}: another mcseg {verb} uses this folder; wait until it ends, stop it, or choose another folder"
                ) from None
        yield


# Environment variable by which the DDP processes that Lightning starts find the folder
RUN_FOLDER = "MCSEG_RUN_FOLDER"


def run_folder(recipe: str, verb: str) -> Path:
    """Create ``runs/<recipe>/<time>`` and return it, the same for all processes of a run.

    It is created immediately, so that two runs started in the same second get different folders.

    Args:
        recipe: name of the recipe.
        verb: added to the name unless it is ``fit``.
    """
    if "LOCAL_RANK" in os.environ and RUN_FOLDER in os.environ:
        return Path(os.environ[RUN_FOLDER])
    stem = Path("runs") / recipe / (datetime.now().strftime("%Y%m%d-%H%M%S") + ("" if verb == "fit" else f"-{verb}"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    folder = stem
    for copy in itertools.count(2):
        with suppress(FileExistsError):
            folder.mkdir()
            break
        folder = stem.with_name(f"{stem.name}-{copy}")
    os.environ[RUN_FOLDER] = str(folder)
    return folder


@contextmanager
def run_folder_tidied() -> Iterator[None]:
    """Remove the folder that :func:`run_folder` created if the run fails before it has a result, or writes nothing."""
    settings = {"config.yaml", "hparams.yaml", LOCK}  # written before the first result
    try:
        yield
    except BaseException:
        _remove_if_only(settings)
        raise
    _remove_if_only(set())


def _remove_if_only(names: set[str]) -> None:
    folder = Path(os.environ.get(RUN_FOLDER, ""))
    if RUN_FOLDER in os.environ and all(path.is_dir() or path.name in names for path in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)
        for parent in list(folder.parents)[:2]:
            with suppress(OSError):  # holds other runs
                parent.rmdir()
