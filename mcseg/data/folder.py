"""Folders of images and masks in the user's own layout."""

import os
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mcseg.data.classlist import table_from_file, table_from_names
from mcseg.data.datamodule import SegmentationData
from mcseg.data.files import Sample, image_files, image_mode
from mcseg.data.labels import DataError, LabelTable

Split = Literal["auto", "folder", "list", "fraction"]


class FolderData(SegmentationData):
    """A folder of images and masks; each mask is named like its image.

    ``split`` sets how to divide ``root/images`` and ``root/masks``:

    - ``folder``: by subfolders, ``root/images/train`` and ``root/masks/train`` or ``root/train/images`` and
      ``root/train/masks``, likewise for ``val`` and ``test``;
    - ``list``: by the text files ``root/train.txt``, ``root/val.txt`` and, optionally, ``root/test.txt`` with one image name
      per line, with or without extension;
    - ``fraction``: at random, with ``split_seed``;
    - ``auto``: ``list`` if ``root/train.txt`` exists, else ``folder`` if there is a ``train`` folder, else ``fraction``.

    Masks contain class indices (8- or 16-bit grey or palette files; 255 is void). If the class list gives each class a
    colour of its own, colour and palette files are read by their colours.

    Args:
        root: Path of the folder.
        classes: Class names in the order of their indices, or the path of a class list (see
            `~mcseg.data.classlist.table_from_file`); None looks for ``classes.toml`` or ``classes.txt`` in the root.
        split: ``auto``, ``folder``, ``list`` or ``fraction``, see above.
        val_fraction: Share of the images for validation, above 0 and below 1; for ``fraction``.
        test_fraction: Share of the images for test, 0 or more; for ``fraction``.
        split_seed: Seed of the random split; for ``fraction``.
        images_dir: Name of the image folder.
        masks_dir: Name of the mask folder.
        mask_suffix: Suffix of the masks' names after the images' names, such as ``_mask``.
        **options: See `~mcseg.data.datamodule.SegmentationData`.

    Raises:
        DataError: The folder does not exist, the fractions are impossible, or there is no usable class list.
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
            raise DataError(
                f"data.root: folder {folder} does not exist; expected a folder with {images_dir}, {masks_dir} and a class "
                "list"
            )
        if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise DataError(
                f"found data.val_fraction {val_fraction} and data.test_fraction {test_fraction}, expected val_fraction "
                "above 0, test_fraction of 0 or more and a sum below 1"
            )
        self.images_dir, self.masks_dir, self.mask_suffix = images_dir, masks_dir, mask_suffix
        self.folder = folder
        self.split = _detect_split(folder, images_dir) if split == "auto" else split
        self.fractions = (val_fraction, test_fraction)
        self.split_seed = split_seed
        super().__init__(self._read_classes(classes), folder, **options)

    def samples(self, split: str) -> list[Sample]:
        """List the pairs of a split, sorted by name."""
        folders = self._folders(split)
        pairs = self._pairs(*folders) if folders else []
        if self.split == "folder":
            return pairs
        return self._split_by_list(pairs, split) if self.split == "list" else self._split_at_random(pairs, split)

    def remarks(self, split: str) -> list[str]:
        """List files of the split that are not used, and images that are also listed for training."""
        folders = self._folders(split)
        lines = self._unused_files(*folders) if folders and (self.split == "folder" or split == "train") else []
        if self.split == "list" and split != "train":
            train_names = {sample.name for sample in self.samples("train")}
            if shared := [sample.name for sample in self.samples(split) if sample.name in train_names]:
                lines.append(
                    f"{self.folder / split}.txt: {_abbreviate(shared)} {_are(shared)} also in train.txt; scores on training "
                    "images are too high; list each image in one file only"
                )
        return lines

    def expected(self, split: str) -> str:
        """Describe where the images of a split are listed or stored."""
        images = self.folder / self.images_dir
        if self.split == "list":
            return f"expected names of images in {self.folder / split}.txt"
        return (
            f"expected images in {images / split}" if self.split == "folder" else f"expected at least 2 images in {images}"
        )

    def _folders(self, split: str) -> tuple[Path, Path] | None:
        """Return the folders with a split's images and masks; None if there is no such split."""
        images, masks = self.folder / self.images_dir, self.folder / self.masks_dir
        if self.split != "folder":
            return images, masks
        if (images / split).is_dir():
            return images / split, masks / split
        outer = self.folder / split
        return (outer / self.images_dir, outer / self.masks_dir) if outer.is_dir() else None

    def _pairs(self, images: Path, masks: Path) -> list[Sample]:
        for folder in (images, masks):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder; expected the {'images' if folder == images else 'masks'} there")
        masks_by_stem = _by_stem(masks)
        return [
            Sample(
                path.stem,
                path,
                masks_by_stem.get(stem + self.mask_suffix),
                expected_mask=masks / f"{path.stem}{self.mask_suffix}.png",
            )
            for stem, path in _by_stem(images).items()
        ]

    def _unused_files(self, images: Path, masks: Path) -> list[str]:
        """Report masks without an image, and files that cannot be read as images."""
        expected_stems = {stem + self.mask_suffix for stem in _by_stem(images)}
        lines = []
        if orphans := [path.name for stem, path in _by_stem(masks).items() if stem not in expected_stems]:
            lines.append(
                f"{masks}: no image for {_abbreviate(orphans)}; expected names of images, which are case-sensitive, "
                f"followed by data.mask_suffix ({self.mask_suffix!r}); rename or remove the masks"
            )
        for folder in (images, masks):
            readable = set(image_files(folder))
            if other := sorted(path.name for path in folder.iterdir() if path not in readable and _is_user_file(path)):
                lines.append(
                    f"{folder}: {_abbreviate(other)} {_are(other)} not used; expected images such as .jpg, .png or .tif; "
                    "convert or remove them"
                )
        return lines

    def _split_by_list(self, pairs: list[Sample], split: str) -> list[Sample]:
        path = self.folder / f"{split}.txt"
        if not path.is_file():
            return []
        by_name = {sample.name: sample for sample in pairs} | {sample.image.name: sample for sample in pairs}
        by_name = {_normalized(name): sample for name, sample in by_name.items()}
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); expected one image name per line in UTF-8") from None
        names = [_normalized(Path(line.strip()).name) for line in lines if line.strip()]
        missing = [name for name in names if name not in by_name]
        if missing:
            raise DataError(
                f"{path}: lists {missing[0]} ({len(missing)} such name{'s' * (len(missing) != 1)}), which is not in "
                f"{self.folder / self.images_dir}; expected names of images in this folder; correct the list"
            )
        listed = [by_name[name] for name in names]
        if repeated := [sample.name for sample, count in Counter(listed).items() if count > 1]:
            raise DataError(f"{path}: lists {_abbreviate(repeated)} more than once; list each image once")
        return listed

    def _split_at_random(self, pairs: list[Sample], split: str) -> list[Sample]:
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
                "into classes.txt, or set data.classes"
            )
        if self._first_mask_is_rgb():
            # A list without colours does not fit RGB masks; reading the first mask then gives the clearer error.
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
                with suppress(DataError):  # a broken file; look at the next one
                    return image_mode(path) in ("RGB", "RGBA")
        return False


def _detect_split(root: Path, images_dir: str) -> Split:
    if (root / "train.txt").is_file():
        return "list"
    return "folder" if (root / images_dir / "train").is_dir() or (root / "train").is_dir() else "fraction"


def _by_stem(folder: Path) -> dict[str, Path]:
    """Map the names of the image files in a folder, without extension, to their paths."""
    files: dict[str, Path] = {}
    for path in image_files(folder):
        stem = _normalized(path.stem)
        if stem in files:
            both = f"{files[stem].name} and {path.name}"
            raise DataError(f"{folder}: {both} have the same name; rename or remove one")
        files[stem] = path
    return files


def _normalized(name: str) -> str:
    """Return the composed Unicode form of a name; macOS may store an umlaut as two characters."""
    return unicodedata.normalize("NFC", name)


def _is_user_file(path: Path) -> bool:
    """Whether a file is not hidden and not created by the operating system."""
    return path.is_file() and path.name[0] != "." and path.name not in ("Thumbs.db", "desktop.ini")


def _abbreviate(names: Sequence[str]) -> str:
    """Format names for a message as the first name and the number of further names."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
