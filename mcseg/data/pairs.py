"""Find the images and masks below a folder, whatever its layout, and pair them by name."""

import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mcseg.data.files import Sample, image_files
from mcseg.data.labels import DataError

# Usual names, in lower case without separators: of the splits, for folders and lists ...
SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
# ... and of images and masks, for folders, suffixes and columns.
KIND_NAMES = {
    "image": (
        "images", "image", "imgs", "img", "imagedir", "imgdir", "jpegimages", "photos", "photo", "pictures", "picture",
        "rgb", "sat", "leftimg8bit", "inputs", "input", "frames", "frame", "x",
    ),
    "mask": (
        "masks", "mask", "maskdir", "labels", "label", "labeldir", "lbl", "annotations", "annotation", "annots", "annot",
        "ann", "anns", "anndir", "annotdir", "gt", "gts", "groundtruth", "groundtruths", "gtfine", "gtcoarse", "seg", "segs",
        "segmentation", "segmentations", "segmentationclass", "segmentationmasks", "segmaps", "targets", "target", "y",
    ),
}  # fmt: skip
# Further last parts of the names of masks, for folders that contain images and masks
_MASK_SUFFIXES = frozenset(
    {*KIND_NAMES["mask"], "l", "lab", "labelids", "labeltrainids", "color", "colour", "colors", "trimap"}
)
_SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
_KIND_OF = {name: kind for kind, names in KIND_NAMES.items() for name in names}
_SAMPLE_OF_NAMES = 2000  # masks whose names are looked at to find the suffixes


def split_of(name: str) -> str | None:
    """Return the split that a name stands for, such as ``val`` for ``Validation``; None if it is no split."""
    return _SPLIT_OF.get(_plain(name))


def kind_of(name: str) -> str | None:
    """Return ``image`` or ``mask`` if a name such as ``imgs`` or ``Ground-Truth`` stands for them; otherwise None."""
    return _KIND_OF.get(_plain(name))


def normalized(name: str) -> str:
    """Return the composed Unicode form of a name; macOS may store an umlaut as two characters."""
    return unicodedata.normalize("NFC", name)


