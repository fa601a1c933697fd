"""Pixel counts of the training labels: counted once in parallel, cached, shared out over DDP processes."""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mcseg.atomic import write_atomically
from mcseg.data.files import Reader, Sample, prepare_worker
from mcseg.data.labels import DataError, MissingFileError


def default_cache_dir() -> Path:
    """Return the user's cache folder for mcseg (``$XDG_CACHE_HOME/mcseg``, or ``~/.cache/mcseg``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mcseg"


def count_class_pixels(
    reader: Reader,
    samples: Sequence[Sample],
    num_workers: int,
    cache_dir: Path | None,
    progress: bool = True,
    skip: bool = False,
) -> Tensor:
    """Count the labelled pixels of each class over ``samples``.

    The result is cached under a key made of the reader's settings (label table included) and of each mask's path, size and
    modification time; a cache file that cannot be read is counted again. In a process group each rank counts its share.

    Args:
        reader: gives the masks.
        samples: the training samples.
        num_workers: processes that decode; 0 counts in this one.
        cache_dir: folder of the cache; None counts every time.
        progress: show a bar (on rank 0).
        skip: leave out masks that cannot be used, without a word: whoever reads them for training tells of them.

    Returns:
        (C,) int64, void left out.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    key = _fingerprint(reader, samples)
    path = cache_dir / f"class_pixels-{key[:20]}.json" if cache_dir else None
    classes = reader.table.num_classes

    # Rank 0 decides for all: a rank that looked later could already find the file and leave the others waiting.
    cached = [_read_cache(path, key, classes) if rank == 0 else None]
    if distributed:
        torch.distributed.broadcast_object_list(cached)
    if cached[0] is not None:
        return torch.tensor(cached[0], dtype=torch.int64)

    share = samples[rank::world]
    # A generator of its own: without, the loader would draw from the global one, and a run that finds the counts in the
    # cache would train with other random numbers than one that counts.
    generator = torch.Generator()
    workers = min(num_workers, len(share))
    # Several masks to a message, as each costs as much as counting a small mask; few enough to keep all workers busy.
    together = max(1, min(16, len(share) // (8 * max(1, workers))))
    masks = _MaskCounts(reader, share, skip)
    loader = DataLoader(
        masks,
        together,
        num_workers=workers,
        generator=generator,
        collate_fn=_sum_up,
        worker_init_fn=prepare_worker,
    )
    total = torch.zeros(classes, dtype=torch.int64)
    with tqdm(
        desc="Counting label pixels", total=len(share), unit=" masks", disable=not progress or rank != 0, leave=False
    ) as bar:
        for counts, number in loader:
            total += counts
            bar.update(number)
    if distributed:
        # The backend's own device: gloo reduces on the CPU, NCCL only on the GPU.
        device = torch.device("cuda", torch.cuda.current_device()) if torch.distributed.get_backend() == "nccl" else "cpu"
        reduced = total.to(device)
        torch.distributed.all_reduce(reduced)
        total = reduced.cpu()
    if path is not None and rank == 0:
        _write_cache(path, key, total)
    return total


class _MaskCounts(Dataset[Tensor]):
    def __init__(self, reader: Reader, samples: Sequence[Sample], skip: bool) -> None:
        self.reader = reader
        self.samples = samples
        self.skip = skip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.reader.counts(self.samples[index])
        except DataError:
            if not self.skip:
                raise
            return torch.zeros(self.reader.table.num_classes, dtype=torch.int64)


def _sum_up(counts: list[Tensor]) -> tuple[Tensor, int]:
    return torch.stack(counts).sum(0), len(counts)


def _fingerprint(reader: Reader, samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256(repr(reader).encode())
    for sample in samples:
        digest.update(f"\n{sample.name}".encode())
        for path in (sample.mask, *sample.more_masks):
            if path is not None:
                try:
                    state = path.stat()
                except OSError as error:
                    raise MissingFileError(f"{path}: cannot be found any more ({error.strerror})") from None
                digest.update(f"|{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read_cache(path: Path | None, key: str, classes: int) -> list[int] | None:
    if path is None or not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        counts = [int(count) for count in stored["class_pixels"]]
        if stored["key"] == key and len(counts) == classes and min(counts) >= 0:
            return counts
    except (OSError, ValueError, KeyError, TypeError):
        pass
    warnings.warn(f"{path}: unusable cache of label counts, counting again", stacklevel=3)
    return None


def _write_cache(path: Path, key: str, counts: Tensor) -> None:
    text = json.dumps({"key": key, "class_pixels": counts.tolist()})
    try:
        write_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        warnings.warn(
            f"{path}: the label counts cannot be cached ({error.strerror}); they are counted again next time",
            stacklevel=3,
        )
