"""Fetching public benchmarks: archives are fetched with resume, verified, and unpacked into the root in one move."""

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

_ATTEMPTS = 3  # in a row that bring nothing new
_PAUSE = 2.0  # seconds before the second attempt, twice as long before the third
_TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 16  # bytes read at once; what a broken connection loses at most
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; mcseg)"}
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, KeyError)

# Name in the archive, and what opens the content; None for a folder.
_Entry = tuple[str, Callable[[], IO[bytes] | None] | None]


class _Unusable(Exception):
    """An archive that must not be unpacked; the text goes on from its name."""


def download(name: str, facts: Mapping[str, Any], root: Path, *, keep_archives: bool = False, progress: bool = True) -> None:
    """Fetch the archives of a benchmark and unpack them into ``root``, or say what to fetch by hand.

    Whatever is unfinished lies in ``root/.download``, so that a second call goes on from there: ``<file>.part`` is what has
    arrived of an archive, ``<file>.done`` says that it is unpacked. An archive that lies in ``root`` is used instead of
    fetching it, and kept; one in ``root/.download`` counts as fetched.

    Args:
        name: the benchmark's name for the command line.
        facts: its facts: ``title``, ``homepage``, ``license`` and the table ``download``.
        root: folder that is to hold the data; made if missing.
        keep_archives: leave the fetched archives in ``root/.download``.
        progress: show bars.

    Raises:
        DataError: an address that does not answer, a connection that keeps breaking off, an archive that is not the expected
            one, is damaged or would write outside of its folder, a disk without enough space.
    """
    source, homepage = facts["download"], facts["homepage"]
    print(f"{facts['title']}, {homepage}\nlicence: {facts['license']}")
    if "note" in source:
        print(source["note"])
    by_hand = [a for a in source["archives"] if source["login"] or a.get("by_hand") or "url" not in a]
    for archive in source["archives"]:
        if archive not in by_hand:
            try:
                _provide(archive, root, homepage, keep_archives, progress)
            except OSError as error:
                raise DataError(
                    f"{error.filename or root}: {error.strerror or error}; expected a folder with room that can be "
                    "written to, then run the command again"
                ) from error
    if by_hand:
        print(f"to get by hand, with an account (start at {homepage}):")
        for archive in by_hand:
            print(f"  {', '.join(archive[key] for key in ('file', 'size', 'content', 'url') if key in archive)}")
        print(f"unpacked, {root} has to hold\n{textwrap.indent(source['tree'].strip(), '  ')}")
    print(f"{'then' if source['login'] else 'ready'}: mcseg fit --config {name} --data.root {root}")


def _provide(archive: Mapping[str, Any], root: Path, homepage: str, keep: bool, progress: bool) -> None:
    """See to it that one archive is unpacked."""
    file, work, target = archive["file"], root / ".download", root / archive.get("into", "")
    fetched, stamp = work / file, work / f"{file}.done"
    if stamp.exists():
        print(f"{file}: already there; to unpack it anew, remove {stamp}")
        return
    work.mkdir(parents=True, exist_ok=True)
    path = next((path for path in (root / file, fetched) if path.is_file()), fetched)
    if path.exists():
        print(f"{file}: using {path}")
    else:
        part = work / f"{file}.part"
        _fetch(archive["url"], part, homepage, progress)
        part.replace(path)
    # Nothing is moved into the root before all of the archive has proved to be readable and harmless.
    staging = work / f"{file}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        digest = _verified_digest(path, archive)
        staging.mkdir()
        count = _unpack(path, staging, archive.get("only", ""), progress)
    except (_Unusable, *_DAMAGE) as error:
        shutil.rmtree(staging, ignore_errors=True)
        reason = str(error) if isinstance(error, _Unusable) else f"is damaged ({error or type(error).__name__})"
        if path == fetched:
            path.unlink()
        raise DataError(
            f"{path}: {reason}; {'it was deleted, run' if path == fetched else 'remove it and run'} the command again to "
            f"fetch it anew; if that ends the same way, the file at the source has changed, see {homepage}"
        ) from None
    except RuntimeError as error:  # encryption, a kind of compression such as Deflate64
        raise DataError(f"{path}: cannot be unpacked here ({error}); unpack it into {target} with another program") from None
    _move_into(target, staging)
    stamp.write_text(json.dumps({"url": archive["url"], "digest": digest, "files": count}))
    if path == fetched and not keep:
        path.unlink()
    print(f"{file}: {count} file{'s' * (count != 1)} in {target}")


