"""Download of public benchmarks: archives are downloaded with resume, verified, unpacked and then moved into the root."""

import contextlib
import gzip
import hashlib
import http.client
import json
import re
import shutil
import stat
import tarfile
import textwrap
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from tqdm import tqdm

from mcseg.data.labels import DataError

_ATTEMPTS = 3  # give up after so many attempts in a row without a new byte
_PAUSE = 2.0  # seconds before the second attempt, twice as long before the third
_TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 16  # bytes per read, the most that a broken connection loses
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; mcseg)"}
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, KeyError)

# Name of an entry in the archive, and a function that opens its content; None for a folder
_Entry = tuple[str, Callable[[], IO[bytes] | None] | None]


class _RejectedArchive(Exception):
    """Raised for an archive that must not be unpacked; the message is a predicate for the archive's name."""


def download(name: str, facts: Mapping[str, Any], root: Path, *, keep_archives: bool = False, progress: bool = True) -> None:
    """Download the archives of a benchmark and unpack them into ``root``; list those that need an account.

    Unfinished work is in ``root/.download``, and a second call resumes it: ``<file>.part`` is the downloaded part of an
    archive, and ``<file>.done`` marks an unpacked one. An archive in ``root`` or ``root/.download`` is used instead of
    downloading it; one in ``root`` is never deleted.

    Args:
        name: Name of the benchmark on the command line.
        facts: Facts of the benchmark: ``title``, ``homepage``, ``license`` and the table ``download``, which is optional.
        root: Folder for the data; created if missing.
        keep_archives: Whether to keep the downloaded archives in ``root/.download``.
        progress: Whether to show progress bars.

    Raises:
        DataError: Facts without ``download``, an unreachable address, a connection that keeps breaking, a wrong or damaged
            archive, one that would write outside its folder, a folder that cannot be written to, or a full disk.
    """
    homepage = facts["homepage"]
    if "download" not in facts:
        raise DataError(f"{name}: mcseg has no download addresses for {facts['title']}; get the archives from {homepage}")
    source = facts["download"]
    print(f"{facts['title']}, {homepage}\nlicence: {facts['license']}")
    if "note" in source:
        print(source["note"])
    by_hand = [a for a in source["archives"] if source["login"] or a.get("by_hand") or "url" not in a]
    for archive in source["archives"]:
        if archive not in by_hand:
            try:
                _provide(archive, root, homepage=homepage, keep=keep_archives, progress=progress)
            except OSError as error:
                raise DataError(
                    f"{error.filename or root}: {error.strerror or error}; expected a writable folder with enough free "
                    "space; change that and run the command again"
                ) from error
    if by_hand:
        print(f"download by hand, with an account (start at {homepage}):")
        for archive in by_hand:
            print(f"  {', '.join(archive[key] for key in ('file', 'size', 'content', 'url') if key in archive)}")
        print(f"unpack them, so that {root} contains\n{textwrap.indent(source['tree'].strip(), '  ')}")
    print(f"{'then' if source['login'] else 'ready'}: mcseg fit --config {name} --data.root {root}")


def _provide(archive: Mapping[str, Any], root: Path, *, homepage: str, keep: bool, progress: bool) -> None:
    """Download and unpack one archive unless that is already done."""
    file, work, target = archive["file"], root / ".download", root / archive.get("into", "")
    downloaded, marker = work / file, work / f"{file}.done"
    if marker.exists():
        print(f"{file}: already unpacked; to unpack it again, remove {marker}")
        return
    work.mkdir(parents=True, exist_ok=True)
    path = next((path for path in (root / file, downloaded) if path.is_file()), downloaded)
    if path.exists():
        print(f"{file}: using {path}")
    else:
        part = work / f"{file}.part"
        _fetch(archive["url"], part, homepage=homepage, progress=progress)
        part.replace(path)
    # Nothing is moved into the root before the whole archive has been unpacked without an error.
    staging = work / f"{file}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        digest = _verified_digest(path, archive)
        staging.mkdir()
        count = _unpack(path, staging, only=archive.get("only", ""), progress=progress)
    except (_RejectedArchive, *_DAMAGE) as error:
        shutil.rmtree(staging, ignore_errors=True)
        reason = str(error) if isinstance(error, _RejectedArchive) else f"is damaged ({error or type(error).__name__})"
        if path == downloaded:
            path.unlink()
        raise DataError(
            f"{path}: {reason}; {'it was deleted, run' if path == downloaded else 'remove it and run'} the command again to "
            f"download it; if the error remains, the file at the source has changed, see {homepage}"
        ) from None
    except RuntimeError as error:  # an encrypted archive, or a compression such as Deflate64
        raise DataError(
            f"{path}: cannot be unpacked by Python ({error}); unpack it into {target} with another program"
        ) from None
    _merge_into(target, staging)
    marker.write_text(json.dumps({"url": archive["url"], "digest": digest, "files": count}))
    if path == downloaded and not keep:
        path.unlink()
    print(f"{file}: {count} file{'s' * (count != 1)} in {target}")


