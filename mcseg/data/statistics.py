"""Statistics of the training data: pixels per class, mean and deviation per band; in parallel, over processes, cached."""

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mcseg.atomic import write_atomically
from mcseg.data.files import Reader, Sample, prepare_worker
from mcseg.data.images import ImageFormat
from mcseg.data.labels import DataError, MissingFileError


def default_cache_dir() -> Path:
    """Return the user's cache folder for mcseg (``$XDG_CACHE_HOME/mcseg``, or ``~/.cache/mcseg``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mcseg"


def absent_classes(names: Sequence[str], pixels: Tensor, split: str, hint: bool = True) -> str:
    """Return one line that names the classes without a pixel; "" if there is none.

    Args:
        names: Names of the C classes.
        pixels: (C,) labelled pixels of each class.
        split: Name of the split, for the message.
        hint: Whether to explain masks of 0 and 255 if one of two classes is absent.
    """
    absent = [f"{names[index]} (train id {index})" for index in (pixels == 0).nonzero().flatten().tolist()]
    if not absent:
        return ""
    if not pixels.any():
        remedy = "; the value 255 is void: if it stands for a class, give it to the class in classes.toml" if hint else ""
        return f"no pixel of the {split} labels has a class, all are void{remedy}"
    if len(absent) > 1:
        return f"classes {', '.join(absent[:-1])} and {absent[-1]} have no pixel in the {split} labels"
    remedy = ""
    if hint and len(names) == 2:  # some tools save a binary mask as 0 and 255, and 255 is void
        remedy = "; if its value in the masks is 255, write id = 255 in classes.toml"
    elif hint and not pixels[0]:  # some tools number the classes from 1
        remedy = "; if the values of the masks begin at 1, write the id of each class in classes.toml"
    return f"class {absent[0]} has no pixel in the {split} labels{remedy}"


def count_class_pixels(
    reader: Reader,
    samples: Sequence[Sample],
    num_workers: int,
    cache_dir: Path | None,
    progress: bool = True,
    skip: bool = False,
) -> Tensor:
    """Count the labelled pixels of each class over ``samples``.

    The cache key is made of the reader's settings (label table included) and of each mask's path, size and modification
    time. If the cache file cannot be read, the masks are counted again. In a process group each rank counts its share.

    Args:
        reader: Reader of the masks.
        samples: The training samples.
        num_workers: Number of worker processes; 0 counts in this process.
        cache_dir: Folder of the cache; None disables the cache.
        progress: Whether to show a progress bar (on rank 0).
        skip: Whether to skip unusable masks; the training loader warns about them.

    Returns:
        (C,) int64 pixel counts without void.

    Raises:
        DataError: A mask is unusable and ``skip`` is not set, or a mask file does not exist.
    """
    return _total(
        "class_pixels",
        _MaskCounts(reader, samples, skip),
        key=_fingerprint(repr(reader), samples, masks=True),
        num_workers=num_workers,
        cache_dir=cache_dir,
        progress=progress,
    )


def band_statistics(
    reader: Reader,
    samples: Sequence[Sample],
    settings: ImageFormat,
    num_workers: int,
    cache_dir: Path | None,
    progress: bool = True,
    skip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each band over all pixels of the images, as values in [0, 1].

    They are cached and divided among processes like the counts of `count_class_pixels`.

    Args:
        reader: Reader of the images.
        samples: The training samples.
        settings: Bands and values of the images.
        num_workers: Number of worker processes; 0 reads in this process.
        cache_dir: Folder of the cache; None disables the cache.
        progress: Whether to show a progress bar (on rank 0).
        skip: Whether to skip unusable images.

    Returns:
        (bands,) mean and (bands,) standard deviation, float64.

    Raises:
        DataError: An image is unusable and ``skip`` is not set, or a file does not exist.
    """
    sums = _total(
        "band_sums",
        _BandSums(reader, samples, settings.bands, skip),
        key=_fingerprint(f"{reader!r} {settings!r}", samples, masks=False),
        num_workers=num_workers,
        cache_dir=cache_dir,
        progress=progress,
    )
    pixels, total, squares = sums[0], *sums[1:].chunk(2)
    mean = total / pixels.clamp(min=1)
    return mean, (squares / pixels.clamp(min=1) - mean**2).clamp(min=0).sqrt()


_TITLES = {"class_pixels": ("Counting label pixels", " masks"), "band_sums": ("Averaging bands", " images")}


