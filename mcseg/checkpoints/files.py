"""Checkpoint files, written atomically and read with ``weights_only``: untrusted files are safe to open."""

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
    """Writes checkpoints atomically, so that a crash leaves the former one intact; reads only tensors and plain types."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: the file cannot be written; a former file of that path is intact.
        """
        if storage_options is not None or "://" in str(path):  # not a file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a path, torch raises errors without the reason
                torch.save(checkpoint, file)

        try:
            write_atomically(path, write, exclusive=True)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            state = "the last checkpoint there is intact" if path.exists() else "there is no earlier one"
            raise OSError(f"{path}: the checkpoint cannot be written ({reason}); {state}") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; with ``weights_only`` False also objects other than tensors and plain types.

        Raises:
            ValueError: not a checkpoint, or one with other objects.
        """
        plain = True if weights_only is None else weights_only
        with _clear_errors(path):
            return super().load_checkpoint(path, map_location, plain)


@contextmanager
def _clear_errors(path: Any) -> Iterator[None]:
    """Report in one line why a file is not a checkpoint."""
    is_file = isinstance(path, str | Path) and "://" not in str(path) and Path(path).is_file()
    if is_file and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a checkpoint, or an incomplete one; expected a .ckpt file of mcseg fit")
    try:
        yield
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        kind = f" ({name[1]})" if name else ""
        raise ValueError(
            f"{path}: holds other objects than tensors and plain types{kind}, which are not loaded, as they could run any "
            "code (weights_only); expected a .ckpt file of mcseg fit"
        ) from None


def read_checkpoint(source: Any) -> dict[str, Any]:
    """Read a checkpoint of this package to the CPU; a file is memory-mapped, so that unused tensors are not read.

    Args:
        source: path, URL or open file; a file is rewound.

    Returns:
        The checkpoint's dict, with at least ``state_dict``.

    Raises:
        ValueError: not a checkpoint, or one with other objects than tensors and plain types.
        FileNotFoundError: no such file.
    """
    with _clear_errors(source):
        if isinstance(source, str | Path) and "://" in str(source):
            checkpoint = load_from_url(source)
        else:
            mapped = isinstance(source, str | Path)
            checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    if hasattr(source, "seek"):
        source.seek(0)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{source}: holds no state_dict; expected a .ckpt file of mcseg fit")
    return checkpoint


def written_by(checkpoint: Mapping[str, Any]) -> str:
    """Describe the version that wrote a checkpoint and the installed one, for messages."""
    writer = f"mcseg {checkpoint[VERSION]}" if VERSION in checkpoint else "an earlier mcseg"
    return f"written by {writer}, this is {__version__}"


def steps_done(path: Path) -> int:
    """Return the number of training steps completed at a checkpoint."""
    return int(read_checkpoint(path)["global_step"])
