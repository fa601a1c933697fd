"""EndoVis 2017: merges the masks of all instruments in a frame, and crops frames to the camera's picture."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mcseg.data.benchmark import BenchmarkData, Listing, benchmark_facts, check_choice
from mcseg.data.classlist import table_from_toml
from mcseg.data.files import Choice, FileReader, Sample, count_labels, mask_path
from mcseg.data.labels import DataError, LabelTable
from mcseg.data.layout import find, fixed_folder
from mcseg.data.sources import Window, image_size

_FRAME_SIZE = (1080, 1920)  # height and width of an uncropped frame


@dataclass(frozen=True)
class EndoVisReader(FileReader):
    """Reader that merges the masks of all instruments in a frame, and crops frame and masks to the camera's picture.

    If instruments overlap, the larger train id wins: for parts, probe over claspers over wrist over shaft; for types, the
    type with the larger id. Stored values are not added, because shaft (10) plus wrist (20) would read as claspers (30).

    Args:
        table: Label table of the task.
        instruments: Label table of the instruments' masks: classes of the task or, with ``types``, parts.
        test_table: Label table of the official test maps, which are already merged.
        test_folder: Name of the folders with the official test maps.
        types: (keyword in the name of an instrument's folder, id of its type) for the type task; None for other tasks.
        window: Position of the camera's picture in a frame of 1920x1080; None keeps the whole frame.
    """

    instruments: LabelTable
    test_table: LabelTable
    test_folder: str
    types: tuple[tuple[str, int], ...] | None
    window: Window | None

    def image(self, sample: Sample) -> Tensor:
        """Read the frame, (bands,H,W), cropped to the camera's picture."""
        return self._cut(super().image(sample), sample.image)

    def mask(self, sample: Sample) -> Tensor:
        """Read and merge the masks of the instruments, (H,W) uint8 train ids."""
        path = mask_path(sample)
        if path.parent.name == self.test_folder:
            return self._cut(torch.from_numpy(self.test_table.train_ids(self._stored(path)[0], path)), path)
        merged = self._instrument(path)
        for file in sample.more_masks:
            part = self._instrument(file)
            self._compare_sizes(
                replace(sample, mask=file), (merged.shape[0], merged.shape[1]), (part.shape[0], part.shape[1])
            )
            np.maximum(merged, part, out=merged)
        return self._cut(torch.from_numpy(merged), path)

    def pair(self, sample: Sample, choose: Choice | None = None) -> tuple[Tensor, Tensor]:
        """Read image and mask, which must have the same size; with ``choose``, cut both to the window it returns."""
        image, mask = self.image(sample), self.mask(sample)
        self._compare_sizes(sample, (image.shape[1], image.shape[2]), (mask.shape[0], mask.shape[1]))
        if choose is None:
            return image, mask
        window = choose(mask)
        return window.cut(image), window.cut(mask)

    def counts(self, sample: Sample) -> Tensor:
        """Count the pixels of each class in the merged mask, (C,) int64."""
        return count_labels(self.mask(sample), self.table.num_classes)

    def verify(self, sample: Sample, masks: bool = True) -> None:
        """Check the headers of frame and masks: readable, of equal size, and large enough to crop."""
        header = self.images.header(sample.image)
        size = (header.height, header.width)
        self._window(size, sample.image)
        for path in (mask_path(sample), *sample.more_masks) if masks else ():
            self._compare_sizes(replace(sample, mask=path), size, image_size(path))

    def _instrument(self, path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Read one instrument's mask as train ids (H,W); 0, the background, outside the instrument."""
        values = self.instruments.train_ids(self._stored(path)[0], path)
        if self.types is not None:
            return (values > 0) * np.uint8(type_id(path.parent.name, self.types))
        return np.array(values)  # a writable copy

    def _cut(self, pixels: Tensor, path: Path) -> Tensor:
        window = self._window((pixels.shape[-2], pixels.shape[-1]), path)
        return pixels if window is None else window.cut(pixels)

    def _window(self, size: tuple[int, int], path: Path) -> Window | None:
        """Return the part of a picture of ``size`` to keep; None keeps all of it."""
        window = self.window
        if window is None or size == (window.bottom - window.top, window.right - window.left):
            return None
        if size != _FRAME_SIZE:
            raise DataError(
                f"{path}: found {size[1]}x{size[0]} pixels, expected {_FRAME_SIZE[1]}x{_FRAME_SIZE[0]} to crop to the "
                "camera's picture; for other sizes set data.crop_to_camera to false"
            )
        return window


def type_id(folder: str, types: tuple[tuple[str, int], ...]) -> int:
    """Return the id of the instrument type whose keyword is in a folder's name; 0 if there is none."""
    return next((id_ for keyword, id_ in types if keyword in folder), 0)


class EndoVis2017Data(BenchmarkData):
    """EndoVis 2017 robotic instruments: 8 training sequences of 225 frames, 1200 official test frames; three tasks.

    Rule of the challenge: a model that is tested on the 75 test frames of one of the sequences 1 to 8 must not be trained
    on that sequence. With a fold, set ``test_sequences`` to the fold's validation sequences plus 9 and 10.

    Source: Allan et al., arXiv:1902.06426; frame ranges: Yu et al., IJCV 2022; folds: Shvets et al., ICMLA 2018.

    Args:
        root: Folder with ``instrument_dataset_1`` to ``instrument_dataset_8`` of the training archives.
        task: ``binary`` (instrument or not), ``parts`` (shaft, wrist, claspers, probe) or ``type`` (seven instruments).
        other: Whether to use the objects in ``Other_labels`` (the ultrasound probe). If not, they are background, and
            ``parts`` and ``type`` have one class less.
        crop_to_camera: Whether to crop the 1920x1080 frames to the camera's 1280x1024 pixels.
        split: ``frames``, the paper's: frames 0-149 of each sequence for training, 150-174 for validation, 175-224 for test;
            ``fold0`` to ``fold3``: two sequences for validation, six for training.
        test_root: Folder of the official test set, which then is the test split.
        test_sequences: Sequences of the official test set to use, 1 to 10; None uses all.
        **options: See `~mcseg.data.datamodule.SegmentationData`.

    Raises:
        DataError: The task, the split or a test sequence is unknown.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        task: Literal["binary", "parts", "type"] = "parts",
        other: bool = True,
        crop_to_camera: bool = True,
        split: Literal["frames", "fold0", "fold1", "fold2", "fold3"] = "frames",
        test_root: str | os.PathLike[str] | None = None,
        test_sequences: list[int] | None = None,
        **options: Any,
    ) -> None:
        facts = benchmark_facts("endovis2017")
        check_choice("task", task, facts["labels"])
        check_choice("split", split, ("frames", *facts["layout"]["folds"]))
        if not set(test_sequences or ()) <= set(range(1, 11)):
            raise DataError(f"data.test_sequences: found {test_sequences}, expected numbers from 1 to 10")
        labels = facts["labels"][task]
        classes = labels["classes"] if other or task == "binary" else labels["classes"][:-1]
        table = table_from_toml({"classes": classes}, "endovis2017.toml", void=())
        instruments = table_from_toml(facts["labels"]["parts"], "endovis2017.toml", void=()) if task == "type" else table
        super().__init__("endovis2017", root, labels=task, table=table, **options)
        raw_ids = {value: train if train < len(classes) else 0 for train, value in enumerate(labels["test_values"])}
        test_table = LabelTable(table.names, table.palette, raw_ids)
        layout = facts["layout"]
        window = Window(**layout["camera"]) if crop_to_camera else None
        self.types = tuple(layout["types"].items())
        types = self.types if task == "type" else None
        self.reader = EndoVisReader(
            table,
            instruments=instruments,
            test_table=test_table,
            test_folder=labels["folder"],
            types=types,
            window=window,
            images=self.images,
        )
        self.other = other
        self.split = split
        self.test_root = Path(test_root).expanduser() if test_root is not None else None
        self.test_sequences = test_sequences
        if split == "frames":
            self.official |= {part: 8 * (last - first + 1) for part, (first, last) in layout["frames"].items()}
        else:
            self.official |= {"train": 6 * 225, "val": 2 * 225}
        if test_root is not None:
            self.official["test"] = None if test_sequences else self.official["official_test"]

    def samples(self, split: str) -> list[Sample]:
        """List the frames of a split, sorted by sequence and frame."""
        if split != "test" or self.test_root is None:
            return [sample for sample in self._training_frames() if self._is_in_split(sample, split)]
        frames = self.listed("official_test", self.test_root, folder=self.label_facts["folder"])
        if not frames:
            raise DataError(f"data.test_root: no official test set in {self.test_root}; {self.expected('official_test')}")
        sequences = self.test_sequences or range(1, 11)
        return [sample for sample in frames if _sequence(sample) in sequences]

    def _training_frames(self) -> list[Sample]:
        """List all frames of the training archives, with the masks of the instruments in use."""
        if "all" not in self._listings:
            source, name = self.facts["splits"]["all"]["from"][0], self.facts["layout"]["name"]
            folders: dict[Path, list[Path]] = {}
            samples = []
            for fields, path in find(self.home, source["images"]):
                labels = fixed_folder(self.home, source["masks"].format_map({**fields, "instrument": "{instrument}"}))
                if labels not in folders:
                    folders[labels] = self._instrument_folders(labels)
                masks = tuple(folder / path.name for folder in folders[labels])
                samples.append(Sample(name.format_map(fields), path, mask=masks[0], more_masks=masks[1:]))
            self._listings["all"] = Listing(sorted(samples, key=lambda sample: sample.name), [])
        return self._listings["all"].samples

    def _instrument_folders(self, labels: Path) -> list[Path]:
        """List the folders of the instruments in use below a sequence's folder of labels."""
        used = []
        for folder in sorted(path for path in labels.iterdir() if path.is_dir()) if labels.is_dir() else ():
            if folder.name in self.facts["layout"]["derived"]:
                continue
            id_ = type_id(folder.name, self.types)
            if not id_:
                keywords = ", ".join(keyword for keyword, _ in self.types)
                raise DataError(f"{folder}: unknown instrument; expected one of {keywords} in the name, or remove it")
            if self.other or id_ != dict(self.types)["Other"]:
                used.append(folder)
        if not used:
            raise DataError(
                f"{labels}: no masks of instruments; expected folders such as Prograsp_Forceps_labels; "
                f"{self._download_hint()}"
            )
        return used

    def _is_in_split(self, sample: Sample, split: str) -> bool:
        layout = self.facts["layout"]
        if self.split == "frames":
            first, last = layout["frames"][split]
            return bool(first <= int(sample.image.stem.removeprefix("frame")) <= last)
        held_out = _sequence(sample) in layout["folds"][self.split]
        return {"train": not held_out, "val": held_out, "test": False}[split]


def _sequence(sample: Sample) -> int:
    return int(sample.name.partition("/")[0].rpartition("_")[2])
