"""Broken and unusual files in a user's folder: each gives a one-line error that names it, or is read as it is displayed."""

import functools
import io
import os
import re
import shutil
import struct
import sys
import tempfile
import unicodedata
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import write_png
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mcseg.callbacks.scores import JaccardCallback
from mcseg.data import CamVidData, DataError, FolderData, SyntheticData
from mcseg.data.check import check
from mcseg.module import SegmentationModule
from mcseg.run.main import main
from mcseg.schedules import WarmupPolynomialLR

NAME = "photo 3"


def image_file(root: Path, suffix: str = ".jpg") -> Path:
    return root / "images" / f"{NAME}{suffix}"


def mask_file(root: Path, suffix: str = ".png") -> Path:
    return root / "masks" / f"{NAME}{suffix}"


def photo(root: Path) -> Image.Image:
    return Image.open(image_file(root)).convert("RGB")


def mask(root: Path) -> np.ndarray:
    return np.array(Image.open(mask_file(root)))


def png_bytes(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def raw_png(width: int, height: int, depth: int, color_type: int, rows) -> bytes:
    """Encode a PNG with a bit depth that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pack = zlib.compressobj(9)
    data = b"".join(pack.compress(b"\0" + row) for row in rows) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def replace_image(root: Path, content: bytes | Image.Image, suffix: str, **options) -> None:
    image_file(root).unlink()
    if isinstance(content, bytes):
        image_file(root, suffix).write_bytes(content)
    else:
        content.save(image_file(root, suffix), **options)


def replace_mask(root: Path, content: bytes | Image.Image | np.ndarray, suffix: str = ".png", **options) -> None:
    mask_file(root).unlink()
    if isinstance(content, bytes):
        mask_file(root, suffix).write_bytes(content)
    else:
        picture = Image.fromarray(content) if isinstance(content, np.ndarray) else content
        picture.save(mask_file(root, suffix), **options)


def frames(picture: Image.Image) -> dict:
    return {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}


def translucent(root: Path) -> Image.Image:
    picture = photo(root).convert("RGBA")
    picture.putalpha(Image.fromarray(np.arange(768).reshape(24, 32).astype(np.uint8) % 255))
    return picture


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def bomb(side: int) -> bytes:
    """Encode a PNG of a few kilobytes that decodes to side x side pixels."""
    return raw_png(side, side, 1, 0, [b"\0" * (side // 8 + 1)] * side)


def broken_crc(root: Path) -> None:
    content = bytearray(png_bytes(photo(root)))
    content[60] ^= 0xFF
    replace_image(root, bytes(content), ".png")


def text_bomb(root: Path) -> None:
    comment = PngInfo()
    comment.add_text("comment", "x" * 70_000_000, zip=True)
    replace_image(root, png_bytes(photo(root), pnginfo=comment), ".png")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def sixteen_bit_colours(root: Path) -> None:
    rows = [np.repeat(row, 3).astype(">u2").tobytes() for row in mask(root)]
    replace_mask(root, raw_png(32, 24, 16, 2, rows))


def four_bit_mask(root: Path) -> None:
    values = np.minimum(mask(root), 2)
    rows = [bytes(int(a) << 4 | int(b) for a, b in zip(row[::2], row[1::2], strict=True)) for row in values]
    replace_mask(root, raw_png(32, 24, 4, 0, rows))


def changed(values: np.ndarray, dtype, *, to: int) -> np.ndarray:
    values = values.astype(dtype)
    values[0, 1:4] = to
    return values


# (change of the folder, part of the error). Training stops with the error; `check` lists it and continues.
REFUSED = {
    "empty image": (lambda r: image_file(r).write_bytes(b""), "photo 3.jpg: cannot be read"),
    "text as image": (lambda r: image_file(r).write_text("hello"), "photo 3.jpg: cannot be read"),
    "web page as image": (lambda r: image_file(r).write_text("<!DOCTYPE html><html>"), "photo 3.jpg: cannot be read"),
    "pointer of Git LFS": (
        lambda r: image_file(r).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "photo 3.jpg: cannot be read",
    ),
    "truncated JPEG": (lambda r: image_file(r).write_bytes(image_file(r).read_bytes()[:-300]), "truncated"),
    "truncated header": (lambda r: image_file(r).write_bytes(image_file(r).read_bytes()[:30]), "photo 3.jpg: cannot be read"),
    "truncated PNG": (lambda r: replace_image(r, png_bytes(photo(r))[:-200], ".png"), "photo 3.png: cannot be read"),
    "wrong checksum": (broken_crc, "photo 3.png: cannot be read"),
    "image of 32-bit floats above 1": (
        lambda r: replace_image(r, Image.fromarray(np.linspace(0, 1000, 768, dtype=np.float32).reshape(24, 32)), ".tif"),
        "photo 3.tif: has values from ",
    ),
    "image of 32-bit integers": (
        lambda r: replace_image(r, Image.fromarray(np.arange(768, dtype=np.int32).reshape(24, 32)), ".tif"),
        "photo 3.tif: an image of 32-bit signed integers, which may have any range of values",
    ),
    "image of 2 bands": (
        lambda r: np.save(image_file(r, ".npy"), np.zeros((24, 32, 2), np.uint8)) or image_file(r).unlink(),
        "photo 3.npy: has 2 bands, expected 3 (data.bands) in every image; set data.bands to 2",
    ),
    "image with transparent pixels": (
        lambda r: replace_image(r, translucent(r), ".png"),
        "photo 3.png: has transparent pixels (alpha from 0 to 254, 255 is opaque), which 3 bands leave out",
    ),
    "palette with transparency": (
        lambda r: replace_image(r, photo(r).quantize(256), ".png", transparency=b"\0\1\2"),
        "photo 3.png: has transparent pixels (alpha from 0 to 255",
    ),
    "animated GIF": (lambda r: replace_image(r, photo(r), ".gif", **frames(photo(r))), "photo 3.gif: contains 3 images"),
    "animated PNG": (lambda r: replace_image(r, photo(r), ".png", **frames(photo(r))), "photo 3.png: contains 3 images"),
    "animated WebP": (lambda r: replace_image(r, photo(r), ".webp", **frames(photo(r))), "photo 3.webp: contains 3 images"),
    "TIFF of several pages": (lambda r: replace_image(r, photo(r), ".tif", **frames(photo(r))), "photo 3.tif: contains 3 images"),
    "decompression bomb": (lambda r: replace_image(r, bomb(30_000), ".png"), "photo 3.png: has 900,000,000 pixels (30000x30000), expected at most 178,956,970 (data.max_pixels)"),
    "bomb in a comment": (text_bomb, "photo 3.png: cannot be read"),
    "folder named as an image": (lambda r: to_folder(image_file(r)), "photo 3.jpg: is not a file"),
    "pipe": (lambda r: to_pipe(image_file(r)), "photo 3.jpg: is not a file"),
    "dangling link": (lambda r: to_link(image_file(r), "nowhere.jpg"), "photo 3.jpg: no such file"),
    "link to itself": (lambda r: to_link(image_file(r), f"{NAME}.jpg"), "photo 3.jpg: cannot be read"),
    "image turned by EXIF, its mask not": (
        lambda r: photo(r).save(image_file(r), exif=exif(6)),
        "photo 3.png: the mask is 32x24 pixels",
    ),
    "two images of one name": (lambda r: photo(r).save(image_file(r, ".png")), "photo 3.jpg and photo 3.png have the same name"),
    "no mask": (lambda r: mask_file(r).unlink(), "photo 3.jpg: has no mask"),
    "two masks of one name": (lambda r: write_png(mask_file(r, ".tif"), mask(r)), "photo 3.png and photo 3.tif have the same name"),
    "empty mask": (lambda r: mask_file(r).write_bytes(b""), "photo 3.png: cannot be read"),
    "truncated mask": (lambda r: mask_file(r).write_bytes(mask_file(r).read_bytes()[:60]), "photo 3.png: cannot be read"),
    "mask as JPEG": (lambda r: replace_mask(r, mask(r), ".jpg"), "photo 3.jpg: JPEG changes label values"),
    "mask as JPEG named PNG": (lambda r: replace_mask(r, mask(r), format="JPEG"), "photo 3.png: JPEG changes label values"),
    "mask as TIFF with JPEG inside": (
        lambda r: replace_mask(r, mask(r), ".tif", compression="jpeg"),
        "photo 3.tif: JPEG changes label values",
    ),
    "mask as lossy WebP": (
        lambda r: replace_mask(r, Image.fromarray(40 * mask(r)).convert("RGB"), ".webp", quality=20),
        "photo 3.webp: ",
    ),
    "mask of floats": (lambda r: replace_mask(r, mask(r).astype(np.float32), ".tif"), "photo 3.tif: mask of mode F"),
    "mask in CMYK": (
        lambda r: replace_mask(r, Image.fromarray(mask(r)).convert("CMYK"), ".tif"),
        "photo 3.tif: mask of mode CMYK",
    ),
    "mask of colours for a list of names": (
        lambda r: replace_mask(r, np.stack([mask(r), 0 * mask(r), 0 * mask(r)], axis=-1)),
        "photo 3.png: the mask is coloured",
    ),
    "mask of 16 bits in three channels": (sixteen_bit_colours, "photo 3.png: a 16-bit mask of several channels"),
    "mask of 4 bits, which all readers widen": (four_bit_mask, "the unknown values 17, 34"),
    "animated mask": (
        lambda r: replace_mask(r, mask(r), **frames(Image.fromarray(mask(r)))),
        "photo 3.png: contains 3 images",
    ),
    "label above 255": (
        lambda r: replace_mask(r, changed(mask(r), np.uint16, to=300)),
        "photo 3.png: 3 pixels of the mask have the unknown values 300",
    ),
    "negative label": (
        lambda r: replace_mask(r, changed(mask(r), np.int32, to=-1), ".tif"),
        "photo 3.tif: 3 pixels of the mask have the unknown values -1",
    ),
    "labels from 1": (
        lambda r: replace_mask(r, np.where(mask(r) < 255, mask(r) + 1, 255).astype(np.uint8)),
        "photo 3.png: 6 pixels of the mask have the unknown values 3",
    ),
    "mask of another size": (lambda r: replace_mask(r, mask(r)[:12]), "photo 3.png: the mask is 32x12 pixels"),
    "transposed mask": (lambda r: replace_mask(r, mask(r).T.copy()), "photo 3.png: the mask is 24x32 pixels"),
    "folder named as a mask": (lambda r: to_folder(mask_file(r)), "photo 3.png: is not a file"),
    "mask as a dangling link": (lambda r: to_link(mask_file(r), "nowhere.png"), "photo 3.png: no such file"),
    "no image folder": (lambda r: shutil.rmtree(r / "images"), "images: no such folder"),
    "no mask folder": (lambda r: shutil.rmtree(r / "masks"), "masks: no such folder"),
    "list of unknown names": (lambda r: write_lists(r, "photo 1\nphoto 99\n"), "train.txt: lists photo 99"),
    "list with a name twice": (lambda r: write_lists(r, "photo 1\nphoto 1\n"), "train.txt: lists photo 1 more than once"),
    "list in Latin-1": (lambda r: write_lists(r, "phöto\n".encode("latin-1")), "train.txt: cannot be read"),
    "empty list": (lambda r: write_lists(r, ""), "the train split"),
    "no validation list": (lambda r: (r / "train.txt").write_text("photo 1\n"), "the val split"),
}  # fmt: skip


def write_lists(root: Path, train: str | bytes) -> None:
    (root / "train.txt").write_bytes(train if isinstance(train, bytes) else train.encode())
    (root / "val.txt").write_text("photo 2\n")


def folder_data(root: Path, **options) -> FolderData:
    # One image is for validation and the others for training; tests read both splits, so photo 3 is always read.
    return FolderData(root, num_workers=0, crop_size=(16, 16), batch_size=2, val_fraction=0.1, **options)


def read_everything(root: Path) -> None:
    data = folder_data(root)
    data.setup("fit")
    data.class_pixels()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for _ in loader:
            pass


@pytest.mark.filterwarnings("error")  # Pillow must not warn in addition
@pytest.mark.parametrize("kind", REFUSED)
def test_check_and_training_report_the_problem_in_one_line(photo_folder, kind):
    damage, expected = REFUSED[kind]
    damage(photo_folder)
    problems = check(folder_data(photo_folder), progress=False).problems
    matching = [problem for problem in problems if expected in problem]
    assert len(matching) == 1, problems
    assert "\n" not in matching[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on the same problem, such as a mask without its image
        with pytest.raises(DataError) as stopped:
            read_everything(photo_folder)
    assert expected in str(stopped.value)
    assert "\n" not in str(stopped.value)


def rename(root: Path, image: str, mask: str) -> None:
    image_file(root).rename(root / "images" / image)
    mask_file(root).rename(root / "masks" / mask)


def through_links(root: Path) -> None:
    image_file(root).rename(root / "elsewhere.jpg")
    image_file(root).symlink_to(root / "elsewhere.jpg")


def system_files(root: Path) -> None:
    (root / "images" / f"._{NAME}.jpg").write_bytes(b"\0\5\x16\7")
    (root / "images" / ".DS_Store").write_bytes(b"\0")
    (root / "masks" / "Thumbs.db").write_bytes(b"\0")


def palette_with_transparency(root: Path) -> None:
    replace_image(root, photo(root).quantize(256), ".png", transparency=b"\xff\xff")


def sixteen_bit_photo(root: Path) -> None:
    grey = np.array(photo(root).convert("L")).astype(np.uint16) * 257
    replace_image(root, Image.fromarray(grey), ".png")


def alpha(root: Path) -> Image.Image:
    picture = photo(root).convert("RGBA")
    picture.putalpha(255)
    return picture


def grey_and_alpha(root: Path) -> Image.Image:
    return Image.fromarray(mask(root)).convert("LA")


def palette_and_alpha(root: Path) -> Image.Image:
    picture = Image.fromarray(mask(root))
    picture.putpalette(list(range(256)) * 3)
    return picture.convert("PA")


# Unusual but valid files: they are read as the photo (or its grey version) and the mask of the unchanged folder.
ACCEPTED = {
    "PNG named JPEG": lambda r: image_file(r).write_bytes(png_bytes(photo(r))),
    "upper-case extension": lambda r: image_file(r).rename(image_file(r, ".JPG")),
    "CMYK": lambda r: photo(r).convert("CMYK").save(image_file(r), quality=95),
    "alpha channel": lambda r: replace_image(r, alpha(r), ".png"),
    "palette with transparency": palette_with_transparency,
    "several views in one JPEG": lambda r: photo(r).save(
        image_file(r), "MPO", quality=95, save_all=True, append_images=[photo(r).resize((8, 6))]
    ),
    "turned by EXIF": lambda r: photo(r).rotate(90, expand=True).save(image_file(r), exif=exif(6), quality=95),
    "invalid EXIF": lambda r: photo(r).save(image_file(r), exif=b"Exif\0\0garbage", quality=95),
    "unknown EXIF orientation": lambda r: photo(r).save(image_file(r), exif=exif(99), quality=95),
    "invalid colour profile": lambda r: photo(r).save(image_file(r), icc_profile=b"xx" * 50, quality=95),
    "link": through_links,
    "files of the operating system": system_files,
    "BMP": lambda r: replace_image(r, photo(r), ".bmp"),
    "WebP": lambda r: replace_image(r, photo(r), ".webp", lossless=True),
    "grey": lambda r: photo(r).convert("L").save(image_file(r), quality=95),
    "grey of 16 bits": sixteen_bit_photo,
    "mask as array": lambda r: np.save(mask_file(r, ".npy"), mask(r)) or mask_file(r).unlink(),
    "mask of 16 bits": lambda r: replace_mask(r, mask(r).astype(np.uint16)),
    "mask of 16 bits, large byte first": lambda r: replace_mask(
        r, Image.frombytes("I;16B", (32, 24), mask(r).astype(">u2").tobytes()), ".tif"
    ),
    "mask of 32 bits": lambda r: replace_mask(r, mask(r).astype(np.int32), ".tif"),
    "mask in three equal channels": lambda r: replace_mask(r, np.stack([mask(r)] * 3, axis=-1)),
    "mask in four channels": lambda r: replace_mask(r, np.stack([*[mask(r)] * 3, 0 * mask(r) + 255], axis=-1)),
    "mask with alpha channel": lambda r: replace_mask(r, grey_and_alpha(r)),
    "mask with palette and alpha channel": lambda r: replace_mask(r, palette_and_alpha(r), ".tif"),
    "mask as lossless WebP": lambda r: replace_mask(r, Image.fromarray(mask(r)).convert("RGB"), ".webp", lossless=True),
    "mask turned by EXIF": lambda r: replace_mask(r, np.rot90(mask(r)).copy(), exif=exif(6)),
    "umlauts and spaces": lambda r: rename(r, "Straße ü 3.jpg", "Straße ü 3.png"),
    "umlauts in two spellings": lambda r: rename(
        r, unicodedata.normalize("NFC", "ü 3.jpg"), unicodedata.normalize("NFD", "ü 3.png")
    ),
    "dots in the name": lambda r: rename(r, "a.b.3.jpg", "a.b.3.png"),
    "lists of paths from Windows": lambda r: write_lists(
        r, "\ufeff" + "\r\n".join(f"images/photo {i}.jpg" for i in range(10) if i != 2) + "\r\n"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ACCEPTED)
def test_unusual_files_are_read_as_displayed(photo_folder, kind):
    picture, labels = photo(photo_folder), mask(photo_folder)
    picture = np.asarray(picture.convert("L").convert("RGB") if kind.startswith("grey") else picture).astype(int)
    ACCEPTED[kind](photo_folder)
    data = folder_data(photo_folder)
    assert check(data, progress=False).problems == []
    samples = data.samples("train") + data.samples("val")
    sample = next(sample for sample in samples if "3" in sample.name)
    image, train_ids = data.reader.pair(sample)
    assert np.array_equal(train_ids, labels)
    # Compressing a JPEG again changes the pixels a little; a wrong rotation, crop or scale changes them by about 30.
    values = 255 * image.numpy() if image.is_floating_point() else image.numpy()
    assert np.abs(values.transpose(1, 2, 0).astype(int) - picture).mean() < 10
    read_everything(photo_folder)


def as_binary(root: Path) -> None:
    (root / "classes.txt").write_text("background\nthing\n")
    for path in (root / "masks").iterdir():
        write_png(path, np.where(np.array(Image.open(path)) == 1, 255, 0).astype(np.uint8))


def with_odd_suffix(root: Path) -> None:
    mask_file(root).rename(root / "masks" / "photo 3_m.png")


REPORTED = {
    "format that cannot be read": (lambda r: image_file(r, ".heic").write_bytes(b"\0"), "images: photo 3.heic is not used"),
    "arrays as mask": (lambda r: np.savez(mask_file(r, ".npz"), mask(r)), "masks: photo 3.npz is not used"),
    "format that runs a program": (lambda r: photo(r).save(image_file(r, ".eps")), "images: photo 3.eps is not used"),
    "mask without image": (lambda r: image_file(r).unlink(), "masks: no image for photo 3.png"),
    "masks with another suffix": (with_odd_suffix, "masks: no image for photo 3_m.png"),
    "mask in another case": (lambda r: mask_file(r).rename(r / "masks/Photo 3.png"), "masks: no image for Photo 3.png"),
    "image in two lists": (lambda r: write_lists(r, "photo 1\nphoto 2\n"), "val.txt: photo 2 is also in train.txt"),
    "masks of 0 and 255": (
        as_binary,
        "class thing (train id 1) has no pixel in the training labels; if its value in the masks is 255",
    ),
}


@pytest.mark.parametrize("kind", REPORTED)
def test_check_reports_unused_files(photo_folder, kind):
    damage, expected = REPORTED[kind]
    damage(photo_folder)
    problems = check(folder_data(photo_folder), progress=False).problems
    assert len([problem for problem in problems if expected in problem]) == 1, problems


@pytest.mark.parametrize("verb", ["fit", "stats"])
def test_masks_of_0_and_255_are_reported_before_training(photo_folder, verb):
    as_binary(photo_folder)
    settings = ["--data.root", str(photo_folder), "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    settings += ["--model.encoder", "tu-test_resnet.r160_in1k", "--trainer.fast_dev_run", "true"]
    expected = r"^class thing \(train id 1\) has no pixel in the training labels; .*255"
    with pytest.warns(UserWarning, match=expected) as issued:
        main([verb, "folder", *settings])
    assert len([warning for warning in issued if "no pixel in" in str(warning.message)]) == 1


def test_absent_classes_are_one_line(photo_folder):
    (photo_folder / "classes.txt").write_text("background\nground\nthing\nunicorn\nelf\n")
    line = "classes unicorn (train id 3) and elf (train id 4) have no pixel in the training labels"
    with pytest.warns(UserWarning, match=re.escape(line)):
        folder_data(photo_folder).class_pixels()
    assert check(folder_data(photo_folder), progress=False).problems == [line]


CLASSES = {
    "none": (lambda path: path.unlink(), "no class list"),
    "empty": (lambda path: path.write_text(""), "classes.txt: found 0 classes"),
    "Latin-1": (
        lambda path: path.write_bytes("Straße\nB\n".encode("latin-1")),
        "classes.txt: the class list cannot be read",
    ),
    "UTF-16": (lambda path: path.write_bytes("Weg\nB\n".encode("utf-16")), "classes.txt: the class list cannot be read"),
    "a name twice": (lambda path: path.write_text("a\na\nb\n"), "classes.txt: class names must differ"),
    "TOML cut off": (lambda path: path.with_suffix(".toml").write_text("classes = ["), "classes.toml: not a valid TOML"),
    "a folder": (to_folder, "no class list"),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_unusable_class_lists_are_refused(photo_folder, kind):
    damage, expected = CLASSES[kind]
    damage(photo_folder / "classes.txt")
    with pytest.raises(DataError, match=expected):
        folder_data(photo_folder)


def test_class_list_with_a_byte_order_mark(photo_folder):
    (photo_folder / "classes.txt").write_bytes(b"\xef\xbb\xbfbackground\r\nground\r\nthing\r\n")
    assert folder_data(photo_folder).class_names == ("background", "ground", "thing")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
@pytest.mark.parametrize("name", [b"\xfc 3.jpg", b"a\nb.jpg"])
def test_unprintable_file_names_are_reported(photo_folder, name):
    os.rename(image_file(photo_folder), os.fsencode(photo_folder / "images") + b"/" + name)
    problems = check(folder_data(photo_folder), progress=False).problems
    assert any("images: a file is named '" in problem and "rename it" in problem for problem in problems)
    assert all(problem.isprintable() for problem in problems)


@pytest.fixture
def unprivileged():
    """A folder and a function that drops root's privileges, so that file permissions apply even if root runs the tests."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    yield folder, (lambda: os.seteuid(65534)) if root else (lambda: None)
    if root:
        os.seteuid(0)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs Unix permissions")
@pytest.mark.parametrize(
    ("locked", "expected"),
    [
        (f"images/{NAME}.jpg", "photo 3.jpg: cannot be read (Permission denied)"),
        (f"masks/{NAME}.png", "photo 3.png: cannot be read (Permission denied)"),
        ("images", "images: cannot be listed (Permission denied)"),
    ],
)
def test_files_without_permission(photo_folder, unprivileged, locked, expected):
    folder, drop_privileges = unprivileged
    root = Path(shutil.copytree(photo_folder, folder / "photos"))
    for path in root.rglob("*"):
        path.chmod(0o755)
    (root / locked).chmod(0)
    data = folder_data(root, cache_dir=folder / "cache")
    drop_privileges()
    assert expected in "\n".join(check(data, progress=False).problems)


# --- one bad file in the middle of a run -----------------------------------------------------------------------------


class DeleteImage(pl.Callback):
    """Deletes an image when training starts, after its header was checked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer, pl_module):
        self.path.unlink()


class RecordNames(pl.Callback):
    """Records the sample names of the training batches."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.names.append(list(batch["name"]))


def run(data, callbacks, folder, epochs=1):
    torch.manual_seed(0)
    schedule = functools.partial(WarmupPolynomialLR, warmup_steps=1)
    module = SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=3, scheduler=schedule)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[JaccardCallback(), *callbacks],
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


