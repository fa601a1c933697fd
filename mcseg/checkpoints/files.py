"""Checkpoint files: written atomically, read without unpickling anything but tensors and plain types."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from mcseg.atomic import write_atomically
from mcseg.lightning_internals import load_from_url
from mcseg.version import __version__

VERSION = "mcseg_version"  # key of a checkpoint


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: there is a whole one at every moment. Unpickles nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written; what was at its place before is still there.
        """
        if storage_options is not None or "://" in str(path):  # not a file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a path, torch would write with errors that do not tell the reason
                torch.save(checkpoint, file)

        try:
            write_atomically(place, write, exclusive=True)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            before = "the checkpoint that was there before is whole" if place.exists() else "there is none"
            raise OSError(f"{place}: the checkpoint cannot be written ({reason}); {before}") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; one that holds other objects than tensors and plain types is refused, unless told otherwise."""
        plain = True if weights_only is None else weights_only
        with _refusing(path):
            return super().load_checkpoint(path, map_location, plain)


@contextmanager
def _refusing(path: Any) -> Iterator[None]:
    """Say in one line why a file is no checkpoint."""
    is_file = isinstance(path, str | Path) and "://" not in str(path) and Path(path).is_file()
    if is_file and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a checkpoint, or one that was cut off; expected a .ckpt file as mcseg fit writes it")
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        kind = f" ({found[1]})" if found else ""
        raise ValueError(
            f"{path}: holds other objects than tensors and plain types{kind}, which are not loaded (weights_only), as they "
            "could run any code; expected a .ckpt file as mcseg fit writes it"
        ) from None


def read_checkpoint(source: Any) -> dict[str, Any]:
    """Read a checkpoint of this package to the CPU; of a file, the tensors only when they are used.

    Args:
        source: path, URL, or open file, which is left at its beginning.

    Raises:
        ValueError: not a checkpoint, or one with other objects than tensors and plain types.
        FileNotFoundError: no such file.
    """
    with _refusing(source):
        if isinstance(source, str | Path) and "://" in str(source):
            checkpoint = load_from_url(source)
        else:
            mapped = isinstance(source, str | Path)
            checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    if hasattr(source, "seek"):
        source.seek(0)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{source}: holds no state_dict; expected a .ckpt file as mcseg fit writes it")
    return checkpoint


def written_by(checkpoint: Mapping[str, Any]) -> str:
    """Say which version of the package wrote a checkpoint, and which this is."""
    writer = f"mcseg {checkpoint[VERSION]}" if VERSION in checkpoint else "an earlier mcseg"
    return f"written by {writer}, this is {__version__}"


def steps_done(path: Path) -> int:
    """Training steps that are behind a checkpoint."""
    return int(read_checkpoint(path)["global_step"])