def abbreviate(names: Sequence[str]) -> str:
    """Format names for a message as the first name and the number of further names."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def _meaning(name: str) -> tuple[str | None, str | None]:
    """Return split and kind in the name of a folder: ``Train_Masks`` gives train and mask, ``city`` gives two None."""
    plain = _plain(name)
    # Folders of COCO have a year, those of some tools the format of the files.
    for word in (plain, re.sub(r"(19|20)\d\d$", "", plain), re.sub(r"(png|jpe?g|tiff?|raw)$", "", plain)):
        if word in _SPLIT_OF or word in _KIND_OF:
            return _SPLIT_OF.get(word), _KIND_OF.get(word)
        for end in range(1, len(word)):
            first, second = word[:end], word[end:]
            if first in _SPLIT_OF and second in _KIND_OF:
                return _SPLIT_OF[first], _KIND_OF[second]
            if first in _KIND_OF and second in _SPLIT_OF:
                return _SPLIT_OF[second], _KIND_OF[first]
    return None, None


@dataclass(frozen=True)
class Place:
    """A folder with image files.

    Args:
        folder: Its path.
        split: Split in its path; None without one.
        kind: ``image`` or ``mask``; None if its path names neither.
        names: The folders in its path that name split and kind.
        rest: The other folders below these, "" or such as ``city/``.
        files: Its image files, sorted by name.
    """

    folder: Path
    split: str | None = None
    kind: str | None = None
    names: tuple[str, ...] = ()
    rest: str = ""
    files: tuple[Path, ...] = ()

    @property
    def role(self) -> str:
        """The folders that name split and kind, for messages."""
        return "/".join(self.names) or str(self.folder)

    @property
    def top(self) -> Path:
        """The folder that the names of its files are relative to."""
        levels = self.rest.count("/")
        is_below = levels and f"{self.folder.as_posix()}/".endswith(f"/{self.rest}")
        return self.folder.parents[levels - 1] if is_below else self.folder


@dataclass(frozen=True)
class Pairs:
    """Images of one split, with their masks.

    Args:
        split: Split in the names of the folders; None without one.
        samples: The images, sorted by name.
        images: Folders of the images.
        masks: Folders of the masks; the same folders if images and masks are in one folder.
        orphans: Masks without an image.
        others: Number of files in the folders of the masks whose names lack the suffix of masks.
    """

    split: str | None
    samples: list[Sample]
    images: list[Place]
    masks: list[Place]
    orphans: list[Path]
    others: int = 0


@dataclass(frozen=True)
class Tree:
    """The images and masks below a folder.

    Folders are known by their names, see `SPLIT_NAMES` and `KIND_NAMES`, in any order: ``train/images``, ``images/train``,
    ``train_images``, ``train`` and ``trainannot``. Other folders below these belong to the names of the images. Masks have
    the path of their images, apart from suffixes. Images and masks in one folder differ by their suffixes, or a JPEG image
    and a PNG mask have one name.

    Args:
        root: The folder.
        images_dir: Path of the image folder, relative to ``root`` or to the folder of each split; None finds it by name.
        masks_dir: Path of the mask folder, likewise.
        image_suffix: Suffix of the images' names that the masks' do not have; None finds it in the names.
        mask_suffix: Suffix of the masks' names, likewise.

    Raises:
        DataError: From the properties and methods: there are no images or no masks, or two folders or suffixes are
            possible.
    """

    root: Path
    images_dir: str | None = None
    masks_dir: str | None = None
    image_suffix: str | None = None
    mask_suffix: str | None = None
    _paired: dict[str | None, Pairs] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def places(self) -> list[Place]:
        """All folders with image files that have a role."""
        found = list(self._scan(self.root, strict=True))
        if not any(place.kind == "image" or place.split for place in found):
            # images and masks below folders of other names, such as a folder per scene
            found = list(self._scan(self.root, strict=False))
        for kind, name in (("image", self.images_dir), ("mask", self.masks_dir)):
            if name is not None:
                found += self._given(kind, name)
        return list({place.folder: place for place in found}.values())

    @property
    def splits(self) -> list[str]:
        """Splits that the folders of images name."""
        named = {place.split for place in self.places if place.kind != "mask"}
        return [split for split in SPLIT_NAMES if split in named]

    def pairs(self, split: str | None) -> Pairs | None:
        """Pair the images of a split, or with None those outside the folders of splits; None if there is no image folder."""
        if split not in self._paired:
            images, masks = self._folders(split)
            if not images:
                return None
            if not masks:
                raise DataError(
                    f"{self.root / str(self.masks_dir)}: {_state(self.root / str(self.masks_dir))}; expected the masks there"
                )
            self._paired[split] = _pair(split, images, masks, self.suffixes, self.root)
        return self._paired[split]

    def all_pairs(self) -> list[Pairs]:
        """Pair the images of all folders.

        Raises:
            DataError: There is no image.
        """
        if found := [pairs for split in (*self.splits, None) if (pairs := self.pairs(split))]:
            return found
        folder = self.root / (self.images_dir or "images")
        hint = (
            "" if self.images_dir else " or in a folder with another usual name (imgs, train, ...), or set data.images_dir"
        )
        raise DataError(f"{folder}: {_state(folder)}; expected the images there{hint}{self._inner_hint()}")

    def mask_files(self) -> Iterator[Path]:
        """Iterate over mask files, without pairing them with images."""
        for split in (*self.splits, None):
            images, masks = self._folders(split)
            for place in masks:
                if place in images:  # one folder for both: those that are not JPEG are masks, or colour images
                    yield from (sample.mask for sample in (self.pairs(split) or _NONE).samples if sample.mask)
                else:
                    yield from place.files

    @cached_property
    def suffixes(self) -> tuple[str, str]:
        """Suffixes of images and masks, as set or as found in the names."""
        if self.image_suffix is not None and self.mask_suffix is not None:
            return self.image_suffix, self.mask_suffix
        images: set[str] = set()
        masks: set[str] = set()
        shared = False
        where = ""
        for split in (*self.splits, None):
            image_places, mask_places = self._folders(split)
            where = where or next((place.role for place in mask_places), "")
            shared |= bool(mask_places) and mask_places == image_places
            prefix = f"{split}:"
            images |= {prefix + key for place in image_places for key in _keys(place)}
            masks |= {prefix + key for place in mask_places for key in _keys(place)}
        return _find_suffixes(images, masks, given=(self.image_suffix, self.mask_suffix), shared=shared, where=where)

    def _scan(self, folder: Path, strict: bool, place: Place | None = None, above: tuple[str, ...] = ()) -> Iterator[Place]:
        """Find the folders with image files; with ``strict``, only below folders whose names have a meaning."""
        place = place or Place(folder)
        given = {kind for kind, name in (("image", self.images_dir), ("mask", self.masks_dir)) if name is not None}
        if (place.names or not strict or folder == self.root) and place.kind not in given and (files := image_files(folder)):
            yield Place(folder, place.split, place.kind, place.names, place.rest, tuple(files))
        for inner in _folders_in(folder, above):
            split, kind = _meaning(inner.name)
            kind = "mask" if "mask" in (kind, place.kind) else kind or place.kind
            if kind in given and kind != place.kind:
                continue
            if (place.split or split, kind) != (place.split, place.kind):
                at = Place(inner, place.split or split, kind, (*place.names, inner.name), place.rest)
            elif strict and folder == self.root:
                continue
            else:
                at = Place(inner, place.split, place.kind, place.names, f"{place.rest}{inner.name}/")
            yield from self._scan(inner, strict, at, (*above, os.path.realpath(folder)))

    def _given(self, kind: str, name: str) -> Iterator[Place]:
        """Find the folders with image files below a folder that the user names."""
        candidates = [Place(self.root / name, None, kind, (name,))]
        for inner in _folders_in(self.root, ()):
            if split := split_of(inner.name):
                candidates.append(Place(inner / name, split, kind, (inner.name, name)))
        for place in candidates:
            if place.folder.is_dir():
                yield from self._scan_below(place)

    def _scan_below(self, place: Place, above: tuple[str, ...] = ()) -> Iterator[Place]:
        if files := image_files(place.folder):
            yield Place(place.folder, place.split, place.kind, place.names, place.rest, tuple(files))
        for inner in _folders_in(place.folder, above):
            split = None if place.split else split_of(inner.name)
            names = (*place.names, inner.name) if split else place.names
            rest = place.rest if split else f"{place.rest}{inner.name}/"
            below = Place(inner, place.split or split, place.kind, names, rest)
            yield from self._scan_below(below, (*above, os.path.realpath(place.folder)))

    def _folders(self, split: str | None) -> tuple[list[Place], list[Place]]:
        """Return the folders of images and of masks of a split; the same if they are in one folder."""
        images = self._one(split, "image") or ([] if self.images_dir else self._one(split, None))
        masks = self._one(split, "mask") or (self._one(None, "mask") if images and split else [])
        return images, masks or ([] if self.masks_dir else images)

    def _one(self, split: str | None, kind: str | None) -> list[Place]:
        """Return the folders of one role. Raises DataError if folders of different names have it."""
        found = [place for place in self.places if place.split == split and place.kind == kind]
        roles = {place.names: place for place in found}
        if len(roles) > 1:
            one, other = list(roles.values())[:2]
            what = {"image": "images", "mask": "masks", None: "images"}[kind]
            option = "data.masks_dir" if kind == "mask" else "data.images_dir"
            raise DataError(
                f"{self.root}: found two folders of {what}{f' of the {split} split' if split else ''}, {one.role} and "
                f"{other.role}; expected one; remove or rename the other, or set {option}"
            )
        return found

    def _inner_hint(self) -> str:
        """Name a subfolder that has a usual layout itself: archives often have one folder around all."""
        for inner in _folders_in(self.root, ()) if self.root.is_dir() else ():
            if any(_meaning(folder.name) != (None, None) for folder in _folders_in(inner, ())):
                return f"; {inner} has such folders: set data.root to it"
        return ""


_NONE = Pairs(None, [], [], [], [])


def _state(folder: Path) -> str:
    return "contains no readable image" if folder.is_dir() else "no such folder"


def _folders_in(folder: Path, above: Collection[str]) -> list[Path]:
    """List the folders in a folder, sorted, without hidden ones, macOS's, and links to the folder or to one above it."""
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):  # a link to itself
                    if entry.name[0] != "." and entry.name != "__MACOSX" and entry.is_dir():
                        names.append(entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); expected a folder of images") from None
    outer = {*above, os.path.realpath(folder)}
    return [folder / name for name in sorted(names) if os.path.realpath(folder / name) not in outer]


