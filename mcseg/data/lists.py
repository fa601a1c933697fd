"""Lists of images: text files with names, and CSV files with the paths of images and masks."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mcseg.data.files import Sample
from mcseg.data.labels import DataError
from mcseg.data.pairs import SPLIT_NAMES, abbreviate, kind_of, normalized, split_of

# Folders below the root that may contain the list of each split; the last one is that of PASCAL VOC
_FOLDERS = ("", "splits", "lists", "ImageSets", "ImageSets/Segmentation")


def find_list(root: Path, split: str) -> Path | None:
    """Return the list of a split, such as ``val.txt``, ``valid.csv`` or ``ImageSets/Segmentation/val.txt``.

    A CSV file without columns of images and masks belongs to something else and is left out.

    Raises:
        DataError: There are several.
    """
    names = [f"{name}{extension}" for name in SPLIT_NAMES[split] for extension in (".csv", ".txt")]
    found = [path for folder in _FOLDERS for name in names if (path := root / folder / name).is_file()]
    found = [path for path in found if path.suffix == ".txt" or _columns(_lines(path)).keys() >= {"image", "mask"}]
    if len(found) > 1:
        raise DataError(
            f"{found[0]} and {found[1]}: two lists of the {split} split; expected one; remove or rename the other"
        )
    return found[0] if found else None


def choose(path: Path, samples: Sequence[Sample], where: str) -> list[Sample]:
    """Return the samples that a text file lists, one name per line, in its order.

    A line is the name of an image, with or without extension and folders; of two paths in a line, the first is the image's.

    Args:
        path: The list.
        samples: All images.
        where: Folder of the images, for messages.

    Raises:
        DataError: The list cannot be read, a name has no image or several, or is listed twice.
    """
    by_stem: dict[str, list[Sample]] = {}
    for sample in samples:
        for stem in {normalized(sample.image.stem), normalized(sample.image.name)}:
            by_stem.setdefault(stem, []).append(sample)

    def matching(text: str) -> list[Sample]:
        parts = PurePosixPath(normalized(text.replace("\\", "/"))).parts
        same = by_stem.get(parts[-1], []) if parts else []
        if len(same) < 2:
            return same
        shared = [_equal_ends(parts[:-1], one.image.parent.parts) for one in same]
        return [one for one, count in zip(same, shared, strict=True) if count == max(shared)]

    listed, missing = [], []
    for number, line in enumerate(_lines(path), 1):
        text = line.strip()
        if not text:
            continue
        found = matching(text)
        if len(found) != 1 and len(columns := text.split()) == 2:
            found = matching(columns[0])
        if len(found) > 1:
            raise DataError(
                f"{path}, line {number}: {text} is the name of {found[0].image} and of {found[1].image}; expected one; list "
                "the path of the image"
            )
        listed += found
        missing += [] if found else [text]
    if missing:
        raise DataError(
            f"{path}: lists {PurePosixPath(missing[0]).name} ({len(missing)} such name{'s' * (len(missing) != 1)}), which "
            f"is not in {where}; expected names of images in this folder; correct the list"
        )
    if repeated := [sample.name for sample, count in Counter(listed).items() if count > 1]:
        raise DataError(f"{path}: lists {abbreviate(repeated)} more than once; list each image once")
    return listed


def _equal_ends(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the number of equal folders at the end of two paths."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class Row:
    """A row of a list of pairs: its sample, and its split if the list has such a column."""

    sample: Sample
    split: str | None


def read_pairs(path: Path) -> list[Row]:
    """Read a CSV file with the columns ``image``, ``mask`` and, optionally, ``split``.

    Other usual names of the columns are known as well, such as ``img_path`` and ``label``. Comma, semicolon or tab separate
    them. Paths are relative to the file. The name of a sample is the path of its image without extension.

    Raises:
        DataError: The file cannot be read, lacks a column, or a row is incomplete, repeats an image, or names a file that
            does not exist or an unknown split; the message has the number of the line.
    """
    lines = _lines(path)
    columns = _columns(lines)
    if missing := [kind for kind in ("image", "mask") if kind not in columns]:
        raise DataError(
            f"{path}, line 1: found {lines[0] if lines else 'an empty file'!r}, expected a header with the columns image, "
            f"mask and, optionally, split; the column {missing[0]} is missing"
        )
    reader = csv.reader(lines, delimiter=_delimiter(lines[0]))
    next(reader)
    rows: list[Row] = []
    absent: list[str] = []
    first: dict[tuple[Path, str | None], int] = {}
    for cells in reader:
        where = f"{path}, line {reader.line_num}"
        values = {kind: cells[column].strip() if column < len(cells) else "" for kind, column in columns.items()}
        if not any(cell.strip() for cell in cells):
            continue
        if not all(values.values()):
            empty = ", ".join(kind for kind, value in values.items() if not value)
            raise DataError(f"{where}: no {empty}; expected a value in each of the columns {', '.join(columns)}")
        split = split_of(values["split"]) if "split" in values else None
        if "split" in values and split is None:
            raise DataError(f"{where}: found the split {values['split']!r}, expected train, val or test")
        image, mask = (path.parent / Path(values[kind].replace("\\", "/")).expanduser() for kind in ("image", "mask"))
        absent += [f"{where}: {file} does not exist" for file in (image, mask) if not file.is_file()]
        if (image, split) in first:
            raise DataError(
                f"{where}: lists {values['image']} again, after line {first[image, split]}; list each image once"
            )
        first[image, split] = reader.line_num
        rows.append(Row(Sample(_name(values["image"]), image, mask), split))
    if absent:
        more = f" ({len(absent)} such files)" if len(absent) > 1 else ""
        raise DataError(f"{absent[0]}{more}; expected paths relative to {path.parent}; correct the list")
    counts = Counter((row.sample.name, row.split) for row in rows)
    return [
        row
        if counts[row.sample.name, row.split] == 1  # files that differ in their extension only keep it
        else Row(
            Sample(row.sample.name + row.sample.image.suffix.replace(".", "_"), row.sample.image, row.sample.mask), row.split
        )
        for row in rows
    ]


def _name(text: str) -> str:
    """Return the name of an image: its path without extension, and without parts that lead out of a folder."""
    path = PurePosixPath(text.replace("\\", "/"))
    return "/".join(re.sub(r":$", "", part) for part in path.with_suffix("").parts if part not in ("/", "..", "."))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        kind = "a CSV file" if path.suffix == ".csv" else "one image name per line"
        raise DataError(f"{path}: cannot be read ({error}); expected {kind} in UTF-8") from None


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _columns(lines: Sequence[str]) -> dict[str, int]:
    """Map image, mask and split to their columns, as far as the header, the first line, names them."""
    header = next(csv.reader(lines[:1], delimiter=_delimiter(lines[0])), []) if lines else []
    columns: dict[str, int] = {}
    for index, title in enumerate(header):
        word = re.sub(r"[\W_]*(path|filename|file|name)s?$", "", title.strip(), flags=re.IGNORECASE)
        kind = "split" if word.lower() in ("split", "set", "subset", "fold", "partition") else kind_of(word)
        if kind:
            columns.setdefault(kind, index)
    return columns