OPTIONS = {"num_workers": 2, "crop_size": (32, 32), "batch_size": 2, "val_fraction": 0.1}


def test_a_deleted_file_stops_the_run_with_its_name(photo_folder, tmp_path):
    samples = FolderData(photo_folder, **OPTIONS).samples("train")
    data = FolderData(photo_folder, **OPTIONS, held_out=[samples[0].name])
    with pytest.raises(DataError) as stopped:
        run(data, [DeleteImage(samples[1].image)], tmp_path, epochs=2)
    assert f"{samples[1].image}: no such file" in str(stopped.value)


def test_bad_files_are_skipped_and_listed_with_on_error_skip(photo_folder, tmp_path):
    """A mask with a bad header, truncated images in training and validation, and an image deleted during the run."""
    names = sorted(sample.name for sample in folder_data(photo_folder).samples("train"))
    deleted, cut, headless, val_cut, val_sound = names[:5]
    for name in (cut, val_cut):
        path = photo_folder / "images" / f"{name}.jpg"
        path.write_bytes(path.read_bytes()[:-300])
    (photo_folder / "masks" / f"{headless}.png").write_bytes(b"")
    data = FolderData(photo_folder, **OPTIONS, held_out=[val_cut, val_sound], on_error="skip")
    sound = set(names[5:])
    recorder = RecordNames()
    with pytest.warns(UserWarning, match="skipped") as issued:
        trainer = run(data, [DeleteImage(photo_folder / "images" / f"{deleted}.jpg"), recorder], tmp_path, epochs=2)
    batches = recorder.names
    assert all(len(batch) == 2 for batch in batches)  # the next image replaces a skipped one, so batches keep their size
    assert {name for batch in batches for name in batch} <= sound | {deleted}
    assert sound <= {name for batch in batches for name in batch}
    summaries = [str(warning.message) for warning in issued if "images skipped" in str(warning.message)]
    assert [re.search(r"\d+", text.splitlines()[0])[0] for text in summaries] == ["4"]
    assert all(f"{name}." in summaries[0] for name in (deleted, cut, headless, val_cut))
    assert val_sound not in summaries[0]
    # Only the remaining validation image is scored.
    labels = np.array(Image.open(photo_folder / "masks" / f"{val_sound}.png"))
    confusion = next(c for c in trainer.callbacks if isinstance(c, JaccardCallback)).scores["val"].confusion
    assert int(confusion.sum()) == int((labels < 255).sum())
    # The masks of all images with a readable mask are counted, also of the deleted and the truncated image.
    expected = sum(
        np.bincount(np.array(Image.open(photo_folder / "masks" / f"{name}.png")).ravel(), minlength=256)[:3]
        for name in sound | {deleted, cut}
    )
    assert data.class_pixels().tolist() == expected.tolist()