def _fetch(url: str, part: Path, *, homepage: str, progress: bool) -> None:
    """Download ``url`` into ``part``, starting after the bytes that it already contains."""
    failures, best, total = 0, _size(part), None
    while failures < _ATTEMPTS:
        time.sleep(_PAUSE * failures)
        have, reason = _size(part), "the connection was closed"
        headers = _HEADERS | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
                start, total = _extent(response)
                if start in (0, have):
                    _receive(response, part, start=start, total=total, progress=progress)
                    # http.client reports no error for a body that is too short.
                    if total is None or _size(part) == total:
                        return
                else:
                    part.unlink(missing_ok=True)
                    reason = "the server sent another range than requested"
        except urllib.error.HTTPError as error:
            with error:
                reason = f"the server answers {error.code} {error.reason}"
                if error.code == 416 and _extent(error)[1] == have:
                    return
                if error.code == 416:  # the part is longer than the file, so it belongs to another file
                    part.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 429):
                    raise DataError(f"{url}: {reason}; look for the current address at {homepage}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        failures = 0 if _size(part) > best else failures + 1
        best = max(best, _size(part))
    raise DataError(
        f"{url}: download failed ({reason}); {_size(part)} of {'unknown' if total is None else total} bytes are in {part}; "
        "run the command again to resume"
    )


def _extent(response: http.client.HTTPResponse | urllib.error.HTTPError) -> tuple[int, int | None]:
    """Return the byte of the file at which the body starts, and the size of the whole file; None if it is unknown."""
    content_length = response.headers.get("Content-Length", "")
    length = int(content_length) if content_length.isdigit() else None
    if response.status not in (206, 416):
        return 0, length
    content_range = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    start = int(content_range[1]) if content_range and content_range[1] else -1
    if content_range and content_range[2]:
        return start, int(content_range[2])
    return start, None if length is None or response.status == 416 else start + length


def _receive(response: http.client.HTTPResponse, part: Path, *, start: int, total: int | None, progress: bool) -> None:
    """Write the body to ``part`` from byte ``start`` on. Raises DataError if the disk has too little free space."""
    needed, free = 2 * (total or 0) - start, shutil.disk_usage(part.parent).free
    if free < needed:
        raise DataError(
            f"{part.parent}: found {free / 1e9:.1f} GB of free space, expected {needed / 1e9:.1f} GB for {part.stem} and "
            "its content; free some space or choose another root"
        )
    bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=not progress, leave=False)
    with bar, part.open("ab" if start else "wb") as file:
        while block := response.read(_BLOCK):
            file.write(block)
            bar.update(len(block))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _verified_digest(path: Path, archive: Mapping[str, Any]) -> str:
    """Return the digest as ``algorithm:hex``. Raises _RejectedArchive if it is not the expected one."""
    algorithm = next((key for key in ("sha256", "sha1", "md5") if key in archive), "sha256")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    expected = archive.get(algorithm, digest).lower()
    if digest != expected:
        raise _RejectedArchive(f"found {algorithm} {digest}, expected {expected}")
    return f"{algorithm}:{digest}"


def _unpack(path: Path, folder: Path, *, only: str, progress: bool) -> int:
    """Unpack the entries below the folder ``only`` into ``folder``; return the number of files.

    Only names and contents are taken from an archive: no links, owners or permissions.
    """
    bar = partial(tqdm, desc=f"Unpacking {path.name}", unit=" files", disable=not progress, leave=False)
    if not path.name.endswith((".zip", ".tar", ".tgz", ".tar.gz")):
        shutil.copyfile(path, folder / path.name)
        return 1
    # The prefix ends in a slash, so that the rest of a name cannot start with one.
    prefix, count = f"{only.strip('/')}/" if only else "", 0
    with contextlib.closing((_zip_entries if path.suffix == ".zip" else _tar_entries)(path, bar)) as entries:
        for name, opener in entries:
            parts = PureWindowsPath(name)  # parses both separators and drive letters
            if parts.anchor or ".." in parts.parts:
                raise _RejectedArchive(f"contains {name!r}, which is outside its folder")
            inside = f"{parts.as_posix()}/"
            if not inside.startswith(prefix):
                continue
            target = folder / inside.removeprefix(prefix)
            if opener is None:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            stream = opener()
            if stream is None:
                raise _RejectedArchive(f"contains {name!r}, a link to something other than a file")
            with stream, target.open("wb") as copy:
                shutil.copyfileobj(stream, copy, 1 << 20)
            count += 1
    if not count:
        raise _RejectedArchive(f"contains no file below {only}" if only else "contains no file")
    return count


def _zip_entries(path: Path, bar: Callable[[Iterable[Any]], Iterable[Any]]) -> Generator[_Entry, None, None]:
    with zipfile.ZipFile(path) as archive:
        for info in bar(archive.infolist()):
            if stat.S_ISLNK(info.external_attr >> 16):
                raise _RejectedArchive(f"contains {info.filename!r}, which is a link; expected files and folders only")
            yield info.filename, None if info.is_dir() else partial(archive.open, info)


def _tar_entries(path: Path, bar: Callable[[Iterable[Any]], Iterable[Any]]) -> Generator[_Entry, None, None]:
    with tarfile.open(path, "r:" if path.suffix == ".tar" else "r:gz") as archive:
        for member in bar(archive):
            # A hard link refers to an earlier file of the archive; extractfile reads that file's content.
            if not (member.isfile() or member.isdir() or member.islnk()):
                raise _RejectedArchive(
                    f"contains {member.name!r}, which is a link or a device; expected files and folders only"
                )
            yield member.name, None if member.isdir() else partial(archive.extractfile, member)
        # tarfile treats a damaged header as the end of the archive. The real end is a block of zeros; reading the rest
        # verifies the checksum of gzip.
        stream = archive.fileobj
        assert stream is not None
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end of archive")
        while stream.read(1 << 20):
            pass


def _merge_into(target: Path, folder: Path) -> None:
    """Move the content of ``folder`` into ``target`` and keep the other files there."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            _merge_into(target / path.name, path)
        else:
            path.replace(target / path.name)
    folder.rmdir()
