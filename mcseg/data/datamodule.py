"""Base class of all data sets: lists samples per split and gives batches."""

import fnmatch
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mcseg.data.batches import Batch, TrainingCrops, TrainingOrder, WholeImages, WideningLoader, collate, warn_skipped
from mcseg.data.files import FileReader, Reader, Sample, images_below, prepare_worker
from mcseg.data.images import ImageFormat, UsedValues
from mcseg.data.labels import DataError, LabelTable, MissingFileError
from mcseg.data.sources import MAX_PIXELS
from mcseg.data.statistics import absent_classes, band_statistics, count_class_pixels, default_cache_dir
from mcseg.data.transforms import TrainingTransform
from mcseg.palette import Color

SPLITS = ("train", "val", "test")
_LOOKS = 8  # images of a split that are decoded at most before training


class SegmentationData(pl.LightningDataModule):
    """Images and masks as batches for training, validation, test and prediction.

    To add a data set, write a subclass that passes its label table and lists its samples in `samples`. A batch is a
    dict:

    - ``image``: (N,bands,h,w), uint8 for images of 8 bits, otherwise float32 in [0, 1];
    - ``mask``: (N,H,W) int64, train ids 0..C-1 and void 255; not in prediction;
    - ``name``: list of N str;
    - ``size``: list of N (height, width) of the image files; only in prediction;
    - ``tags``: list of N dict with the georeferencing tags of a TIFF file; only in prediction.

    In training, image and mask are the same crop. In evaluation, the image is the whole image resized by ``image_scale``
    and the mask keeps its stored size, at which predictions are scored.

    Args:
        table: Names, palette and raw ids of the classes.
        root: Folder of the data set.
        batch_size: Training images per process and step.
        total_batch_size: Training images per step over all processes, instead of ``batch_size``; 1 and 8 GPUs then take
            the same steps.
        eval_batch_size: Validation and test images per step; more than 1 needs images of equal size.
        num_workers: Number of loader processes; -1 uses one per core, at most 8.
        crop_size: (height, width) of the training crop in pixels of the network's input.
        image_scale: Factor by which images are resized for the network.
        scale_range: (smallest, largest) further random scale factor of training images.
        max_class_share: A training crop is drawn again if one class covers more than this share of its labelled pixels.
        flip: Whether to flip half of the training images horizontally.
        color_jitter: Strength of brightness, contrast and saturation jitter, 0 to 1; 0 disables it. Images of other than 3
            bands get no jitter of saturation, and the contrast of each band changes about its own mean.
        rare_crop_share: Probability that a training crop is centred on a pixel of a random class of the image, drawn with
            the inverse of the classes' training pixels as weights; 0 draws all crops uniformly.
        max_side: Images with a longer side above this are first shrunk to it; for data sets with very large images.
            Predictions are still scored at the mask's stored size.
        predict_root: Image file, folder that is searched with its subfolders, glob pattern, or a list of these, for
            ``predict``; None predicts the images of ``predict_split``.
        predict_split: Split to predict if ``predict_root`` is not given; a missing test split is replaced by the
            validation split.
        held_out: Glob patterns of names of training images, for example ``0006R0_*`` for one of CamVid's sequences. Matching
            images are removed from training and replace the validation split, so that settings can be tuned without using
            that split.
        on_error: How to handle an unusable image or mask: ``"stop"`` stops the run and names the file; ``"skip"`` uses the
            next image in training, skips the image in evaluation, and lists all skipped images at the end.
        bands: Number of bands of the images, which the network takes: 3 for RGB, 1 for grey, or any other for TIFF, PNG and
            NPY files. Grey and palette files are converted to 3 bands.
        value_range: (smallest, largest) stored value, which become 0 and 1, such as (0, 4095) for 12 bits in 16, or
            (0, 10000) for reflectances; values outside become 0 or 1. None is 0..255 for 8-bit integers, 0..65535 for
            16-bit integers and 0..1 for floating point. In evaluation and prediction, None is the range of the training.
        show_bands: Numbers, from 1, of one or three bands that pictures show; None shows the first three, or the first if
            there are fewer.
        max_pixels: Largest number of pixels of an image; None is Pillow's limit, 178,956,970.
        cache_dir: Folder for the cached counts of label pixels; None uses the user's cache folder.

    Raises:
        DataError: A setting is out of range.
    """

    def __init__(
        self,
        table: LabelTable,
        root: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 8,
        total_batch_size: int | None = None,
        eval_batch_size: int = 1,
        num_workers: int = -1,
        crop_size: tuple[int, int] = (512, 512),
        image_scale: float = 1.0,
        scale_range: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        flip: bool = True,
        color_jitter: float = 0.3,
        rare_crop_share: float = 0.0,
        max_side: int | None = None,
        predict_root: list[str] | str | os.PathLike[str] | None = None,
        predict_split: Literal["train", "val", "test"] = "test",
        held_out: Sequence[str] = (),
        on_error: Literal["stop", "skip"] = "stop",
        bands: int = 3,
        value_range: tuple[float, float] | None = None,
        show_bands: Sequence[int] | None = None,
        max_pixels: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in {
            "batch_size": batch_size,
            "total_batch_size": 1 if total_batch_size is None else total_batch_size,
            "eval_batch_size": eval_batch_size,
            "crop_size": min(crop_size),
            "image_scale": image_scale,
            "scale_range": min(scale_range),
            "max_side": 1 if max_side is None else max_side,
        }.items():
            if value <= 0:
                raise DataError(f"data.{name}: found {value}, expected a positive number")
        if scale_range[0] > scale_range[1]:
            raise DataError(f"data.scale_range: found {list(scale_range)}, expected [smallest, largest]; swap the values")
        if not 0 < max_class_share <= 1:
            raise DataError(f"data.max_class_share: found {max_class_share}, expected a share above 0 and up to 1")
        for name, value in {"color_jitter": color_jitter, "rare_crop_share": rare_crop_share}.items():
            if not 0 <= value <= 1:
                raise DataError(f"data.{name}: found {value}, expected 0 to 1")
        if on_error not in ("stop", "skip"):
            raise DataError(f"data.on_error: found {on_error!r}, expected stop or skip")
        if show_bands is not None and not (len(show_bands) in (1, 3) and all(1 <= band <= bands for band in show_bands)):
            raise DataError(f"data.show_bands: found {list(show_bands)}, expected one or three numbers from 1 to {bands}")
        self.images = ImageFormat(
            bands,
            value_range=None if value_range is None else (float(value_range[0]), float(value_range[1])),
            max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
        )
        self.show_bands = tuple(show_bands or ((1, 2, 3) if bands >= 3 else (1,)))
        self.reader: Reader = FileReader(table, images=self.images)
        self.root = Path(root).expanduser() if root is not None else None
        self.batch_size = batch_size
        self.total_batch_size = total_batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = min(8, _cores()) if num_workers < 0 else num_workers
        self.image_scale = image_scale
        self.max_side = max_side
        low, high = scale_range
        self.train_transform = TrainingTransform(
            crop_size,
            scale_range=(low * image_scale, high * image_scale),
            max_class_share=max_class_share,
            flip=flip,
            color_jitter=color_jitter,
            max_side=max_side,
            rare_crop_share=rare_crop_share,
        )
        given = [predict_root] if isinstance(predict_root, str | os.PathLike) else predict_root or ()
        self.predict_roots = tuple(Path(path).expanduser() for path in given)
        self.predict_split = predict_split
        self.held_out = tuple(held_out)
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        self.skips = on_error == "skip"
        self._skipped: dict[str, str] = {}  # sample's name -> reason
        self._splits: dict[str, list[Sample]] = {}
        self._looked_at: set[str] = set()  # splits
        self._class_pixels: Tensor | None = None

    @property
    def withheld(self) -> tuple[str, ...]:
        """Splits whose labels are not public."""
        return ()

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self.reader.table.num_classes

    @property
    def bands(self) -> int:
        """Number of bands of an image, the channels of the network's input."""
        return self.images.bands

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class by train id."""
        return self.reader.table.names

    @property
    def palette(self) -> tuple[Color, ...]:
        """RGB colour of each class by train id."""
        return self.reader.table.palette

    @property
    def prediction_settings(self) -> dict[str, Any]:
        """Arguments that change how images are given to the network, or shown; checkpoints store them for prediction."""
        return {"image_scale": self.image_scale, "max_side": self.max_side, "show_bands": list(self.show_bands)}

    @property
    def random_split(self) -> dict[str, Any] | None:
        """Settings of the random split, which checkpoints store; None if the split is not random."""
        return None

    def set_palette(self, palette: Sequence[Sequence[int]]) -> None:
        """Set the RGB colour of each class, for prediction with the colours of a checkpoint."""
        if isinstance(self.reader, FileReader):
            colors = tuple((int(r), int(g), int(b)) for r, g, b in palette)
            self.reader = replace(self.reader, table=replace(self.reader.table, palette=colors))

    @property
    def recipe(self) -> str:
        """Name of the packaged recipe of these data, for messages."""
        return "folder"

    @property
    def check_command(self) -> str:
        """The command that lists all problems of these data, for messages."""
        return f"mcseg check {self.recipe}" + (f" --root {shlex.quote(str(self.root))}" if self.root else "")

    def samples(self, split: str) -> list[Sample]:
        """List the samples of ``train``, ``val`` or ``test``, sorted; empty if the data set has no such split.

        Files are listed but not opened: an image without a mask has ``mask=None``, and `setup` finds broken files.
        """
        raise NotImplementedError

    def remarks(self, split: str) -> list[str]:
        """List warnings about a usable split, one line each; none by default."""
        return []

    def layout(self) -> list[str]:
        """Describe where images, masks and classes were found, one line each; none by default."""
        return []

    def expected(self, split: str) -> str:
        """Describe the files that a split needs and how to get them, for messages; "" by default."""
        return ""

    def setup(self, stage: str = "fit") -> None:
        """List the splits of the stage and open every header once, so that bad files stop the run before it starts."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]
        for split in splits:
            self._prepared(split)
        if stage == "fit":
            self._look_at_images("train")

    def _prepared(self, split: str) -> list[Sample]:
        """Return the samples of a split, listed and verified at the first call."""
        if split not in self._splits:
            self._splits[split] = self._prepare(split)
        return self._splits[split]

    def _prepare(self, split: str) -> list[Sample]:
        if split == "predict" and self.predict_roots:
            return images_below(*self.predict_roots)
        source = self.predict_split if split == "predict" else split
        samples = self._samples_in_use(source)
        reason = "" if samples else "no test split found"
        if split == "test" and split in self.withheld:
            reason = "the labels of the test split are not public"
        if source == "test" and reason:
            rank_zero_warn(f"{type(self).__name__}: {reason}, using the validation split instead")
            source, samples = "val", self._samples_in_use("val")
        if not samples:
            raise DataError(
                f"{type(self).__name__}: the {split} split of {self.root} is empty; "
                f"{self.expected(source) or 'expected at least one image'}; run {self.check_command}"
            )
        for remark in self.remarks(source):
            rank_zero_warn(remark)
        usable = [sample for sample in samples if self._is_usable(sample, source, masks=split != "predict")]
        if not usable:
            raise DataError(
                f"{type(self).__name__}: no image of the {split} split of {self.root} can be used; run {self.check_command}"
            )
        return usable

    def _is_usable(self, sample: Sample, split: str, masks: bool) -> bool:
        """Whether the headers can be read and fit; if not, raise DataError or record that the sample is skipped."""
        try:
            self.reader.verify(sample, masks)
        except DataError as error:
            if not self.skips:
                expected = self.expected(split) if isinstance(error, MissingFileError) else ""
                advice = f"{self.check_command} lists all problems" if masks else ""
                raise DataError("; ".join(part for part in (str(error), expected, advice) if part)) from None
            if self.trainer is None or self.trainer.is_global_zero:  # all processes skip the same samples here
                self._record_skipped({sample.name: str(error)})
            return False
        return True

    def _look_at_images(self, split: str) -> None:
        """Decode some images of a split: raise DataError if bands would be dropped or all pixels be nearly black.

        It ends at the first image with the usual range of values and nothing to drop. `setup` cannot do this for a network
        from a checkpoint, which may give the range of values.
        """
        samples = self._prepared(split)
        if split in self._looked_at or not isinstance(self.reader, FileReader):
            return
        used = UsedValues(self.images)
        advice = f"; {self.check_command} lists all problems" if split != "predict" else ""
        for sample in samples[:: -(-len(samples) // _LOOKS)]:
            try:
                header, largest = self.images.look(sample.image)
            except DataError as error:
                if self.skips:
                    continue
                raise DataError(f"{error}{advice}") from None
            used.add(sample.image, header.dtype, largest)
            if not used.problems() and not header.alpha:
                break
        if problems := used.problems():
            raise DataError("; ".join(problems) + advice)
        self._looked_at.add(split)

    def _record_skipped(self, skipped: Mapping[str, str]) -> None:
        """Record skipped samples and warn once about each."""
        for name, reason in skipped.items():
            if name not in self._skipped:
                warn_skipped(reason)
        self._skipped |= skipped

    def state_dict(self) -> dict[str, Any]:
        """Return the range of values that the network is trained with, for the checkpoint."""
        return {"value_range": None if self.images.value_range is None else list(self.images.value_range)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the range of values from a checkpoint unless one is set; warn if it is another."""
        stored, own = state_dict.get("value_range"), self.images.value_range
        if stored is None:
            return
        if own is None:
            self.images = replace(self.images, value_range=(float(stored[0]), float(stored[1])))
            if isinstance(self.reader, FileReader):
                self.reader = replace(self.reader, images=self.images)
        elif tuple(stored) != own:
            rank_zero_warn(f"data.value_range: found {list(own)}, but the network was trained with {stored}")

    def teardown(self, stage: str) -> None:
        """List the skipped images in one warning."""
        if self._skipped:
            reasons = "\n  ".join(self._skipped.values())
            warnings.warn(
                f"images skipped (data.on_error): {len(self._skipped)}; repair or remove them\n  {reasons}", stacklevel=1
            )
        self._skipped = {}

    def _samples_in_use(self, split: str) -> list[Sample]:
        """List the samples of a split; if ``held_out`` is set, the images that match it are the validation split."""
        if not self.held_out or split == "test":
            return self.samples(split)
        samples = self.samples("train")
        for pattern in self.held_out:
            if not any(fnmatch.fnmatchcase(sample.name, pattern) for sample in samples):
                raise DataError(
                    f"data.held_out: no training image is named {pattern}; expected a glob pattern of names such as "
                    f"{samples[0].name if samples else 'those of the training split'}"
                )
        is_held_out = [any(fnmatch.fnmatchcase(sample.name, pattern) for pattern in self.held_out) for sample in samples]
        return [sample for sample, held_out in zip(samples, is_held_out, strict=True) if held_out == (split == "val")]

    def class_pixels(self) -> Tensor:
        """Count the labelled pixels of each class in the training split, before augmentation; the result is cached.

        Returns:
            (C,) int64.

        Warns:
            UserWarning: Classes have no pixel; once, on rank 0.
        """
        if self._class_pixels is None:  # called several times, and each look-up in the cache stats every file
            self._class_pixels = count_class_pixels(
                self.reader,
                self._prepared("train"),
                num_workers=self.num_workers,
                cache_dir=self.cache_dir,
                skip=self.skips,
            )
            if absent := absent_classes(self.class_names, self._class_pixels, "training"):
                rank_zero_warn(absent)
        return self._class_pixels.clone()

    def band_statistics(self) -> tuple[Tensor, Tensor]:
        """Compute mean and standard deviation of each band of the training images in [0, 1]; the result is cached.

        Returns:
            (bands,) mean and (bands,) standard deviation, float64.
        """
        return band_statistics(
            self.reader,
            self._prepared("train"),
            self.images,
            num_workers=self.num_workers,
            cache_dir=self.cache_dir,
            skip=self.skips,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Load shuffled, augmented crops; a smaller last batch is dropped (batch norm fails for a single image)."""
        self._look_at_images("train")
        if self.train_transform.rare_crop_share:
            pixels = self.class_pixels().double()
            self.train_transform.class_weights = torch.where(pixels > 0, 1 / pixels.clamp(min=1), 0.0)
        dataset = TrainingCrops(self.reader, self._prepared("train"), self.train_transform, skip=self.skips)
        dataset.check_command = self.check_command
        batch_size = self._batch_size_per_process()
        order = TrainingOrder(dataset, batch_size, self.trainer)
        return self._loader(dataset, batch_size, sampler=order, drop_last=len(order) >= batch_size)

    def _batch_size_per_process(self) -> int:
        if self.total_batch_size is None:
            return self.batch_size
        processes = self.trainer.world_size if self.trainer is not None else 1
        batch_size, rest = divmod(self.total_batch_size, processes)
        if rest:
            raise DataError(
                f"data.total_batch_size: found {self.total_batch_size} for {processes} processes, expected a multiple of "
                f"{processes}"
            )
        return batch_size

    def val_dataloader(self) -> DataLoader[Batch]:
        """Load whole validation images."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Load whole test images."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Load images of any size, one per batch, without masks."""
        reader = FileReader(self.reader.table, images=self.images) if self.predict_roots else self.reader
        return self._loader(self._whole_images(reader, "predict", masks=False), 1)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Record skipped samples and convert masks to int64, which every loss takes; the copy to the device is of uint8."""
        self._record_skipped(batch.pop("skipped", {}))
        return batch | {"mask": batch["mask"].long()} if "mask" in batch else batch

    def _evaluation_loader(self, split: str) -> DataLoader[Batch]:
        return self._loader(self._whole_images(self.reader, split), self.eval_batch_size)

    def _whole_images(self, reader: Reader, split: str, masks: bool = True) -> WholeImages:
        self._look_at_images(split)
        samples = self._prepared(split)
        return WholeImages(reader, samples, self.image_scale, max_side=self.max_side, masks=masks, skip=self.skips)

    def _loader(self, dataset: Dataset[Batch], batch_size: int, **options: Any) -> DataLoader[Batch]:
        # Under a running Trainer, masks stay uint8 until they are on the device, see on_after_batch_transfer.
        running = self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING
        loader_class = DataLoader if running else WideningLoader
        return loader_class(
            dataset,
            batch_size=batch_size,  # a keyword, because Lightning re-creates the loader with other arguments
            num_workers=self.num_workers,
            # Page-locked memory only speeds up copies to a GPU; workers persist because starting them takes seconds.
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=prepare_worker,
            collate_fn=partial(collate, bands=self.bands),
            **options,
        )


def _cores() -> int:
    """Return the number of cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