def test_a_plain_loop_warns_about_skipped_images(photo_folder):
    path = image_file(photo_folder)
    path.write_bytes(path.read_bytes()[:-300])
    data = folder_data(photo_folder, on_error="skip")
    data.setup("fit")
    loader = data.train_dataloader()
    batches = []
    with pytest.warns(UserWarning, match="skipped: .*photo 3.jpg: cannot be read"):
        batches += [*loader, *loader]  # two epochs, because each drops a smaller last batch
    assert NAME not in {name for batch in batches for name in batch["name"]}
    assert all(set(batch) == {"image", "mask", "name"} for batch in batches)


def test_repeated_images_are_not_scored_after_a_skipped_image():
    """Process 1 of 2 gets images 1 and 3 and, because five images are padded to six, a repeated 0; image 3 is skipped."""
    data = SimpleNamespace(class_names=("a", "b"))
    trainer = SimpleNamespace(world_size=2, global_rank=1, datamodule=data)
    trainer.val_dataloaders = SimpleNamespace(dataset=range(5), batch_size=2)
    callback = JaccardCallback(["a", "b"])
    callback.start(trainer, SimpleNamespace(device=torch.device("cpu")), "val")
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    outputs = {"preds": labels.to(torch.uint8), "target": labels}
    callback.take(trainer, outputs, {"name": ["1", "0"], "dropped": [1]}, 0, "val")
    assert callback._metric.scores().confusion.tolist() == [[16, 0], [0, 0]]


