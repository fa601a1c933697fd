"""Class lists: names, ids and colours from a list, a ``classes.txt`` or a TOML file, as one label table."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcseg.data.labels import IGNORE_INDEX, Color, DataError, LabelTable, distinct_colors, pack_color


def table_from_names(names: Sequence[str]) -> LabelTable:
    """Build the table of masks that hold class indices 0..C-1, and 255 for void.

    Example:
        >>> from mcseg.data.classlist import table_from_names
        >>> table_from_names(["road", "pole"]).raw_ids
        {0: 0, 1: 1, 255: 255}
    """
    raw_ids = {index: index for index in range(len(names))} | {IGNORE_INDEX: IGNORE_INDEX}
    return LabelTable(tuple(names), distinct_colors(len(names)), raw_ids)


def table_from_file(path: Path, by_color: bool) -> LabelTable:
    """Read a class list.

    A ``.toml`` file holds ``[[classes]]`` with ``name`` and, where wanted, ``id`` (value in the masks, or a list of values;
    default: position) and ``color``; ``void`` lists further mask values (or colours) without a class. Any other file is
    text, a class per line: ``name`` or ``name R G B``; empty lines and lines that begin with ``#`` are left out.

    Args:
        path: the file.
        by_color: the masks show colours instead of indices.

    Raises:
        DataError: missing or malformed file; colours wanted and missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the class list cannot be read ({error}); expected text in UTF-8") from None
    if path.suffix.lower() == ".toml":
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{path}: not a valid TOML file ({error})") from None
        return table_from_toml(content, path.name, by_color)
    lines = enumerate(text.splitlines(), start=1)
    classes = [
        _text_line(line, f"{path}, line {number}") for number, line in lines if line.strip() and line.strip()[0] != "#"
    ]
    return table_from_toml({"classes": classes}, path.name, by_color)


def table_from_toml(
    content: Mapping[str, Any], where: str, by_color: bool = False, void: Sequence[int] = (IGNORE_INDEX,)
) -> LabelTable:
    """Build the table from ``classes`` and ``void`` as :func:`table_from_file` describes them.

    Args:
        content: the two keys.
        where: named in errors.
        by_color: the masks show colours instead of indices.
        void: indices without a class that are void whether the content lists them or not.

    Raises:
        DataError: the content is malformed.
    """
    classes = content.get("classes")
    if not isinstance(classes, list) or not all(isinstance(entry, dict) and "name" in entry for entry in classes):
        raise DataError(f"{where}: expected a list `classes` of tables, each with a `name`")
    unknown = sorted({key for entry in classes for key in entry} - {"name", "id", "color"})
    if unknown:
        raise DataError(f"{where}: unknown key {', '.join(unknown)} in `classes`; expected name, id, color")
    names = tuple(str(entry["name"]) for entry in classes)
    defaults = distinct_colors(len(classes))
    palette = tuple(
        _color(entry["color"], f"{where}, class {entry['name']}") if "color" in entry else default
        for entry, default in zip(classes, defaults, strict=True)
    )
    if by_color:
        missing = [str(entry["name"]) for entry in classes if "color" not in entry]
        if missing:
            raise DataError(f"{where}: the masks are coloured but no colour is given for {', '.join(missing)}")
        raw = [[pack_color(color)] for color in palette]
    else:
        raw = [_ids(entry.get("id", position), f"{where}, class {entry['name']}") for position, entry in enumerate(classes)]
    every = [value for values in raw for value in values]
    repeated = {value for value in every if every.count(value) > 1}
    if repeated:
        shared = ", ".join(name for name, values in zip(names, raw, strict=True) if repeated.intersection(values))
        raise DataError(f"{where}: the classes {shared} have the same {'colour' if by_color else 'id'}")
    listed = [
        pack_color(_color(entry, f"{where}, void")) if by_color else _id(entry, f"{where}, void")
        for entry in content.get("void", [])
    ]
    raw_ids = dict.fromkeys([*listed, *(() if by_color else void)], IGNORE_INDEX)
    raw_ids |= {value: train for train, values in enumerate(raw) for value in values}
    try:
        return LabelTable(names, palette, raw_ids, by_color)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _ids(value: object, where: str) -> list[int]:
    return [_id(entry, where) for entry in (value if isinstance(value, list) else [value])]


def _id(value: object, where: str) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 16:
        raise DataError(f"{where}: found the id {value!r}, expected a whole number from 0 to 65535")
    return value


def _color(value: object, where: str) -> Color:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(isinstance(v, int) and 0 <= v <= 255 for v in value)
    ):
        raise DataError(f"{where}: found the colour {value!r}, expected three whole numbers from 0 to 255")
    return (value[0], value[1], value[2])


def _text_line(line: str, where: str) -> dict[str, Any]:
    words = line.replace(",", " ").split()
    if len(words) >= 4 and all(word.isdigit() for word in words[-3:]):
        return {"name": " ".join(words[:-3]), "color": [int(word) for word in words[-3:]]}
    if words[-1].isdigit() or words[0].isdigit():
        raise DataError(
            f"{where}: found {line.strip()!r}, expected `name` or `name R G B`; ids that are not the line's "
            "position need a classes.toml"
        )
    return {"name": line.strip()}