def _keys(place: Place) -> dict[str, Path]:
    """Map the files of a folder by their name without extension, after the folders that belong to the name."""
    return {normalized(place.rest + path.stem): path for path in place.files}


def _unique_keys(places: Sequence[Place]) -> dict[str, tuple[Place, Path]]:
    files: dict[str, tuple[Place, Path]] = {}
    for place in places:
        for path in place.files:
            key = normalized(place.rest + path.stem)
            if key in files:
                other = files[key][1]
                both = f"{other.name} and {path.name}" if other.parent == path.parent else f"{other} and {path}"
                raise DataError(f"{place.folder}: {both} have the same name; rename or remove one")
            files[key] = (place, path)
    return files


def _pair(split: str | None, images: list[Place], masks: list[Place], suffixes: tuple[str, str], root: Path) -> Pairs:
    """Pair images and masks that have the same path apart from their suffixes."""
    image_suffix, mask_suffix = suffixes
    if images == masks:
        image_files, mask_files = _divide(images, suffixes)
        if not mask_files:
            raise DataError(
                f"{root / 'masks'}: {_state(root / 'masks')}; expected the masks there, in a folder with another usual name "
                "(labels, annotations, ...), or beside the images with a suffix such as _mask; or set data.masks_dir"
            )
    else:
        image_files, mask_files = _unique_keys(images), _unique_keys(masks)
    top = masks[0].top
    samples, used = [], set()
    for key, (place, path) in image_files.items():
        partner = key.removesuffix(image_suffix) + mask_suffix
        used.add(partner)
        mask = mask_files[partner][1] if partner in mask_files else None
        name = place.rest + path.stem
        expected = top / f"{name.removesuffix(image_suffix)}{mask_suffix}.png"
        samples.append(Sample(name, path, mask, expected_mask=expected))
    orphans = [path for key, (_, path) in mask_files.items() if key not in used and key.endswith(mask_suffix)]
    if masks[0].split != split:  # masks of all splits in one folder
        orphans = []
    return Pairs(split, samples, images, masks, orphans, others=sum(not key.endswith(mask_suffix) for key in mask_files))