def test_a_split_without_a_usable_image_is_an_error(photo_folder):
    for path in (photo_folder / "images").iterdir():
        path.write_bytes(b"")
    data = folder_data(photo_folder, on_error="skip")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(DataError, match="no image of the train split .*; run mcseg check folder --root /"),
    ):
        data.setup("fit")


def test_the_command_that_lists_all_problems_is_complete(photo_folder):
    for path in (photo_folder / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-300])  # the headers stay intact
    data = folder_data(photo_folder.rename(photo_folder.with_name("my photos")), on_error="skip")
    with pytest.raises(DataError, match="no training image .*; run mcseg check folder --root '/.*/my photos'"):
        next(iter(data.train_dataloader()))
    assert SyntheticData().check_command == "mcseg check synthetic"
    assert CamVidData("x").check_command == "mcseg check camvid --root x"


def test_a_missing_mask_stops_the_run_with_the_expected_file(photo_folder):
    mask_file(photo_folder).unlink()
    data = FolderData(photo_folder, num_workers=0)
    expected = (
        f"photo 3.jpg: has no mask, expected {mask_file(photo_folder)}; add one or remove the image; mcseg check folder"
    )
    with pytest.raises(DataError, match=re.escape(f"{expected} --root {photo_folder} lists all problems")):
        data._is_usable(next(s for s in data.samples("train") + data.samples("val") if s.name == NAME), "train", masks=True)
    (problem,) = check(data, progress=False).problems
    assert problem.endswith("add one or remove the image")


