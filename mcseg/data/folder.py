"""Folders of images and masks in the user's own layout."""

import hashlib
import os
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.utilities import rank_zero_info

from mcseg.data.classlist import CLASS_LISTS, find_class_list, table_from_file, table_from_names
from mcseg.data.datamodule import SPLITS, SegmentationData
from mcseg.data.files import Sample, image_files
from mcseg.data.labels import DataError, LabelTable
from mcseg.data.lists import Row, choose, find_list, read_pairs
from mcseg.data.pairs import SPLIT_NAMES, Pairs, Tree, abbreviate, normalized
from mcseg.data.sources import image_mode

Split = Literal["auto", "folder", "list", "fraction"]


class FolderData(SegmentationData):
    """A folder of images and masks; each mask is named like its image.

    Folders are found by their usual names, in any order: ``images`` and ``masks``, ``train/imgs`` and ``train/labels``,
    ``annotations/validation``, ``train`` and ``train_masks``; further folders below them belong to the names of the images.
    Names of masks, or of images, may have a suffix (``1_sat.jpg`` and ``1_mask.png``), and both may be in one folder. A
    layout with two readings is an error that names both. ``mcseg check`` prints what was found.

    ``split`` sets how to divide the images:

    - ``folder``: by the folders ``train``, ``val`` (or ``valid``, ``validation``, ``dev``) and ``test``;
    - ``list``: by the files ``train.txt``, ``val.txt`` and, optionally, ``test.txt`` with one image name per line, with or
      without extension, or ``train.csv`` and so on with the columns ``image`` and ``mask``, in the root, in ``splits``,
      ``lists`` or ``ImageSets/Segmentation``;
    - ``fraction``: at random;
    - ``auto``: ``list`` if there is a list of the training images, else ``folder`` if folders name splits, else
      ``fraction``.

    A random split follows from a hash of each image's name: further images move none, and the shares are approximate.

    Masks contain class indices (8- or 16-bit grey or palette files; 255 is void). If the class list gives each class a
    colour of its own, colour and palette files are read by their colours.

    Args:
        root: Path of the folder; None is the folder of ``pairs``. Not needed to predict the images of ``predict_root``.
        classes: Class names in the order of their indices, or the path of a class list (see
            `~mcseg.data.classlist.table_from_file`); None looks for one, see ``mcseg.data.classlist.find_class_list``.
        split: ``auto``, ``folder``, ``list`` or ``fraction``, see above.
        val_fraction: Share of the images for validation, above 0 and below 1; for ``fraction``.
        test_fraction: Share of the images for test, 0 or more; for ``fraction``.
        split_seed: Seed of the random split; for ``fraction``.
        draw: How ``fraction`` draws images: ``name``, by a hash of each name; ``order``, by shuffling the sorted list, as
            earlier versions did, where one image more moves others.
        pairs: CSV file with the columns ``image``, ``mask`` and, optionally, ``split``, used instead of folders and lists;
            see ``mcseg.data.lists.read_pairs``. A relative path is relative to ``root``.
        images_dir: Path of the image folder, relative to ``root`` or to the folder of each split; None finds it by name.
        masks_dir: Path of the mask folder, likewise.
        image_suffix: Suffix of the images' names that the masks' names do not have, such as ``_sat``; None finds it in the
            names.
        mask_suffix: Suffix of the masks' names after the images' names, such as ``_mask``; None finds it in the names.
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
        draw: Literal["name", "order"] = "name",
        pairs: str | None = None,
        images_dir: str | None = None,
        masks_dir: str | None = None,
        image_suffix: str | None = None,
        mask_suffix: str | None = None,
        **options: Any,
    ) -> None:
        expected = f"expected a folder with {images_dir or 'images'}, {masks_dir or 'masks'} and a class list"
        predicts = isinstance(classes, list) and options.get("predict_root") is not None
        if root is None and pairs is None and not predicts:
            raise DataError(f"data.root is not set: {expected}")
        folder = Path(pairs or "").expanduser().parent if root is None else Path(root).expanduser()
        if not folder.is_dir():
            raise DataError(f"data.root: folder {folder} does not exist; {expected}")
        if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise DataError(
                f"found data.val_fraction {val_fraction} and data.test_fraction {test_fraction}, expected val_fraction "
                "above 0, test_fraction of 0 or more and a sum below 1"
            )
        self.folder = folder
        self.pairs = None if pairs is None else _existing_list(pairs, folder)
        self.tree = Tree(folder, images_dir, masks_dir, image_suffix, mask_suffix)
        self._split = split
        self._read: dict[Path, list[Row]] = {}
        self.fractions = (val_fraction, test_fraction)
        self.split_seed = split_seed
        self.draw = draw
        super().__init__(self._read_classes(classes), None if root is None and pairs is None else folder, **options)

    @property
    def split(self) -> Split:
        """How the images are divided: ``folder``, ``list`` or ``fraction``."""
        if self.pairs is not None:
            return "list" if any(row.split for row in self._rows(self.pairs)) else "fraction"
        if self._split != "auto":
            return self._split
        if find_list(self.folder, "train"):
            return "list"
        return "folder" if self.tree.splits else "fraction"

    @property
    def random_split(self) -> dict[str, Any] | None:
        """Settings of the random split, which checkpoints store; None if the split is not random."""
        if self.split != "fraction":
            return None
        names = ("draw", "split_seed", "val_fraction", "test_fraction")
        return dict(zip(names, (self.draw, self.split_seed, *self.fractions), strict=True))

    def setup(self, stage: str = "fit") -> None:
        """List and verify the splits of the stage; report the shares of a random split before training."""
        super().setup(stage)
        if stage == "fit" and self.split == "fraction":
            rank_zero_info(self.layout()[-1])

    def samples(self, split: str) -> list[Sample]:
        """List the pairs of a split, sorted by name or in the order of its list."""
        kind = self.split
        if kind == "folder":
            if not self.tree.splits:
                self.tree.all_pairs()  # raises an error if there are no images at all
            pairs = self.tree.pairs(split)
            return pairs.samples if pairs else []
        if kind == "fraction":
            return self._drawn(split)
        if self.pairs is not None:
            return [row.sample for row in self._rows(self.pairs) if row.split == split]
        path = find_list(self.folder, split)
        if path is None:
            return []
        if path.suffix == ".csv":
            return [row.sample for row in self._rows(path) if row.split in (split, None)]
        return choose(path, self._all_samples(), self._image_folders())

    def remarks(self, split: str) -> list[str]:
        """List files of the split that are not used, and images that are also listed for training."""
        lines: list[str] = []
        if self.pairs is None and (self.split == "folder" or split == "train"):
            found = [self.tree.pairs(split)] if self.split == "folder" else self._listed_pairs()
            lines = [line for pairs in found if pairs for line in self._unused_files(pairs)]
        if self.split == "list" and split != "train":
            train_images = {sample.image for sample in self.samples("train")}
            if shared := [sample.name for sample in self.samples(split) if sample.image in train_images]:
                path = self.pairs or find_list(self.folder, split) or self.folder
                also = (
                    f"for {split} and also for train" if self.pairs else f"also in {find_list(self.folder, 'train') or path}"
                )
                also = also.replace(f"{self.folder}/", "")
                lines.append(
                    f"{path}: {abbreviate(shared)} {_are(shared)} {also}; scores on training "
                    "images are too high; list each image in one file only"
                )
        return lines

    def layout(self) -> list[str]:
        """Describe the folders, suffixes, lists and classes that were found, one line each."""
        lines = []
        if self.pairs is not None:
            lines.append(f"pairs: {self.pairs}")
        elif not self._lists_pairs():
            with suppress(DataError):  # reported for each split
                found = [pairs for split in (*SPLITS, None) if (pairs := self.tree.pairs(split))]
                image_suffix, mask_suffix = self.tree.suffixes
                for kind, suffix, chosen in (
                    ("images", image_suffix, [place for pairs in found for place in pairs.images]),
                    ("masks", mask_suffix, [place for pairs in found for place in pairs.masks]),
                ):
                    tops = list(dict.fromkeys(os.path.relpath(place.top, self.folder) for place in chosen))
                    shown = [*tops[:4], f"{len(tops) - 4} more"] if len(tops) > 4 else tops
                    below = len({place.folder for place in chosen if place.rest and place.folder != place.top})
                    others = sum(pairs.others for pairs in found) if kind == "masks" else 0
                    lines.append(
                        f"{kind}: {', '.join(shown)}"
                        + (f" with {below} {'subfolder' if below == 1 else 'subfolders'}" if below else "")
                        + (f", names end in {suffix}" if suffix else "")
                        + (f"; {others} other files are not used" if others else "")
                    )
        lines.append(f"classes: {self.class_names[0]}, ..., {self.class_names[-1]} from {self._class_source}")
        with suppress(DataError):
            if self.split == "list" and self.pairs is None:
                lists = [path for split in SPLITS if (path := find_list(self.folder, split))]
                lines.append(f"split: by {', '.join(os.path.relpath(path, self.folder) for path in lists)}")
            elif self.split == "list":
                lines.append("split: by the column split")
            elif self.split == "folder":
                lines.append("split: by folder")
            elif self.draw == "order":
                lines.append(f"split: the sorted images shuffled with data.split_seed {self.split_seed} (data.draw order)")
            else:
                asked = f"data.val_fraction {self.fractions[0]:g}"
                asked += f" and data.test_fraction {self.fractions[1]:g}" if self.fractions[1] else ""
                count = {split: len(self.samples(split)) for split in SPLITS}
                total = max(1, sum(count.values()))
                shares = ", ".join(f"{100 * count[split] / total:.1f} % {split}" for split in SPLITS if count[split])
                lines.append(f"split: by a hash of each image's name, {shares} for {asked}; more images move none of these")
        return lines

    def expected(self, split: str) -> str:
        """Describe where the images of a split are listed or stored."""
        if self.pairs is not None:
            return f"expected rows of images in {self.pairs}"
        if self.split == "list":
            return f"expected names of images in {self.folder / split}.txt"
        images = self.folder / (self.tree.images_dir or "images")
        if self.split == "folder":
            others = "".join(f", {name}" for name in SPLIT_NAMES[split][1:])
            return f"expected images in {images / split} or {self.folder / split / images.name} (or {others[2:]})" + (
                "; or set data.split to fraction to draw them from all images" if split == "val" else ""
            )
        return f"expected at least 2 images in {images}"

    def _rows(self, path: Path) -> list[Row]:
        if path not in self._read:
            self._read[path] = read_pairs(path)
        return self._read[path]

    def _lists_pairs(self) -> bool:
        """Whether CSV files name images and masks, so that folders have no meaning."""
        if self.pairs is not None:
            return True
        path = find_list(self.folder, "train") if self.split == "list" else None
        return path is not None and path.suffix == ".csv"

    def _listed_pairs(self) -> list[Pairs]:
        return [] if self._lists_pairs() else self.tree.all_pairs()

    def _image_folders(self) -> str:
        roles = [str(self.folder / place.role) for pairs in self.tree.all_pairs() for place in pairs.images]
        return abbreviate(list(dict.fromkeys(roles)))

    def _all_samples(self) -> list[Sample]:
        """List all pairs, of all folders; the names of those in the folder of a split begin with the split."""
        if self.pairs is not None:
            return [row.sample for row in self._rows(self.pairs)]
        return [
            sample if pairs.split is None else replace(sample, name=f"{pairs.split}/{sample.name}")
            for pairs in self.tree.all_pairs()
            for sample in pairs.samples
        ]

    def _unused_files(self, pairs: Pairs) -> list[str]:
        """Report masks without an image, and files that cannot be read as images."""
        lines = []
        suffix = self.tree.suffixes[1]
        if pairs.orphans:
            folders = {path.parent for path in pairs.orphans}
            where = pairs.orphans[0].parent if len(folders) == 1 else self.folder
            lines.append(
                f"{where}: no image for {abbreviate([path.name for path in pairs.orphans])}; expected names of images, "
                f"which are case-sensitive, followed by data.mask_suffix ({suffix!r}); rename or remove the masks"
            )
        for folder in dict.fromkeys(place.folder for place in (*pairs.images, *pairs.masks)):
            if folder == self.folder:
                continue  # the class list and other files belong there
            readable = set(image_files(folder))
            if other := sorted(path.name for path in folder.iterdir() if path not in readable and _is_user_file(path)):
                lines.append(
                    f"{folder}: {abbreviate(other)} {_are(other)} not used; expected images such as .jpg, .png or .tif; "
                    "convert or remove them"
                )
        return lines

    def _drawn(self, split: str) -> list[Sample]:
        """Draw the images of a split."""
        samples = self._all_samples()
        if self.draw == "order":
            return _drawn_by_order(samples, split, self.fractions, self.split_seed)
        return _drawn_by_name(samples, split, self.fractions, self.split_seed)

    def _read_classes(self, classes: list[str] | str | None) -> LabelTable:
        if isinstance(classes, list):
            self._class_source = "data.classes"
            return table_from_names(classes)
        if classes:
            path: Path | None = Path(classes).expanduser()
            if path is not None and not path.is_file():
                raise DataError(f"no class list: data.classes is {path}, which is no file; correct the path")
        else:
            folders = [self.folder]
            with suppress(DataError):  # a layout that cannot be read is reported with the samples
                folders += [place.folder for place in self.tree.places]
            path = find_class_list(self.folder, folders)
        assert path is not None
        self._class_source = str(path)
        if self._first_mask_is_rgb():
            # A list without colours does not fit RGB masks; reading the first mask then gives the clearer error.
            with suppress(DataError):
                return table_from_file(path, by_color=True)
        return table_from_file(path, by_color=False)

    def _first_mask_is_rgb(self) -> bool:
        masks: Sequence[Path] = ()
        with suppress(DataError):  # reported with the samples
            if self._lists_pairs():
                masks = [sample.mask for split in SPLITS for sample in self.samples(split) if sample.mask]
            else:
                masks = list(self.tree.mask_files())
        for path in masks:
            with suppress(DataError):  # a broken file; look at the next one
                return image_mode(path) in ("RGB", "RGBA")
        return False


def _drawn_by_name(samples: Sequence[Sample], split: str, fractions: tuple[float, float], seed: int) -> list[Sample]:
    """Draw by a hash of each name, a number from 0 to 1: small numbers are val, the next ones test, all others train."""
    if not samples:
        return []
    val, test = fractions
    numbers = [_number_of(sample.name, seed) for sample in samples]
    drawn = ["val" if number < val else "test" if number < val + test else "train" for number in numbers]
    # A small folder may have no image below the limit; training and validation need one each.
    if len(samples) > 1:
        if "val" not in drawn:
            drawn[numbers.index(min(numbers))] = "val"
        if "train" not in drawn:
            drawn[numbers.index(max(numbers))] = "train"
    return [sample for sample, name in zip(samples, drawn, strict=True) if name == split]


def _number_of(name: str, seed: int) -> float:
    """Return a number from 0 to 1 that depends on name and seed only, on all machines."""
    digest = hashlib.sha256(f"{seed}:{normalized(name)}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _drawn_by_order(samples: Sequence[Sample], split: str, fractions: tuple[float, float], seed: int) -> list[Sample]:
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    val = max(1, round(fractions[0] * len(samples)))
    test = round(fractions[1] * len(samples))
    chosen = {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}[split]
    return [samples[index] for index in sorted(chosen)]


def _existing_list(pairs: str, folder: Path) -> Path:
    """Return the path of a list of pairs, relative to the data's folder or to the current one."""
    path = Path(pairs).expanduser()
    for candidate in (folder / path, path):
        if candidate.is_file():
            return candidate
    raise DataError(f"data.pairs: no such file: {folder / path}; expected a CSV file with the columns image and mask")


def _is_user_file(path: Path) -> bool:
    """Whether a file is not hidden, not created by the operating system, and no class list."""
    ignored = ("Thumbs.db", "desktop.ini", *CLASS_LISTS)
    return path.is_file() and path.name[0] != "." and path.name not in ignored


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
