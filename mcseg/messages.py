"""Shorten an exception to one line for the user."""

import errno
import re

# Lines in which jsonargparse lists the other types that a setting accepts, or prints its own objects
_PARSER_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value type: .*"
    r"|Given value: (Namespace|NestedArg)\(.*|Expected a <class 'NoneType'>.*"
    r"|Expected a path but .* not accessible or invalid"
)
_SHORTENINGS = (
    (re.compile(r"^Type .* expects a function or a callable class: "), ""),
    (re.compile(r'^Parser key "(.*)":$'), r"\1:"),
    (re.compile(r"^Problem with given class_path '(.*)':$"), r"\1:"),
    (re.compile(r"\.? Got value: Namespace\(.*"), ""),
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Messages of gloo and NCCL after another process of the run died
_PEER_DIED = re.compile(r"Connection (reset|closed) by peer|remote process exit")


def one_line(error: BaseException, *, limit: int | None = None) -> str:
    """Return the message of an exception as one line.

    Drops the traceback of a loader worker and the parser's list of other accepted types. A full disk and the death of
    another process get a message that explains how to continue.

    Args:
        error: Any exception; one without a message is reported by the name of its type.
        limit: Largest number of characters; a longer text is cut and ends in ``...``.

    Returns:
        Text without line breaks.
    """
    text = _explain(error)
    return text if limit is None or len(text) <= limit else text[:limit] + "..."


def _explain(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = error.filename or "run folder or temporary files"
        return f"{where}: {error.strerror}; free some space, then resume training with mcseg fit --resume RUN_FOLDER"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "worker process" in lines[0]:
        return lines[-1].partition("Error: ")[2] or lines[-1]
    if isinstance(error, RuntimeError) and (symptom := _PEER_DIED.search(str(error))):
        return (
            f"another process of this run died ({symptom[0]}); see its last output for the reason; no output usually means "
            "that it was killed for running out of memory; resume training with mcseg fit --resume RUN_FOLDER"
        )
    kept = []
    for line in (line.removeprefix("- ") for line in lines):
        for pattern, replacement in _SHORTENINGS:
            line = pattern.sub(replacement, line)
        if not _PARSER_NOISE.fullmatch(line) and line not in kept:
            kept.append(line)
    return " ".join(kept or lines)
