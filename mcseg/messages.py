"""Errors of libraries as the one line that a person needs."""

import errno
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
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What gloo and NCCL say where another process is no longer there
_PEER_ENDED = re.compile(r"Connection (reset|closed) by peer|remote process exit")


def one_line(error: BaseException, *, limit: int | None = None) -> str:
    """Return what a person needs of an error: no worker's traceback, none of the parser's other attempts.

    Args:
        error: of any library.
        limit: most characters; what is beyond becomes "...".
    """
    text = _essence(error)
    return text if limit is None or len(text) <= limit else text[:limit] + "..."


def _essence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in _FULL:
        where = error.filename or "where the run folder is, or the temporary files"
        return f"{where}: {error.strerror}; make room, and a training resumes with mcseg fit --resume RUN_FOLDER"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "worker process" in lines[0]:
        return lines[-1].partition("Error: ")[2] or lines[-1]
    if isinstance(error, RuntimeError) and (ended := _PEER_ENDED.search(str(error))):
        return (
            f"another process of this run has ended, and this one with it ({ended[0]}); what that one said last tells why; "
            "if it said nothing it was killed, often for memory; training goes on with mcseg fit --resume RUN_FOLDER"
        )
    said = []
    for line in (line.removeprefix("- ") for line in lines):
        for pattern, short in _SAID_SHORTER:
            line = pattern.sub(short, line)
        if not _ASIDE.fullmatch(line) and line not in said:
            said.append(line)
    return " ".join(said or lines)
