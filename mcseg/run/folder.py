"""The folder of a run: its name, its lock, and its removal after a run that left nothing."""

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
    """Keep a second ``mcseg fit`` or ``compare`` out of a folder while one is at work there; made where it is missing.

    The lock belongs to this process and ends with it, however that ends. Where the file system or the system knows no locks
    nothing is kept out.

    Raises:
        RuntimeError: another process is at work there.
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
                raise RuntimeError(f"{folder}: another mcseg {verb} is at work here; wait for it, or end it") from None
        yield


# Lightning starts further DDP processes with this environment variable, and LOCAL_RANK, in place.
RUN_FOLDER = "MCSEG_RUN_FOLDER"


def run_folder(recipe: str, verb: str) -> Path:
    """Create ``runs/<recipe>/<time>``, the same folder for all processes of a run.

    It is created immediately, so that two runs started in the same second get different folders.
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
    """Remove the folder of a run that fails before it has a result, or that writes nothing."""
    settings = {"config.yaml", "hparams.yaml", LOCK}  # which loggers and the command write at once
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
            with suppress(OSError):  # it has other runs
                parent.rmdir()
