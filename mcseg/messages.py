"""Errors of libraries as the one line that a person needs."""

import re

# What jsonargparse says about other types that a value might have had, and about the value in its own terms
_ASIDE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value type: .*"
    r"|Given value: (Namespace|NestedArg)\(.*|Expected a <class 'NoneType'>.*"
    r"|Expected a path but .* not accessible or invalid"
)
_SAID_SHORTER = (
    (re.compile(r"^Type .* expects a function or a callable class: "), ""),
    (re.compile(r'^Parser key "(.*)":$'), r"\1:"),
    (re.compile(r"^Problem with given class_path '(.*)':$"), r"\1:"),
    (re.compile(r"\.? Got value: Namespace\(.*"), ""),
)


def one_line(error: BaseException) -> str:
    """What a person needs of an error: without a worker's traceback, and without the parser's other attempts."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "worker process" in lines[0]:
        return lines[-1].partition("Error: ")[2] or lines[-1]
    said = []
    for line in (line.removeprefix("- ") for line in lines):
        for pattern, short in _SAID_SHORTER:
            line = pattern.sub(short, line)
        if not _ASIDE.fullmatch(line) and line not in said:
            said.append(line)
    return " ".join(said or lines)
