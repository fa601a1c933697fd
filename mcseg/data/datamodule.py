"""The data module that every data set of mcseg is: samples per split in, batches out."""

import fnmatch
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mcseg.data.batches import Batch, TrainingCrops, WholeImages, WideningLoader, collate, warn_skipped
from mcseg.data.files import FileReader, Reader, Sample, images_below, prepare_worker
from mcseg.data.labels import DataError, LabelTable, MissingFileError
from mcseg.data.order import TrainingOrder
from mcseg.data.statistics import count_class_pixels, default_cache_dir
from mcseg.data.transforms import TrainingTransform
from mcseg.palette import Color

SPLITS = ("train", "val", "test")


class SegmentationData(pl.LightningDataModule):
    """Pairs of image and mask as batches for training, validation, test and prediction.

    A data set is a subclass that passes its label table and lists its samples in :meth:`samples`; the rest is here. A batch
    is a dict: ``image`` (N,3,h,w) uint8 RGB, ``mask`` (N,H,W) int64 with train ids 0..C-1 and void 255, ``name`` list of
    str. In training image and mask are the same crop. In evaluation the image is the whole image resized by ``image_scale``
    and the mask keeps its own size, at which predictions are scored. For prediction there is ``size`` instead of ``mask``:
    a list of (height, width) of the files.

    Args:
        table: names, palette and raw ids of the classes.
        root: folder of the data set.
        batch_size: training images per process and step.
        total_batch_size: training images per step over all processes, in place of ``batch_size``: a run on 1 and on 8 GPUs
            then takes the same steps.
        eval_batch_size: validation and test images per step; more than 1 needs images of one size.
        num_workers: loader processes; -1 takes one per core, at most 8.
        crop_size: (height, width) of the training crop in pixels of the network's input.
        image_scale: the network sees images resized by this factor.
        scale_range: training images are scaled by a factor drawn from here, on top of ``image_scale``.
        max_class_share: training crops in which one class covers more of the labelled pixels than this are drawn again.
        flip: flip half of the training images horizontally.
        color_jitter: strength of brightness, contrast and saturation jitter, 0 to 1; 0 is off.
        rare_crop_share: probability with which a training crop is centred on a pixel of a class drawn with weights inverse
            to the classes' training pixels, among the classes of the image; 0 draws all crops anywhere.
        max_side: images whose longer side has more pixels than this are shrunk to it, before all other scaling; for data
            sets of huge images. Evaluation still takes place at the mask's own size.
        predict_root: image file, or folder searched for images in all its levels, for ``predict``; None predicts
            ``predict_split``.
        predict_split: split whose images ``predict`` takes where ``predict_root`` is not given; the validation split stands
            in for a missing test split.
        held_out: glob patterns of names of training images, for example ``0006R0_*`` for one of CamVid's sequences. Images
            that match one are left out of training and take the place of the validation split, so that settings can be
            chosen without a look at that split.
        on_error: what to do about an image or mask that cannot be used: ``"stop"`` ends the run with its name; ``"skip"``
            takes the next image in training, goes on without it in evaluation, and lists at the end what was left out.
        cache_dir: folder for the counts of label pixels; None is the user's cache folder.
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
        predict_root: str | os.PathLike[str] | None = None,
        predict_split: Literal["train", "val", "test"] = "test",
        held_out: Sequence[str] = (),
        on_error: Literal["stop", "skip"] = "stop",
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
            raise DataError(f"data.scale_range: found {list(scale_range)}, expected [smallest, largest]")
        if not 0 < max_class_share <= 1:
            raise DataError(f"data.max_class_share: found {max_class_share}, expected a share above 0 and up to 1")
        for name, value in {"color_jitter": color_jitter, "rare_crop_share": rare_crop_share}.items():
            if not 0 <= value <= 1:
                raise DataError(f"data.{name}: found {value}, expected 0 to 1")
        if on_error not in ("stop", "skip"):
            raise DataError(f"data.on_error: found {on_error!r}, expected stop or skip")
        self.reader: Reader = FileReader(table)
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
            (low * image_scale, high * image_scale),
            max_class_share,
            flip,
            color_jitter,
            max_side,
            rare_crop_share,
        )
        self.predict_root = Path(predict_root).expanduser() if predict_root is not None else None
        self.predict_split = predict_split
        self.held_out = tuple(held_out)
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        self.skips = on_error == "skip"
        self._skipped: dict[str, str] = {}  # why, by the sample's name
        self._splits: dict[str, list[Sample]] = {}
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
    def class_names(self) -> tuple[str, ...]:
        """Name of each class by train id."""
        return self.reader.table.names

    @property
    def palette(self) -> tuple[Color, ...]:
        """RGB colour of each class by train id."""
        return self.reader.table.palette

    def samples(self, split: str) -> list[Sample]:
        """List the samples of ``train``, ``val`` or ``test``, sorted; empty where the data set has no such split.

        Files are only listed: an image without a mask has ``mask=None`` and a broken file is found by :meth:`setup`.
        """
        raise NotImplementedError

    def remarks(self, split: str) -> list[str]:
        """Lines about a split that its user should read although it can be used; none by default."""
        return []

    def expected(self, split: str) -> str:
        """Say which files a split should have and how to get them; "" where it is not known."""
        return ""

    def setup(self, stage: str = "fit") -> None:
        """List the splits of the stage and open every header once, so that bad files stop the run before it starts."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]
        for split in wanted:
            self._prepared(split)

    def _prepared(self, split: str) -> list[Sample]:
        """Samples of a split, listed and verified when first asked for."""
        if split not in self._splits:
            self._splits[split] = self._prepare(split)
        return self._splits[split]

    def _prepare(self, split: str) -> list[Sample]:
        if split == "predict" and self.predict_root is not None:
            return images_below(self.predict_root)
        source = self.predict_split if split == "predict" else split
        samples = self._samples_in_use(source)
        lack = "" if samples else "no test split found"
        if split == "test" and split in self.withheld:
            lack = "the labels of the test split are not public"
        if source == "test" and lack:
            rank_zero_warn(f"{type(self).__name__}: {lack}, using the validation split instead")
            source, samples = "val", self._samples_in_use("val")
        if not samples:
            raise DataError(f"{type(self).__name__}: the {split} split of {self.root} is empty; expected at least one image")
        for remark in self.remarks(source):
            rank_zero_warn(remark)
        usable = [sample for sample in samples if self._is_usable(sample, source, masks=split != "predict")]
        if not usable:
            raise DataError(
                f"{type(self).__name__}: no image of the {split} split of {self.root} can be used; run mcseg check"
            )
        return usable

    def _is_usable(self, sample: Sample, split: str, masks: bool) -> bool:
        """Whether the headers say so; where they do not, raise DataError or note that the sample is skipped."""
        try:
            self.reader.verify(sample, masks)
        except DataError as error:
            if not self.skips:
                expected = self.expected(split) if isinstance(error, MissingFileError) else ""
                raise DataError("; ".join(part for part in (str(error), expected) if part)) from None
            if self.trainer is None or self.trainer.is_global_zero:  # each process finds the same
                self._note({sample.name: str(error)})
            return False
        return True

    def _note(self, skipped: Mapping[str, str]) -> None:
        """Tell of samples that are skipped, each once."""
        for name, why in skipped.items():
            if name not in self._skipped:
                warn_skipped(why)
        self._skipped |= skipped

    def teardown(self, stage: str) -> None:
        """List what was skipped."""
        if self._skipped:
            told = "\n  ".join(self._skipped.values())
            warnings.warn(f"images that were skipped (data.on_error): {len(self._skipped)}\n  {told}", stacklevel=1)
        self._skipped = {}

    def _samples_in_use(self, split: str) -> list[Sample]:
        """Samples of a split, after training images that are held out have taken the place of the validation split."""
        if not self.held_out or split == "test":
            return self.samples(split)
        samples = self.samples("train")
        for pattern in self.held_out:
            if not any(fnmatch.fnmatchcase(sample.name, pattern) for sample in samples):
                raise DataError(
                    f"data.held_out: no training image is named {pattern}; expected a glob pattern of names such as "
                    f"{samples[0].name if samples else 'those of the training split'}"
                )
        out = [any(fnmatch.fnmatchcase(sample.name, pattern) for pattern in self.held_out) for sample in samples]
        return [sample for sample, held in zip(samples, out, strict=True) if held == (split == "val")]

    def class_pixels(self) -> Tensor:
        """Count the labelled pixels of each class over the training split, before augmentation; cached.

        Returns:
            (C,) int64.
        """
        if self._class_pixels is None:  # objective, scores and crops ask for them, and finding the cache stats every file
            self._class_pixels = count_class_pixels(
                self.reader, self._prepared("train"), self.num_workers, self.cache_dir, skip=self.skips
            )
        return self._class_pixels.clone()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled, augmented crops; a last, smaller batch is dropped (batch norm cannot take a single image)."""
        if self.train_transform.rare_crop_share:
            pixels = self.class_pixels().double()
            self.train_transform.class_weights = torch.where(pixels > 0, 1 / pixels.clamp(min=1), 0.0)
        dataset = TrainingCrops(self.reader, self._prepared("train"), self.train_transform, self.skips)
        batch_size = self._share_of_batch()
        order = TrainingOrder(dataset, batch_size, self.trainer)
        return self._loader(dataset, batch_size, sampler=order, drop_last=len(order) >= batch_size)

    def _share_of_batch(self) -> int:
        if self.total_batch_size is None:
            return self.batch_size
        processes = self.trainer.world_size if self.trainer is not None else 1
        share, rest = divmod(self.total_batch_size, processes)
        if rest:
            raise DataError(
                f"data.total_batch_size: found {self.total_batch_size} for {processes} processes, expected a multiple"
            )
        return share

    def val_dataloader(self) -> DataLoader[Batch]:
        """Whole validation images."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Whole test images."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Images of any size, one at a time, without masks."""
        reader = FileReader(self.reader.table) if self.predict_root is not None else self.reader
        return self._loader(self._whole_images(reader, "predict", masks=False), 1)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Make masks int64, which every loss takes, where they are cheap to widen and need not travel any more."""
        self._note(batch.pop("skipped", {}))
        return batch | {"mask": batch["mask"].long()} if "mask" in batch else batch

    def _evaluation_loader(self, split: str) -> DataLoader[Batch]:
        return self._loader(self._whole_images(self.reader, split), self.eval_batch_size)

    def _whole_images(self, reader: Reader, split: str, masks: bool = True) -> "WholeImages":
        return WholeImages(reader, self._prepared(split), self.image_scale, self.max_side, masks, self.skips)

    def _loader(self, dataset: Dataset[Batch], batch_size: int, **options: Any) -> DataLoader[Batch]:
        # In a Trainer's run masks travel as bytes and are widened on the device, see on_after_batch_transfer.
        running = self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING
        kind = DataLoader if running else WideningLoader
        return kind(
            dataset,
            batch_size=batch_size,  # by keyword: Lightning makes the loader anew with other arguments
            num_workers=self.num_workers,
            # Page-locked memory only speeds up copies to a GPU; workers are kept because starting them costs seconds.
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=prepare_worker,
            collate_fn=collate,
            **options,
        )


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Linux alone tells
