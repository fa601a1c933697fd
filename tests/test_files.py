"""Reading of files: pixel values as stored, errors that name the file. Atomic writes."""

import errno
import os

import numpy as np
import pytest
from conftest import write_png
from PIL import Image

from mcseg.atomic import write_atomically
from mcseg.data.classlist import table_from_names
from mcseg.data.files import FileReader, Sample, read_image, read_mask
from mcseg.data.labels import DataError, LabelTable
from mcseg.data.sources import image_size
from mcseg.messages import one_line


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_masks_give_their_stored_values(tmp_path, mode):
    values = np.array([[0, 1, 1], [1, 0, 0]])
    path = tmp_path / "m.png"
    if mode == "P":
        picture = Image.fromarray(values.astype(np.uint8)).convert("P")
        picture.putpalette([200, 10, 10, 10, 200, 10])  # colours must not leak into the values
    elif mode == "I;16":
        picture = Image.fromarray(values.astype(np.uint16))
    elif mode == "1":
        picture = Image.fromarray(values.astype(bool))
    else:
        picture = Image.fromarray(values.astype(np.uint8))
    picture.save(path)
    assert read_mask(path).tolist() == values.tolist()


def test_16_bit_values_are_not_clipped(tmp_path):
    write_png(tmp_path / "m.png", np.array([[0, 300], [65535, 7]], dtype=np.uint16))
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 300], [65535, 7]]


def test_rgb_mask(tmp_path):
    write_png(tmp_path / "m.png", np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert read_mask(tmp_path / "m.png").tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_palette_mask_read_by_color(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    picture.putpalette([200, 10, 10, 10, 200, 10])
    picture.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", by_color=True).tolist() == [[[200, 10, 10], [10, 200, 10]]]


def test_jpeg_mask_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "m.jpg")
    with pytest.raises(DataError, match=r"m\.jpg: JPEG changes label values"):
        read_mask(tmp_path / "m.jpg")


def test_float_mask_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match="mode F"):
        read_mask(tmp_path / "m.tif")


def test_image_channels_and_values(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    write_png(tmp_path / "i.png", pixels)
    image = read_image(tmp_path / "i.png")
    assert image.permute(1, 2, 0).tolist() == pixels.tolist()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_image_modes_become_rgb(tmp_path, mode):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.new("RGB", (5, 4), (90, 90, 90)).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / f"i{suffix}")
    image = read_image(tmp_path / f"i{suffix}")
    assert image.shape == (3, 4, 5)
    assert (image.int() - 90).abs().max() <= 3


def test_exif_orientation_applies_to_the_image_and_its_size(tmp_path):
    picture = Image.fromarray(np.zeros((20, 40, 3), dtype=np.uint8))
    picture.paste((255, 0, 0), (0, 0, 8, 8))  # red at the top left of the stored image
    exif = picture.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    picture.save(tmp_path / "i.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "i.jpg")
    assert image.shape == (3, 40, 20)
    assert image_size(tmp_path / "i.jpg") == (40, 20)
    assert image[0, 3, 16] > 200  # now at the top right
    assert image[0, 3, 3] < 60


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 20])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken one.png"
    path.write_bytes(content)
    for read in (read_image, read_mask, image_size):
        with pytest.raises(DataError, match=r"broken one\.png: cannot be read .*; replace or remove the file"):
            read(path)


def test_truncated_image_has_a_readable_header_and_unreadable_pixels(tmp_path):
    path = tmp_path / "i.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    assert image_size(path) == (64, 64)
    with pytest.raises(DataError, match=r"i\.jpg: cannot be read"):
        read_image(path)


def test_error_of_different_sizes_names_both_files(tmp_path):
    write_png(tmp_path / "i.png", np.zeros((4, 6, 3), dtype=np.uint8))
    write_png(tmp_path / "m.png", np.zeros((6, 4), dtype=np.uint8))
    reader = FileReader(table_from_names(["a", "b"]))
    sample = Sample("i", tmp_path / "i.png", tmp_path / "m.png")
    for method in (reader.verify, reader.pair):
        with pytest.raises(DataError, match=r"m\.png: the mask is 4x6 pixels but .*i\.png is 6x4"):
            method(sample)