def _divide(places: Sequence[Place], suffixes: tuple[str, str]) -> tuple[dict[str, tuple[Place, Path]], ...]:
    """Divide the files of folders that contain images and masks."""
    image_suffix, mask_suffix = suffixes
    files = [(place, path) for place in places for path in place.files]
    if image_suffix == mask_suffix:  # a.jpg and a.png
        stems = Counter(normalized(place.rest + path.stem) for place, path in files)
        is_mask = [
            stems[normalized(place.rest + path.stem)] > 1 and path.suffix.lower() not in (".jpg", ".jpeg")
            for place, path in files
        ]
    else:
        ends = [normalized(path.stem) for _, path in files]
        is_mask = [end.endswith(mask_suffix) if mask_suffix else not end.endswith(image_suffix) for end in ends]
    divided: list[dict[str, tuple[Place, Path]]] = []
    for wanted in (False, True):
        chosen: dict[Place, list[Path]] = {}
        for (place, path), mask in zip(files, is_mask, strict=True):
            if mask == wanted:
                chosen.setdefault(place, []).append(path)
        divided.append(
            _unique_keys([Place(p.folder, p.split, p.kind, p.names, p.rest, tuple(paths)) for p, paths in chosen.items()])
        )
    return tuple(divided)


def _find_suffixes(
    images: Collection[str], masks: Collection[str], given: tuple[str | None, str | None], *, shared: bool, where: str
) -> tuple[str, str]:
    """Find the suffixes of images and masks that pair most names.

    Args:
        images: Names of the images, with the folders that belong to them.
        masks: Names of the masks.
        given: Suffixes that are set, or None.
        shared: Whether images and masks are in one folder; both arguments then list all files.
        where: Folder of the masks, for messages.

    Raises:
        DataError: Several suffixes of the masks pair as many names.
    """
    none = (given[0] or "", given[1] or "")
    if not images or not masks:
        return none
    if (
        not shared
        and given[1] is None
        and 2 * len({key.removesuffix(none[0]) for key in images} & set(masks)) >= min(len(images), len(masks))
    ):
        return none  # most names are equal, so there is no suffix
    sample = sorted(masks, key=lambda key: zlib.crc32(key.encode()))[:_SAMPLE_OF_NAMES]
    best: tuple[str, Counter[str]] | None = None
    for image_suffix in _image_suffixes(images, shared=shared) if given[0] is None else [given[0]]:
        bases = {key[: len(key) - len(image_suffix)] for key in images if key.endswith(image_suffix)}
        votes = Counter(
            rest
            for key in sample
            if (rest := _remainder(key, bases, proper=shared and not image_suffix)) is not None
            and (given[1] is None or rest == given[1])
        )
        if shared:  # an image has no mask word at its end, a mask has one
            votes = Counter(
                {
                    rest: count
                    for rest, count in votes.items()
                    if rest != image_suffix
                    and _plain(image_suffix) not in _MASK_SUFFIXES
                    and (rest == given[1] or _plain(rest) in _MASK_SUFFIXES or kind_of(image_suffix) == "image")
                }
            )
        if votes and (best is None or votes.most_common(1)[0][1] > best[1].most_common(1)[0][1]):
            best = image_suffix, votes
    if best is None:
        return none
    (suffix, count), *others = best[1].most_common(2)
    if 2 * count < min(len(images), len(sample)) // (2 if shared else 1):  # too few to be the rule
        return none
    if others and 2 * others[0][1] >= count and given[1] is None:
        raise DataError(
            f"{where}: the images have masks of two suffixes, {suffix!r} and {others[0][0]!r}; expected one; set "
            "data.mask_suffix to that of the class indices or colours"
        )
    return best[0], suffix


def _image_suffixes(images: Collection[str], *, shared: bool) -> list[str]:
    """List possible suffixes of the images: none, and last parts of names that most images share."""
    ends: Counter[str] = Counter()
    for key in images:
        ends.update(key[match.start() :] for match in re.finditer(r"[_\-. ](?=[^/]*$)", key))
    least = len(images) / (4 if shared else 2)
    common = [end for end, count in ends.items() if count >= least and count > 1]
    return ["", *sorted(common, key=lambda end: (-ends[end], len(end)))[:8]]


def _remainder(key: str, bases: Collection[str], *, proper: bool) -> str | None:
    """Return the part of a name after the longest base that it begins with; None if it begins with none."""
    for end in range(len(key) - proper, key.rfind("/"), -1):
        if key[:end] in bases:
            rest = key[end:]
            return None if rest[:1].isdigit() and key[end - 1].isdigit() else rest  # 1 is no base of 12
    return None