@pytest.mark.slow
def test_prediction_skips_a_bad_file_with_on_error_skip(photo_folder, tmp_path, capsys):
    settings = ["--data.root", str(photo_folder), "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    settings += ["--model.encoder", "tu-test_resnet.r160_in1k", "--trainer.default_root_dir", str(tmp_path / "run")]
    main(["fit", "folder", *settings, "--trainer.max_epochs", "1", "--model.encoder_weights", "null"])
    path = image_file(photo_folder)
    path.write_bytes(path.read_bytes()[:-300])
    settings += ["--ckpt_path", str(tmp_path / "run/checkpoints/last.ckpt"), "--writer.output_dir", str(tmp_path / "out")]
    settings += ["--data.predict_root", str(photo_folder / "images")]
    with pytest.raises(SystemExit):
        main(["predict", "folder", *settings, "--data.on_error", "stop"])
    assert "photo 3.jpg: cannot be read" in capsys.readouterr().err.splitlines()[-1]
    with pytest.warns(UserWarning, match="skipped") as issued:
        main(["predict", "folder", *settings, "--data.on_error", "skip"])
    assert "skipped (data.on_error): 1;" in str(issued[-1].message)
    assert sorted(path.stem for path in (tmp_path / "out/masks").iterdir()) == [f"photo {i}" for i in range(10) if i != 3]


# Masks with palettes. COLORS are the classes' colours; each file has its own order of them.
COLORS = np.array([[0, 0, 0], [0, 128, 0], [200, 0, 0]], np.uint8)
COLOR_LIST = "background 0 0 0\nground 0 128 0\nthing 200 0 0\n"


def write_palette(path: Path, values: np.ndarray, colors, **options) -> None:
    picture = Image.fromarray(values.astype(np.uint8), "P")
    picture.putpalette(np.asarray(colors, np.uint8).tobytes())
    path.unlink(missing_ok=True)
    picture.save(path, **options)
    with Image.open(path) as file:
        assert file.mode == "P"


def permuted_palettes(root: Path, suffix: str = ".png") -> dict[str, np.ndarray]:
    """Write the masks without void as palette files, each with another order of the colours; return the labels by name."""
    labels = {}
    for number, path in enumerate(sorted((root / "masks").iterdir())):
        values = np.array(Image.open(path))
        values[values == 255] = 0
        order = np.roll(np.arange(3), number)  # index -> class
        labels[path.stem] = values
        path.unlink()
        write_palette(path.with_suffix(suffix), np.argsort(order)[values], COLORS[order])
    return labels


@pytest.mark.parametrize("suffix", [".png", ".tif", ".gif", ".bmp"])
@pytest.mark.parametrize("order", ["background 0 0 0\nground 0 128 0\nthing 200 0 0\n", None])
def test_palette_files_are_read_by_the_colours_of_the_list(photo_folder, suffix, order):
    labels = permuted_palettes(photo_folder, suffix)
    if order is None:  # ids and void colours in a TOML file
        order = "void = [[9, 9, 9]]\n" + "".join(
            f'[[classes]]\nname = "{name}"\nid = {10 * index}\ncolor = {color.tolist()}\n'
            for index, (name, color) in enumerate(zip("abc", COLORS, strict=True))
        )
        (photo_folder / "classes.txt").unlink()
        (photo_folder / "classes.toml").write_text(order)
    else:
        (photo_folder / "classes.txt").write_text(COLOR_LIST)
    data = folder_data(photo_folder)
    samples = data.samples("train") + data.samples("val")
    for sample in samples:
        assert np.array_equal(data.reader.mask(sample), labels[sample.name])
        assert data.reader.counts(sample).tolist() == np.bincount(labels[sample.name].ravel(), minlength=3).tolist()
    report = check(data, progress=False)
    assert report.problems == report.warnings == []
    total = sum(np.bincount(values.ravel(), minlength=3) for values in labels.values())
    assert (report.pixels["train"] + report.pixels["val"]).tolist() == total.tolist()


def test_colour_and_grey_files_among_palette_files(photo_folder):
    labels = permuted_palettes(photo_folder)
    (photo_folder / "classes.txt").write_text(COLOR_LIST)
    names = sorted(labels)
    Image.fromarray(COLORS[labels[names[-1]]]).save(photo_folder / "masks" / f"{names[-1]}.png")
    write_png(photo_folder / "masks" / f"{names[-2]}.png", labels[names[-2]])  # indices
    data = folder_data(photo_folder)
    for sample in data.samples("train") + data.samples("val"):
        assert np.array_equal(data.reader.mask(sample), labels[sample.name])


def problems_with(root: Path, change) -> list[str]:
    """Change the mask of photo 3, a palette file in the order of the list, and return what check reports."""
    permuted_palettes(root)
    (root / "classes.txt").write_text(COLOR_LIST)
    change(mask_file(root))
    data = folder_data(root)
    found = check(data, progress=False).problems
    if found:
        sample = next(s for s in data.samples("train") + data.samples("val") if s.name == NAME)
        with pytest.raises(DataError) as caught:
            data.reader.mask(sample)
        assert str(caught.value) == found[0]
    return found


def test_a_palette_that_contradicts_the_list_is_named(photo_folder):
    values = np.zeros((24, 32), np.uint8)
    values[0, :5], values[1, :7] = 1, 2
    colors = [[0, 0, 0], [200, 0, 0], [1, 2, 3]]
    [line] = problems_with(photo_folder, lambda path: write_palette(path, values, colors))
    assert (
        "photo 3.png: palette and class list contradict each other: index 1 has the colour (200, 0, 0) of class thing"
        in line
    )
    assert "index 2 (7 pixels) has the colour (1, 2, 3), which is not in the list" in line


def test_a_palette_without_the_colours_of_the_list_is_read_by_index(photo_folder):
    values = np.full((24, 32), 255, np.uint8)
    values[3:9], values[9:] = 1, 2
    colors = np.zeros((256, 3), np.uint8)
    colors[1], colors[2], colors[255] = [0, 128, 0], [1, 2, 3], [224, 224, 192]  # 1 as in the list; 255 is void
    assert problems_with(photo_folder, lambda path: write_palette(path, values, colors)) == []
    data = folder_data(photo_folder)
    sample = next(s for s in data.samples("train") + data.samples("val") if s.name == NAME)
    assert np.array_equal(data.reader.mask(sample), values)
    assert data.reader.counts(sample).tolist() == [0, 6 * 32, 15 * 32]


def test_colours_without_a_class_are_counted(photo_folder):
    shown = np.zeros((24, 32, 3), np.uint8)
    shown[0, :5], shown[1, :7] = [9, 8, 7], [3, 2, 1]
    [line] = problems_with(photo_folder, lambda path: Image.fromarray(shown).save(path))
    assert (
        "photo 3.png: 12 pixels of the mask have the unknown colours (3, 2, 1) on 7 pixels, (9, 8, 7) on 5 pixels;" in line
    )
    assert "expected 3 known colours" in line


def smooth(root: Path) -> Image.Image:
    picture = Image.fromarray(COLORS[np.minimum(mask(root), 2)])
    return picture.resize((64, 48), Image.Resampling.BICUBIC).resize((32, 24), Image.Resampling.BILINEAR)


def as_jpeg(root: Path) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(COLORS[np.minimum(mask(root), 2)]).save(file, "JPEG", quality=80)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("picture", [smooth, as_jpeg])
def test_smoothed_and_compressed_masks_are_named_as_such(photo_folder, picture):
    blurred = picture(photo_folder)
    [line] = problems_with(photo_folder, lambda path: blurred.save(path))
    assert "between or near the colours of the list, as in masks that were anti-aliased" in line
    exact = (np.array(blurred)[:, :, None] == COLORS).all(-1).any(-1)
    assert f"photo 3.png: {int((~exact).sum())} pixels of the mask have the unknown colours" in line


def test_palettes_that_contradict_one_another_are_named_by_check(photo_folder):
    permuted_palettes(photo_folder)
    [line] = check(folder_data(photo_folder), progress=False).problems
    first, second = (photo_folder / "masks" / f"photo {number}.png" for number in (0, 1))
    assert "the palettes of the masks contradict each other: index 0 is" in line
    assert "give each class its colour in the class list" in line
    assert str(photo_folder / "masks") in line
    for path in (first, second):  # palettes that differ without a colour in common are only mentioned
        values = np.array(Image.open(path))
        write_palette(path, values, np.arange(9).reshape(3, 3) + (100 if path == first else 200))
    for path in (photo_folder / "masks").iterdir():
        if path not in (first, second):
            write_png(path, np.minimum(np.array(Image.open(path)), 2))
    report = check(folder_data(photo_folder), progress=False)
    assert report.problems == []
    [line] = [warning for warning in report.warnings if "palettes" in warning]
    assert "(100, 101, 102)" in line
    assert "(200, 201, 202)" in line
    assert "read by their indices" in line


VALUES = {
    "begin at 1": (lambda v: v + 1, np.uint8, "seem to begin at 1; .*first class; .*ids 1 to 3 and void = "),
    "16 bits, scaled": (lambda v: v * 257, np.uint16, "multiples of 257.*divide them by 257"),
    "a photo": (lambda v: np.arange(v.size).reshape(v.shape) % 200, np.uint8, "is a photo, or was smoothed or compressed"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_unknown_values_have_the_hint_that_fits(photo_folder, kind):
    change, dtype, expected = VALUES[kind]
    for path in (photo_folder / "masks").iterdir():
        values = np.array(Image.open(path))
        values[values == 255] = 0
        write_png(path, change(values.astype(int)).astype(dtype))
    problems = check(folder_data(photo_folder), progress=False).problems
    assert re.search(expected, problems[0])
    assert (
        "; 9 files have this problem: photo 0.png" in problems[0]
    )  # those for training; the other one is a line of its own


def test_one_bit_masks_are_the_classes_0_and_1(photo_folder):
    (photo_folder / "classes.txt").write_text("background\nthing\n")
    for path in (photo_folder / "masks").iterdir():
        Image.fromarray(np.array(Image.open(path)) == 1).save(path)
    report = check(folder_data(photo_folder), progress=False)
    assert report.problems == []
    assert (report.pixels["train"] > 0).all()


def test_transparent_pixels_of_a_colour_mask_are_mentioned(photo_folder):
    (photo_folder / "classes.txt").write_text(COLOR_LIST)
    for number, path in enumerate(sorted((photo_folder / "masks").iterdir())):
        shown = np.full((24, 32, 4), 255, np.uint8)
        shown[..., :3] = COLORS[np.minimum(np.array(Image.open(path)), 2)]
        shown[0, 0, 3] = 0 if number == 3 else 255
        Image.fromarray(shown).save(path)
    report = check(folder_data(photo_folder), progress=False)
    assert report.problems == []
    [line] = report.warnings
    assert "photo 3.png: the mask has transparent pixels, and their colours are read as labels" in line


def all_void(root: Path, split: str) -> None:
    write_lists(root, "photo 0\nphoto 1\nphoto 4\nphoto 5\n")
    for name in ("photo 2", "photo 3") if split == "val" else ("photo 0", "photo 1", "photo 4", "photo 5"):
        write_png(root / "masks" / f"{name}.png", np.full((24, 32), 255, np.uint8))


@pytest.mark.parametrize(("split", "title"), [("train", "training"), ("val", "validation")])
def test_a_split_of_void_is_one_problem(photo_folder, split, title):
    all_void(photo_folder, split)
    found = check(folder_data(photo_folder), progress=False).problems
    assert [f"no pixel of the {title} labels has a class"] == [line.split(",")[0] for line in found if "are void" in line]


@pytest.mark.parametrize("objective", ["CrossEntropyLoss", "DiceLoss"])
def test_training_reports_a_validation_of_void(photo_folder, objective):
    all_void(photo_folder, "val")
    settings = ["--data.root", str(photo_folder), "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    settings += ["--model.encoder", "tu-test_resnet.r160_in1k", "--trainer.fast_dev_run", "true"]
    settings += ["--data.batch_size", "2", "--data.crop_size", "[32,32]", "--model.objective", objective]
    with pytest.warns(UserWarning, match="val: no pixel of the targets has a class, all are void") as issued:
        main(["fit", "folder", *settings])
    assert len([warning for warning in issued if "all are void" in str(warning.message)]) == 1