def _total(kind: str, dataset: "_Summed", *, key: str, num_workers: int, cache_dir: Path | None, progress: bool) -> Tensor:
    """Sum the items of a data set over all processes, or return the cached sum."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    path = cache_dir / f"{kind}-{key[:20]}.json" if cache_dir else None

    # Rank 0 decides for all ranks: one that looked later might already find the file, and the reduction below would hang.
    cached = [_read_cache(path, key, kind, dataset.zero) if rank == 0 else None]
    if distributed:
        torch.distributed.broadcast_object_list(cached)
    if cached[0] is not None:
        return torch.tensor(cached[0], dtype=dataset.zero.dtype)

    share = dataset.part(rank, world)
    # A separate generator: with the global one, a run that counts would train with other random numbers than a run that
    # finds the counts in the cache.
    generator = torch.Generator()
    workers = min(num_workers, len(share))
    # A worker's message costs as much as counting a small mask, so each covers several masks, few enough to keep all
    # workers busy.
    masks_per_message = max(1, min(16, len(share) // (8 * max(1, workers))))
    loader = DataLoader(
        share,
        batch_size=masks_per_message,
        num_workers=workers,
        generator=generator,
        collate_fn=_sum_items,
        worker_init_fn=prepare_worker,
    )
    total = torch.zeros_like(dataset.zero)
    title, unit = _TITLES[kind]
    with tqdm(desc=title, total=len(share), unit=unit, disable=not progress or rank != 0, leave=False) as bar:
        for values, number in loader:
            total += values
            bar.update(number)
    if distributed:
        # Gloo reduces on the CPU, NCCL only on the GPU.
        device = torch.device("cuda", torch.cuda.current_device()) if torch.distributed.get_backend() == "nccl" else "cpu"
        reduced = total.to(device)
        torch.distributed.all_reduce(reduced)
        total = reduced.cpu()
    if path is not None and rank == 0:
        _write_cache(path, key, kind, total)
    return total


class _Summed(Dataset[Tensor]):
    """A tensor of each sample, to be summed over all samples; ``zero`` is the tensor of an unusable sample."""

    def __init__(self, reader: Reader, samples: Sequence[Sample], zero: Tensor, skip: bool) -> None:
        self.reader = reader
        self.samples = samples
        self.zero = zero
        self.skip = skip

    def part(self, rank: int, world: int) -> Self:
        """Return the samples of one process."""
        share = copy.copy(self)
        share.samples = self.samples[rank::world]
        return share

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.values(self.samples[index])
        except DataError:
            if not self.skip:
                raise
            return self.zero

    def values(self, sample: Sample) -> Tensor:
        raise NotImplementedError


class _MaskCounts(_Summed):
    """Pixel counts (C,) int64 of each sample's mask."""

    def __init__(self, reader: Reader, samples: Sequence[Sample], skip: bool) -> None:
        super().__init__(reader, samples, torch.zeros(reader.table.num_classes, dtype=torch.int64), skip)

    def values(self, sample: Sample) -> Tensor:
        return self.reader.counts(sample)


class _BandSums(_Summed):
    """Number of pixels, sum of each band and sum of its squares, (1 + 2 bands,) float64, of each sample's image."""

    def __init__(self, reader: Reader, samples: Sequence[Sample], bands: int, skip: bool) -> None:
        super().__init__(reader, samples, torch.zeros(1 + 2 * bands, dtype=torch.float64), skip)

    def values(self, sample: Sample) -> Tensor:
        image = self.reader.image(sample)
        if image.dtype == torch.uint8:  # exact, and faster than with floating point
            counts = torch.stack([torch.bincount(band.flatten(), minlength=256) for band in image]).double()
            level = torch.arange(256).double() / 255
            sums, squares = counts @ level, counts @ level**2
        else:
            bands = image.flatten(1).double()
            sums, squares = bands.sum(1), (bands**2).sum(1)
        return torch.cat([torch.tensor([image[0].numel()]).double(), sums, squares])


def _sum_items(items: list[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of the items and their number."""
    return torch.stack(items).sum(0), len(items)


def _fingerprint(settings: str, samples: Sequence[Sample], *, masks: bool) -> str:
    digest = hashlib.sha256(settings.encode())
    for sample in samples:
        digest.update(f"\n{sample.name}".encode())
        for path in (sample.mask, *sample.more_masks) if masks else (sample.image,):
            if path is not None:
                try:
                    status = path.stat()
                except OSError as error:
                    if not masks and isinstance(error, FileNotFoundError):
                        continue  # a drawn image
                    raise MissingFileError(
                        f"{path}: the mask no longer exists ({error.strerror}); restore it or remove its image"
                    ) from None
                digest.update(f"|{path.resolve()}|{status.st_size}|{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read_cache(path: Path | None, key: str, kind: str, zero: Tensor) -> list[float] | None:
    if path is None or not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        values = [float(value) if zero.is_floating_point() else int(value) for value in stored[kind]]
        if stored["key"] == key and len(values) == len(zero) and min(values) >= 0:
            return values
    except (OSError, ValueError, KeyError, TypeError):
        pass
    warnings.warn(f"{path}: the cache of label counts cannot be used; counting the labels again", stacklevel=3)
    return None


def _write_cache(path: Path, key: str, kind: str, total: Tensor) -> None:
    text = json.dumps({"key": key, kind: total.tolist()})
    try:
        write_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        warnings.warn(
            f"{path}: the label counts cannot be cached ({error.strerror}), so the next run counts them again; "
            "set data.cache_dir to a writable folder",
            stacklevel=3,
        )
