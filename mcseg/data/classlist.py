"""Class lists: build a label table from a list of names, a ``classes.txt`` or a ``classes.toml``."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcseg.data.labels import IGNORE_INDEX, DataError, LabelTable, pack_color
from mcseg.palette import Color, distinct_colors


def table_from_names(names: Sequence[str]) -> LabelTable:
    """Build the table for masks with the class indices 0..C-1 and 255 for void.

    Args:
        names: Class names in the order of their indices.

    Raises:
        DataError: There are fewer than 2 or more than 254 names, or a name is repeated.

    Example:
        >>> from mcseg.data.classlist import table_from_names
        >>> table_from_names(["road", "pole"]).raw_ids
        {0: 0, 1: 1, 255: 255}
    """
    raw_ids = {index: index for index in range(len(names))} | {IGNORE_INDEX: IGNORE_INDEX}
    return LabelTable(tuple(names), distinct_colors(len(names)), raw_ids)


def table_from_file(path: Path, by_color: bool) -> LabelTable:
    """Read a class list from a file.

    A ``.toml`` file has one ``[[classes]]`` table per class, with these keys:

    - ``name``: name of the class;
    - ``id`` (optional): its value in the masks, or a list of values; the default is the position of the class, from 0;
    - ``color`` (optional): its RGB colour, three values 0..255.

    An optional top-level list ``void`` names further values, or colours, that are void. The value 255 is always void unless
    a class has it. If all classes have different colours, palette files are read by colour, as programs write palettes in
    any order, and so are colour files.

    Any other file is a text file with one class per line, ``name`` or ``name R G B``. Empty lines and lines that begin
    with ``#`` are skipped.

    Args:
        path: Path of the class list.
        by_color: Whether colours stand for classes in the masks; each class needs a colour then.

    Returns:
        The label table; classes without a colour get one.

    Raises:
        DataError: The file is missing or malformed, or a class has no colour although ``by_color`` is set.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the class list cannot be read ({error}); expected a text file in UTF-8") from None
    if path.suffix.lower() == ".toml":
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{path}: not a valid TOML file ({error}); correct the syntax") from None
        return table_from_toml(content, path.name, by_color, colors=True)
    lines = enumerate(text.splitlines(), start=1)
    classes = [
        _parse_text_line(line, f"{path}, line {number}") for number, line in lines if line.strip() and line.strip()[0] != "#"
    ]
    return table_from_toml({"classes": classes}, path.name, by_color, colors=True)


def table_from_toml(
    content: Mapping[str, Any],
    where: str,
    by_color: bool = False,
    void: Sequence[int] = (IGNORE_INDEX,),
    colors: bool = False,
) -> LabelTable:
    """Build the table from the content of a TOML class list, see `table_from_file`.

    Args:
        content: Mapping with ``classes`` and, optionally, ``void``.
        where: Name of the source, for error messages.
        by_color: Whether colours stand for classes in the masks.
        void: Mask values that are void even if ``content`` does not list them, unless a class has them; not used if
            ``by_color`` is set.
        colors: Whether colour and palette files are read by the colours, if all classes have different ones.

    Raises:
        DataError: The content is malformed, or a class has no colour although ``by_color`` is set.
    """
    classes = content.get("classes")
    if not isinstance(classes, list) or not all(isinstance(entry, dict) and "name" in entry for entry in classes):
        raise DataError(
            f"{where}: found no classes, or a class without a name; expected a list `classes` of tables with a `name`"
        )
    unknown = sorted({key for entry in classes for key in entry} - {"name", "id", "color"})
    if unknown:
        raise DataError(f"{where}: unknown key {', '.join(unknown)} in `classes`; expected name, id, color")
    names = tuple(str(entry["name"]) for entry in classes)
    defaults = distinct_colors(len(classes))
    palette = tuple(
        _parse_color(entry["color"], f"{where}, class {entry['name']}") if "color" in entry else default
        for entry, default in zip(classes, defaults, strict=True)
    )
    if by_color:
        missing = [str(entry["name"]) for entry in classes if "color" not in entry]
        if missing:
            raise DataError(
                f"{where}: the masks are coloured, but there is no colour for {', '.join(missing)}; add the colours"
            )
        raw = [[pack_color(color)] for color in palette]
    else:
        raw = [
            _parse_ids(entry.get("id", position), f"{where}, class {entry['name']}")
            for position, entry in enumerate(classes)
        ]
    all_values = [value for values in raw for value in values]
    repeated = {value for value in all_values if all_values.count(value) > 1}
    if repeated:
        shared = ", ".join(name for name, values in zip(names, raw, strict=True) if repeated.intersection(values))
        kind = "colour" if by_color else "id"
        raise DataError(f"{where}: the classes {shared} have the same {kind}; expected a different {kind} for each class")
    entries = content.get("void", [])
    # An index table may list void colours as well, for its palette files.
    void_colors = [pack_color(_parse_color(v, f"{where}, void")) for v in entries if by_color or isinstance(v, list)]
    void_values = void_colors if by_color else [_parse_id(v, f"{where}, void") for v in entries if not isinstance(v, list)]
    raw_ids = dict.fromkeys([*void_values, *(() if by_color else void)], IGNORE_INDEX)
    raw_ids |= {value: train for train, values in enumerate(raw) for value in values}
    by_listed_color: dict[int, int] = {}
    if colors and not by_color and all("color" in entry for entry in classes):
        by_listed_color = dict.fromkeys(void_colors, IGNORE_INDEX)
        by_listed_color |= {pack_color(color): train for train, color in enumerate(palette)}
        if len(set(palette)) < len(palette):  # colours for pictures only
            by_listed_color = {}
    try:
        return LabelTable(names, palette, raw_ids, by_color=by_color, colors=by_listed_color)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _parse_ids(value: object, where: str) -> list[int]:
    return [_parse_id(entry, where) for entry in (value if isinstance(value, list) else [value])]


def _parse_id(value: object, where: str) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 16:
        raise DataError(f"{where}: found the id {value!r}, expected a whole number from 0 to 65535")
    return value


def _parse_color(value: object, where: str) -> Color:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(isinstance(v, int) and 0 <= v <= 255 for v in value)
    ):
        raise DataError(f"{where}: found the colour {value!r}, expected three whole numbers from 0 to 255")
    return (value[0], value[1], value[2])


def _parse_text_line(line: str, where: str) -> dict[str, Any]:
    fields = line.replace(",", " ").split()
    if len(fields) >= 4 and all(field.isdigit() for field in fields[-3:]):
        return {"name": " ".join(fields[:-3]), "color": [int(field) for field in fields[-3:]]}
    if fields[-1].isdigit() or fields[0].isdigit():
        raise DataError(
            f"{where}: found {line.strip()!r}, expected `name` or `name R G B`; to give the classes ids other than "
            "0, 1, 2, ..., write a classes.toml"
        )
    return {"name": line.strip()}