def test_missing_mask(tmp_path):
    write_png(tmp_path / "i.png", np.zeros((4, 6, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"i\.png: has no mask"):
        FileReader(table_from_names(["a", "b"])).verify(Sample("i", tmp_path / "i.png"))


@pytest.mark.parametrize("kind", ["L", "P", "RGB", "16 bits", "1 bit"])
def test_counts_equal_the_pixels_of_the_mask(tmp_path, kind):
    values = np.array([[0, 1, 1, 2], [255, 0, 1, 0]])
    if kind == "1 bit":
        values = values % 2
    path = tmp_path / "m.png"
    if kind == "P":
        picture = Image.fromarray(values.astype(np.uint8)).convert("P")
        picture.putpalette([7, 7, 7] * 256)
        picture.save(path)
    else:
        stored = {"L": np.uint8, "RGB": np.uint8, "16 bits": np.uint16, "1 bit": bool}[kind]
        write_png(path, np.stack([values] * 3, -1).astype(stored) if kind == "RGB" else values.astype(stored))
    reader = FileReader(table_from_names(["a", "b", "c"]))
    expected = [int((values == index).sum()) for index in range(3)]
    assert reader.counts(Sample("m", tmp_path / "i.png", path)).tolist() == expected


def test_error_of_an_unknown_value_names_file_value_and_pixels(tmp_path):
    write_png(tmp_path / "m.png", np.array([[0, 9, 9]], dtype=np.uint8))
    reader = FileReader(table_from_names(["a", "b", "c"]))
    with pytest.raises(DataError, match=r"m\.png: 2 pixels of the mask have the unknown values 9"):
        reader.counts(Sample("m", tmp_path / "i.png", tmp_path / "m.png"))


def test_counts_of_unlisted_values(tmp_path):
    write_png(tmp_path / "m.png", np.array([[0, 9, 9, 1]], dtype=np.uint8))
    sample = Sample("m", tmp_path / "i.png", tmp_path / "m.png")
    table = LabelTable(("a", "b"), ((0, 0, 0), (1, 1, 1)), {0: 0, 1: 1}, unlisted=1)
    assert FileReader(table).counts(sample).tolist() == [1, 3]
    table = LabelTable(("a", "b"), ((0, 0, 0), (1, 1, 1)), {0: 0, 1: 1}, unlisted=255)
    assert FileReader(table).counts(sample).tolist() == [1, 1]


def test_the_new_file_replaces_the_old_one_and_no_temporary_file_remains(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    for content in ("one", "two"):
        write_atomically(path, lambda temporary, content=content: temporary.write_text(content))
        assert path.read_text() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_the_content_is_flushed_before_the_rename(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.txt", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append((os.fstat(number).st_size, path.exists())), sync(number)))
    write_atomically(path, lambda temporary: temporary.write_text("four"))
    assert seen == [(4, False)]


@pytest.mark.parametrize("fault", [ValueError("no picture"), RuntimeError("no tensor")], ids=str)
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, fault):
    def write(temporary):
        temporary.write_text("half")
        raise fault

    path = tmp_path / "a.txt"
    path.write_text("whole")
    with pytest.raises(type(fault), match=str(fault)):
        write_atomically(path, write)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.txt", "whole")]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    """Also if a library raises its own error over the OSError, as torch does."""

    def write(temporary):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    for case in (write, lambda temporary: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))):
        with pytest.raises(OSError, match="No space left on device") as error:
            write_atomically(tmp_path / "a.txt", case)
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "a.txt"))
        assert one_line(error.value).startswith(f"{tmp_path}/a.txt: No space left on device; free some space")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists") as error:
        write_atomically(tmp_path / "file" / "a.txt", lambda temporary: temporary.write_text("x"))
    assert error.value.filename == str(tmp_path / "file")


def test_temporary_names_differ_between_processes_unless_exclusive(tmp_path):
    names = []
    for exclusive in (False, True):
        write_atomically(
            tmp_path / "a.png",
            lambda temporary: (names.append(temporary.name), temporary.write_text("x")),
            exclusive=exclusive,
        )
    assert names == [f".a.{os.getpid()}.tmp.png", ".a.tmp.png"]
