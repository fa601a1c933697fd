"""Class lists: build a label table from a list of names, a ``classes.txt`` or a ``classes.toml``."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcseg.data.labels import IGNORE_INDEX, DataError, LabelTable, pack_color
from mcseg.palette import Color, distinct_colors

# Names of class lists, in the order of preference: ours, CamVid's of Kaggle, Roboflow's, CamVid's, CVAT's
CLASS_LISTS = (
    "classes.toml", "classes.txt", "classes.csv", "class_dict.csv", "_classes.csv", "class_names.txt", "label_colors.txt",
    "labelmap.txt", "labels.txt",
)  # fmt: skip
# Orders of the fields of a line: n name, i id, c colour
_FORMS = ("n", "nc", "cn", "in", "ni", "inc", "nic", "icn")
_HEADERS = {
    "n": ("name", "names", "class", "classes", "classname", "label", "labels", "labelname", "category", "categoryname"),
    "i": ("id", "ids", "index", "idx", "value", "pixelvalue", "pixel", "classid", "labelid", "code", "number"),
    "c": ("rgb", "color", "colour", "colorrgb"),
    "r": ("r", "red"),
    "g": ("g", "green"),
    "b": ("b", "blue"),
}
_VOID = ("void", "ignore", "ignored", "unlabeled", "unlabelled", "unlabled", "unknown")
_TOKEN = re.compile(r'"[^"]*"|[^\s,;:()\[\]"]+')


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

    Any other file is a text file with one class per line, with fields that are separated by commas, semicolons, tabs or
    colons, or else by spaces. All lines have one of these forms:

    - ``name``, ``name R G B`` or ``R G B name``;
    - ``id name``, ``name id``, ``id name R G B`` or ``name id R G B``, where ``id`` is the value in the masks.

    A header such as ``name,r,g,b`` or ``Pixel Value, Class`` sets the order of the columns. Empty lines and lines that begin
    with ``#`` are skipped, and quotes keep numbers in a name: ``"lane 1"``. A line ``void``, ``ignore`` or ``unlabeled``
    with id 255 is void and no class.

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
    return table_from_toml(_parse_text(text, path, by_color), path.name, by_color, colors=True)


def find_class_list(root: Path, folders: Sequence[Path] = ()) -> Path:
    """Return the class list of a data set: a file of `CLASS_LISTS` in its root, or else in one of its folders.

    Args:
        root: Folder of the data set.
        folders: Folders with images; exporters put a list into each.

    Raises:
        DataError: There is no list, or there are several whose classes differ.
    """
    found = [path for name in CLASS_LISTS if (path := root / name).is_file()]
    inner = dict.fromkeys(folder for folder in folders if folder != root)
    found = found or [path for folder in inner for name in CLASS_LISTS if (path := folder / name).is_file()]
    if not found:
        raise DataError(
            f"no class list: looked for {root / CLASS_LISTS[0]} and {root / CLASS_LISTS[1]} (or "
            f"{', '.join(CLASS_LISTS[2:])}); write one class name per line into classes.txt, or set data.classes"
        )
    first = table_from_file(found[0], by_color=False)
    for path in found[1:]:
        other = table_from_file(path, by_color=False)
        if (other.names, other.raw_ids) != (first.names, first.raw_ids):
            raise DataError(
                f"{found[0]} and {path}: two class lists that differ; expected one; remove one or set data.classes"
            )
    return found[0]


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


def _parse_text(text: str, path: Path, by_color: bool) -> dict[str, Any]:
    """Parse a text file with one class per line into the content of a TOML list."""
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, line) for number, line in numbered if line and line[0] != "#"]
    header = _header(lines[0][1]) if len(lines) > 1 else None
    lines = lines[1:] if header else lines
    forms = [header] if header else _FORMS
    parsed = {form: [_parse_line(line, form, strict=not header) for _, line in lines] for form in forms}
    if not header:  # some classes may lack a colour
        parsed["some"] = [plain or colored for plain, colored in zip(parsed["n"], parsed["nc"], strict=True)]
    for entries in parsed.values():
        usable = [entry for entry in entries if entry is not None]
        if len(usable) == len(entries) and (header or _is_consistent(usable)):
            is_void = [entry.get("id") == IGNORE_INDEX and entry["name"].lower() in _VOID for entry in usable]
            void = [entry["color" if by_color else "id"] for entry, is_ in zip(usable, is_void, strict=True) if is_]
            return {"classes": [entry for entry, is_ in zip(usable, is_void, strict=True) if not is_], "void": void}
    if _end_in_numbers([line for _, line in lines]):
        return {"classes": [{"name": line} for _, line in lines]}
    # Report the first line that does not have the form of most lines.
    entries = max(parsed.values(), key=lambda entries: sum(entry is not None for entry in entries))
    number, line = lines[next((index for index, entry in enumerate(entries) if entry is None), 0)]
    raise DataError(
        f"{path}, line {number}: found {line!r}, expected "
        + (
            f"the columns of the header, {_described(header)}"
            if header
            else "all lines as `name`, `name R G B` or `id name`"
        )
        + "; correct the line, put a name that contains numbers in quotes, or write a classes.toml"
    )


def _parse_line(line: str, form: str, *, strict: bool) -> dict[str, Any] | None:
    """Parse a line of the order ``form``: n is the name, i an id, c the three values of a colour.

    Returns:
        Name and, if they are in the form, id and color; None if the line has another form. With ``strict``, a name neither
        begins nor ends with a number, unless it is quoted.
    """
    tokens = list(_TOKEN.finditer(line))
    before, after = ([3 if letter == "c" else 1 for letter in part] for part in form.split("n"))
    start, end = sum(before), len(tokens) - sum(after)
    name, others = tokens[start:end], [token[0] for token in (*tokens[:start], *tokens[max(end, start) :])]
    if (
        end <= start
        or not name
        or not all(map(_is_number, others))
        or (strict and (_is_number(name[0][0]) or _is_number(name[-1][0])))
    ):
        return None
    entry: dict[str, Any] = {"name": line[name[0].start() : name[-1].end()].strip('"')}
    values = list(map(int, others))
    for letter in form.replace("n", ""):
        if letter == "i":
            entry["id"] = values.pop(0)
        else:
            entry["color"], values = values[:3], values[3:]
    return entry if form != "n" or not strict else {"name": line.strip('"')}


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit()


def _is_consistent(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ids are ids: no two lines have the same one, or differ only in it."""
    ids = [entry["id"] for entry in entries if "id" in entry]
    return not ids or len(set(ids)) == len(ids) == len({entry["name"] for entry in entries})


def _end_in_numbers(lines: Sequence[str]) -> bool:
    """Whether numbers belong to names: lines differ only in their last word, such as ``lane 1`` and ``lane 2``."""
    words = [line.split() for line in lines]
    numbered = [tuple(line[:-1]) for line in words if _is_number(line[-1])]
    return len(set(numbered)) < len(numbered) and () not in numbered and not any(_is_number(line[0]) for line in words)


def _header(line: str) -> str | None:
    """Return the form that a header gives, see `_parse_line`; None if the line is no header."""
    titles = re.split(r"[;,\t]", line) if re.search(r"[;,\t]", line) else line.split()
    form = ""
    for title in titles:
        word = re.sub(r"[\W_]+", "", title.lower())
        form += next((letter for letter, words in _HEADERS.items() if word in words), "?")
    form = form.replace("rgb", "c")
    return (
        form
        if form.count("n") == 1 and form.count("i") <= 1 and form.count("c") <= 1 and not set(form) - set("nic")
        else None
    )


def _described(form: str) -> str:
    return ", ".join({"n": "name", "i": "id", "c": "R G B"}[letter] for letter in form)
