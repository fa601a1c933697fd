"""Folder layouts: path templates such as ``images/{city}/{id}.png`` that find files, and say where a partner must lie."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

Fields = Mapping[str, str]


def find(folder: Path, template: str) -> Iterator[tuple[dict[str, str], Path]]:
    """Find the files below ``folder`` that fit a template, in no particular order.

    Args:
        folder: where the template starts.
        template: path with ``{field}`` for parts that vary; a field never reaches over a ``/``. Hidden files do not fit.

    Yields:
        Value of each field, and the file.
    """
    first, _, rest = template.partition("/")
    if "{" in first:
        pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(first)))
        entries = (path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else iter(())
        fitting = ((match.groupdict(), path) for path in entries if (match := pattern.fullmatch(path.name)))
    else:
        fitting = (({}, folder / first) for _ in range(1))
    for fields, path in fitting:
        if not rest:
            if path.is_file():
                yield fields, path
        else:
            for inner, file in find(path, rest):
                if all(fields.get(name, value) == value for name, value in inner.items()):
                    yield fields | inner, file


def fill(folder: Path, template: str, fields: Fields) -> Path:
    """Path of the file that a template names once its fields are known."""
    return folder / template.format_map(fields)


def fixed_folder(folder: Path, template: str) -> Path:
    """Deepest folder that a template names without knowing its fields."""
    return folder / template.partition("{")[0].rpartition("/")[0]


def readable(template: str) -> str:
    """Template for people: ``images/<city>/<id>.png``."""
    return re.sub(r"\{(\w+)\}", r"<\1>", template)
