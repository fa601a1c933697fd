"""Path templates such as ``images/{city}/{id}.png``: find the files that match, and build the path of a partner file."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

Fields = Mapping[str, str]


def find(folder: Path, template: str) -> Iterator[tuple[dict[str, str], Path]]:
    """Find the files below ``folder`` that match a template, in no particular order.

    Args:
        folder: folder that the template is relative to.
        template: path with ``{field}`` for each varying part; a field does not match ``/``. A name that starts with a field
            does not match hidden files.

    Yields:
        Value of each field, and the path of the file.
    """
    first, _, rest = template.partition("/")
    if "{" in first:
        pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(first)))
        entries = (path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else iter(())
        matches = ((match.groupdict(), path) for path in entries if (match := pattern.fullmatch(path.name)))
    else:
        matches = (({}, folder / first) for _ in range(1))
    for fields, path in matches:
        if not rest:
            if path.is_file():
                yield fields, path
        else:
            for inner, file in find(path, rest):
                if all(fields.get(name, value) == value for name, value in inner.items()):
                    yield fields | inner, file


def fill(folder: Path, template: str, fields: Fields) -> Path:
    """Return the path that a template gives for these values of its fields."""
    return folder / template.format_map(fields)


def fixed_folder(folder: Path, template: str) -> Path:
    """Return the deepest folder of a template that does not depend on a field."""
    return folder / template.partition("{")[0].rpartition("/")[0]


def readable(template: str) -> str:
    """Format a template for messages: ``images/<city>/<id>.png``."""
    return re.sub(r"\{(\w+)\}", r"<\1>", template)
