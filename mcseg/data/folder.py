"""A user's own folder of images and masks."""

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mcseg.data.classlist import table_from_file, table_from_names
from mcseg.data.datamodule import SegmentationData, image_files
from mcseg.data.files import Sample
from mcseg.data.labels import DataError, LabelTable

Split = Literal["auto", "folder", "list", "fraction"]


class FolderData(SegmentationData):
    """Images and masks in a folder of the user's own; a mask has its image's name.

    ``root/images`` and ``root/masks`` are split by one of

    - ``folder``: ``root/images/train`` and ``root/masks/train`` (``val``, ``test`` likewise), or ``root/train/images`` and
      ``root/train/masks``;
    - ``list``: ``root/train.txt``, ``root/val.txt`` and, if wanted, ``root/test.txt``: an image name per line;
    - ``fraction``: a random part goes to validation, another to test, the rest to training, the same for the same seed.

    ``auto`` takes lists where ``train.txt`` exists, else folders where a ``train`` folder exists, else fractions.

    Masks hold class indices (8- or 16-bit grey or palette files; 255 is void), or RGB colours where the class list gives
    each class a colour.

    Args:
        root: the folder.
        classes: class names in the order of their indices, or the path of a class list (see
            :func:`~mcseg.data.classlist.table_from_file`); None looks for ``classes.toml`` or ``classes.txt`` in the root.
        split: how the images are divided.
        val_fraction: share of the images for validation, above 0 and below 1.
        test_fraction: share of the images for test.
        split_seed: seed of the random division.
        images_dir: name of the image folder.
        masks_dir: name of the mask folder.
        mask_suffix: what a mask's name has after its image's name, such as ``_mask``.
        **options: see :class:`~mcseg.data.datamodule.SegmentationData`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        classes: list[str] | str | None = None,
        *,
        split: Split = "auto",
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        images_dir: str = "images",
        masks_dir: str = "masks",
        mask_suffix: str = "",
        **options: Any,
    ) -> None:
        if root is None:
            raise DataError(f"data.root is not set: expected a folder with {images_dir}, {masks_dir} and a class list")
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise DataError(f"data.root: no folder {folder}; expected one with {images_dir}, {masks_dir} and a class list")
        if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise DataError(
                f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction}: expected "
                "val_fraction above 0 and something left for training"
            )
        self.images_dir, self.masks_dir, self.mask_suffix = images_dir, masks_dir, mask_suffix
        self.folder = folder
        self.split = _detect_split(folder, images_dir) if split == "auto" else split
        self.fractions = (val_fraction, test_fraction)
        self.split_seed = split_seed
        super().__init__(self._read_classes(classes), folder, **options)

    def samples(self, split: str) -> list[Sample]:
        """List the pairs of a split, sorted by name."""
        if self.split == "folder":
            inner = self.folder / self.images_dir / split
            if inner.is_dir():
                return self._pairs(inner, self.folder / self.masks_dir / split)
            outer = self.folder / split
            return self._pairs(outer / self.images_dir, outer / self.masks_dir) if outer.is_dir() else []
        pairs = self._pairs(self.folder / self.images_dir, self.folder / self.masks_dir)
        return self._listed(pairs, split) if self.split == "list" else self._drawn(pairs, split)

    def _pairs(self, images: Path, masks: Path) -> list[Sample]:
        for folder in (images, masks):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder; expected the {'images' if folder == images else 'masks'} there")
        by_name = {path.stem: path for path in image_files(masks)}
        found = image_files(images)
        stems = [path.stem for path in found]
        if len(set(stems)) < len(stems):
            twice = next(stem for stem in stems if stems.count(stem) > 1)
            raise DataError(f"{images}: more than one image is named {twice}; expected different names, rename one")
        return [Sample(path.stem, path, by_name.get(path.stem + self.mask_suffix)) for path in found]

    def _listed(self, pairs: list[Sample], split: str) -> list[Sample]:
        path = self.folder / f"{split}.txt"
        if not path.is_file():
            return []
        by_name = {sample.name: sample for sample in pairs} | {sample.image.name: sample for sample in pairs}
        names = [Path(line.strip()).name for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        missing = [name for name in names if name not in by_name]
        if missing:
            raise DataError(
                f"{path}: lists {missing[0]} ({len(missing)} such names), which is not in "
                f"{self.folder / self.images_dir}; expected names of images there"
            )
        return [by_name[name] for name in names]

    def _drawn(self, pairs: list[Sample], split: str) -> list[Sample]:
        order = list(range(len(pairs)))
        random.Random(self.split_seed).shuffle(order)
        val = max(1, round(self.fractions[0] * len(pairs)))
        test = round(self.fractions[1] * len(pairs))
        chosen = {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}[split]
        return [pairs[index] for index in sorted(chosen)]

    def _read_classes(self, classes: list[str] | str | None) -> LabelTable:
        if isinstance(classes, list):
            return table_from_names(classes)
        candidates = [Path(classes).expanduser()] if classes else [self.folder / "classes.toml", self.folder / "classes.txt"]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise DataError(
                f"no class list: looked for {' and '.join(map(str, candidates))}; write one class name per line "
                "into classes.txt, or give data.classes"
            )
        if self._first_mask_is_rgb():
            # A list without colours does not fit RGB masks; then the mask itself is the better place to complain.
            with suppress(DataError):
                return table_from_file(path, by_color=True)
        return table_from_file(path, by_color=False)

    def _first_mask_is_rgb(self) -> bool:
        for masks in (
            self.folder / self.masks_dir,
            self.folder / self.masks_dir / "train",
            self.folder / "train" / self.masks_dir,
        ):
            for path in image_files(masks) if masks.is_dir() else []:
                try:
                    with Image.open(path) as file:
                        return file.mode in ("RGB", "RGBA")
                except OSError:
                    continue
        return False


def _detect_split(root: Path, images_dir: str) -> Split:
    if (root / "train.txt").is_file():
        return "list"
    return "folder" if (root / images_dir / "train").is_dir() or (root / "train").is_dir() else "fraction"