def _fetch(url: str, part: Path, homepage: str, progress: bool) -> None:
    """Complete ``part`` from ``url``, going on from the bytes that it has."""
    failures, best, total = 0, _size(part), None
    while failures < _ATTEMPTS:
        time.sleep(_PAUSE * failures)
        have, reason = _size(part), "the connection broke off"
        headers = _HEADERS | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
                start, total = _extent(response)
                if start in (0, have):
                    _receive(response, part, start, total, progress)
                    # http.client ends a body that is too short as quietly as a complete one.
                    if total is None or _size(part) == total:
                        return
                else:
                    part.unlink(missing_ok=True)
                    reason = "the server sent another range than the one asked for"
        except urllib.error.HTTPError as error:
            with error:
                reason = f"the server answers {error.code} {error.reason}"
                if error.code == 416 and _extent(error)[1] == have:
                    return
                if error.code == 416:  # what is there is longer than the file, so it is of another one
                    part.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 429):
                    raise DataError(f"{url}: {reason}; look for the present address at {homepage}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        failures = 0 if _size(part) > best else failures + 1
        best = max(best, _size(part))
    raise DataError(
        f"{url}: broke off ({reason}); {_size(part)} of {'unknown' if total is None else total} bytes are in {part}, "
        "running the command again goes on from there"
    )


def _extent(response: http.client.HTTPResponse | urllib.error.HTTPError) -> tuple[int, int | None]:
    """Position in the file where the body starts, and size of the whole file in bytes where the server says it."""
    announced = response.headers.get("Content-Length", "")
    length = int(announced) if announced.isdigit() else None
    if response.status not in (206, 416):
        return 0, length
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    start = int(found[1]) if found and found[1] else -1
    if found and found[2]:
        return start, int(found[2])
    return start, None if length is None or response.status == 416 else start + length


def _receive(response: http.client.HTTPResponse, part: Path, start: int, total: int | None, progress: bool) -> None:
    """Write the body to ``part`` from byte ``start`` on. Raises DataError where the disk is too small."""
    needed, free = 2 * (total or 0) - start, shutil.disk_usage(part.parent).free
    if free < needed:
        raise DataError(
            f"{part.parent}: found {free / 1e9:.1f} GB of free space, expected {needed / 1e9:.1f} GB for {part.stem} and "
            "what it holds; make room or choose another root"
        )
    bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=not progress, leave=False)
    with bar, part.open("ab" if start else "wb") as file:
        while block := response.read(_BLOCK):
            file.write(block)
            bar.update(len(block))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _verified_digest(path: Path, archive: Mapping[str, Any]) -> str:
    """Digest as ``algorithm:hex``. Raises _Unusable where another one is expected."""
    algorithm = next((key for key in ("sha256", "sha1", "md5") if key in archive), "sha256")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    expected = archive.get(algorithm, found).lower()
    if found != expected:
        raise _Unusable(f"found {algorithm} {found}, expected {expected}")
    return f"{algorithm}:{found}"


def _unpack(path: Path, folder: Path, only: str, progress: bool) -> int:
    """Unpack the entries below the prefix ``only`` into ``folder``; returns the number of files.

    Nothing but names and contents is taken from an archive: no links, owners or permissions.
    """
    bar = partial(tqdm, desc=f"Unpacking {path.name}", unit=" files", disable=not progress, leave=False)
    if not path.name.endswith((".zip", ".tar", ".tgz", ".tar.gz")):
        shutil.copyfile(path, folder / path.name)
        return 1
    # With the slash, what is left of a name cannot start with one.
    prefix, count = f"{only.strip('/')}/" if only else "", 0
    with contextlib.closing((_zip_entries if path.suffix == ".zip" else _tar_entries)(path, bar)) as entries:
        for name, opener in entries:
            parts = PureWindowsPath(name)  # knows both separators and drive letters
            if parts.anchor or ".." in parts.parts:
                raise _Unusable(f"holds {name!r}, which leads out of its folder")
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
                raise _Unusable(f"holds {name!r}, a link to something that is not a file")
            with stream, target.open("wb") as copy:
                shutil.copyfileobj(stream, copy, 1 << 20)
            count += 1
    if not count:
        raise _Unusable(f"holds no file below {only}" if only else "holds no file")
    return count


def _zip_entries(path: Path, bar: Callable[[Iterable[Any]], Iterable[Any]]) -> Generator[_Entry, None, None]:
    with zipfile.ZipFile(path) as archive:
        for info in bar(archive.infolist()):
            if stat.S_ISLNK(info.external_attr >> 16):
                raise _Unusable(f"holds {info.filename!r}, which is a link; expected files and folders only")
            yield info.filename, None if info.is_dir() else partial(archive.open, info)


def _tar_entries(path: Path, bar: Callable[[Iterable[Any]], Iterable[Any]]) -> Generator[_Entry, None, None]:
    with tarfile.open(path, "r:" if path.suffix == ".tar" else "r:gz") as archive:
        for member in bar(archive):
            # A hard link stands for an earlier file of the archive, from which its content is then read.
            if not (member.isfile() or member.isdir() or member.islnk()):
                raise _Unusable(f"holds {member.name!r}, which is a link or a device; expected files and folders only")
            yield member.name, None if member.isdir() else partial(archive.extractfile, member)
        # tarfile takes a damaged header for the end; the real end is a block of zeros, and then the checksum of gzip.
        stream = archive.fileobj
        assert stream is not None
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end of archive")
        while stream.read(1 << 20):
            pass


def _move_into(target: Path, folder: Path) -> None:
    """Move the content of ``folder`` into ``target``, whose other files stay."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            _move_into(target / path.name, path)
        else:
            path.replace(target / path.name)
    folder.rmdir()
