"""Label tables and class lists: mapping from mask values to train ids."""

import numpy as np
import pytest

from mcseg.data.classlist import table_from_file, table_from_names, table_from_toml
from mcseg.data.labels import DataError, LabelTable, pack_color
from mcseg.palette import distinct_colors

NAMES = ("a", "b", "c")
COLORS = ((0, 0, 0), (10, 20, 30), (255, 0, 255))


def test_index_values_become_train_ids_and_void():
    table = LabelTable(NAMES, COLORS, {7: 0, 3: 1, 200: 2, 11: 255})
    raw = np.array([[7, 3, 200], [11, 7, 3]], dtype=np.uint8)
    assert table.train_ids(raw, "m.png").tolist() == [[0, 1, 2], [255, 0, 1]]


def test_16_bit_values():
    table = LabelTable(NAMES, COLORS, {1000: 0, 40000: 1, 0: 2})
    raw = np.array([[1000, 40000, 0]], dtype=np.uint16)
    assert table.train_ids(raw, "m.png").tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_values_outside_any_table_are_unknown_not_wrapped(dtype):
    table = LabelTable(NAMES, COLORS, {0: 0, 1: 1, 2: 2})
    for value in (-1, 256, 65536, 1 << 20):
        with pytest.raises(DataError, match=str(value)):
            table.train_ids(np.array([[0, value]], dtype=dtype), "m.png")


def test_colours_become_train_ids():
    table = LabelTable(
        NAMES, COLORS, {pack_color(c): i for i, c in enumerate(COLORS)} | {pack_color((9, 9, 9)): 255}, by_color=True
    )
    raw = np.array([[[0, 0, 0], [10, 20, 30]], [[255, 0, 255], [9, 9, 9]]], dtype=np.uint8)
    assert table.train_ids(raw, "m.png").tolist() == [[0, 1], [2, 255]]


def test_unknown_values_are_named_with_their_file():
    table = table_from_names(["a", "b"])
    raw = np.array([[0, 1, 5], [5, 9, 255]], dtype=np.uint8)
    with pytest.raises(DataError, match=r"masks/x\.png: 3 pixels .* unknown values 5, 9; expected 0-1, 255"):
        table.train_ids(raw, "masks/x.png")


def test_unknown_colours_are_named():
    table = LabelTable(NAMES, COLORS, {pack_color(c): i for i, c in enumerate(COLORS)}, by_color=True)
    with pytest.raises(DataError, match=r"1 pixels .* unknown colours \(1, 2, 3\)"):
        table.train_ids(np.array([[[0, 0, 0], [1, 2, 3]]], dtype=np.uint8), "x.png")


def test_unlisted_values_map_to_the_given_id():
    table = LabelTable(NAMES, COLORS, {1: 0}, unlisted=255)
    assert table.train_ids(np.array([[1, 2, 77]], dtype=np.uint8), "x.png").tolist() == [[0, 255, 255]]


def test_grey_mask_saved_as_rgb_is_an_index_mask():
    raw = np.repeat(np.array([[0, 1], [1, 255]], dtype=np.uint8)[..., None], 3, axis=2)
    assert table_from_names(["a", "b"]).train_ids(raw, "x.png").tolist() == [[0, 1], [1, 255]]


def test_coloured_mask_for_an_index_table():
    with pytest.raises(DataError, match="mask is coloured, expected one channel"):
        table_from_names(["a", "b"]).train_ids(np.array([[[0, 1, 2]]], dtype=np.uint8), "x.png")


@pytest.mark.parametrize(
    ("names", "palette", "raw_ids", "message"),
    [
        (("a",), ((0, 0, 0),), {0: 0}, "1 classes, expected 2 to 254"),
        (("a", "a"), COLORS[:2], {0: 0}, "found more than once: a"),
        (("a", "b"), COLORS, {0: 0}, "3 colours for 2 classes"),
        (("a", "b"), COLORS[:2], {0: 2}, "train id 2; expected 0 to 1"),
    ],
)
def test_invalid_tables_are_refused(names, palette, raw_ids, message):
    with pytest.raises(DataError, match=message):
        LabelTable(names, palette, raw_ids)


def test_distinct_colors_differ_and_none_is_black():
    colors = distinct_colors(254)
    assert len(set(colors)) == 254
    assert (0, 0, 0) not in colors


def test_class_list_as_text(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# comment\nroad 128 64 128\n\nstreet light 250, 170, 30\n")
    indices = table_from_file(path, by_color=False)
    assert indices.names == ("road", "street light")
    assert indices.palette == ((128, 64, 128), (250, 170, 30))
    assert dict(indices.raw_ids) == {0: 0, 1: 1, 255: 255}
    colours = table_from_file(path, by_color=True)
    assert dict(colours.raw_ids) == {128 * 65536 + 64 * 256 + 128: 0, 250 * 65536 + 170 * 256 + 30: 1}


def test_class_list_as_toml(tmp_path):
    path = tmp_path / "classes.toml"
    path.write_text('void = [7]\n[[classes]]\nname = "off"\nid = 0\n[[classes]]\nname = "on"\nid = 255\ncolor = [1, 2, 3]\n')
    table = table_from_file(path, by_color=False)
    assert table.names == ("off", "on")
    assert table.train_ids(np.array([[0, 255, 7]], dtype=np.uint8), "x").tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a list `classes`"),
        ({"classes": [{"name": "a", "idx": 1}]}, "unknown key idx"),
        ({"classes": [{"name": "a", "id": 3}, {"name": "b", "id": 3}]}, "a, b have the same id"),
        ({"classes": [{"name": "a", "id": -1}, {"name": "b"}]}, "found the id -1"),
        ({"classes": [{"name": "a", "color": [1, 2]}, {"name": "b"}]}, r"found the colour \[1, 2\]"),
    ],
)
def test_malformed_class_lists(content, message):
    with pytest.raises(DataError, match=message):
        table_from_toml(content, "classes.toml")


def test_text_list_with_ids_asks_for_toml(tmp_path):
    (tmp_path / "classes.txt").write_text("0 road\n1 sky\n")
    with pytest.raises(DataError, match=r"line 1: found '0 road'.*classes\.toml"):
        table_from_file(tmp_path / "classes.txt", by_color=False)
