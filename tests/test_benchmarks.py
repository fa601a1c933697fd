"""Data modules of the benchmarks on small fakes of their official layouts; names, splits and ids against values by hand."""

import importlib
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from conftest import SHARED, write_png
from PIL import Image

from mcseg.data import (
    BDD100KData,
    BenchmarkData,
    CamVidData,
    CityscapesData,
    CocoStuff10kData,
    DataError,
    EndoVis2017Data,
    MapillaryVistasData,
    PascalVOCData,
    SceneParse150Data,
)
from mcseg.evaluation.metrics import SegmentationScores, score

# --- expected values, written by hand ----------------------------------------------------------------------------------

# Train ids of the ids 0..33, then of 7, 7, 8, 26, 33, 0.
CITYSCAPES_ROW = (
    [255] * 7
    + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18]
    + [0, 0, 1, 13, 18, 255]
)
CITYSCAPES_TRAIN = {
    "aachen_000000_000019": [[255] * 40] + [CITYSCAPES_ROW] * 22 + [[255] * 40],
    "aachen_000001_000019": [[0] * 10 + [1] * 10 + [10] * 10 + [255] * 10] * 12 + [[0, 13, 8, 255] * 10] * 12,
    "hamburg_000000_000042": [[11] * 5 + [12] * 5 + [18] * 10 + [16] * 20] * 24,
}
CITYSCAPES_VAL = {
    "frankfurt_000000_000294": [[*CITYSCAPES_ROW[:27], 255, 15, 255, 255, 255, 17, 18, 0, 0, 1, 13, 18, 255]] * 24,
    "munster_000000_000019": [[255] * 40] + [[2] * 20 + [8] * 20] * 23,
}
CITYSCAPES_EXTRA = {
    "augsburg_000000_000020": [[255] * 15 + [0] * 10 + [13] * 5 + [255] * 10] * 24,
    "troisdorf_000000_000072": [[255] * 30 + [8] * 10] * 24,
}
# Regular id of each train id, as the evaluation server expects.
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]

BDD_ROW = [*range(19), 255, 255, 0, 2, 8, 10, 13, 13, 13, 255, 255, 0, 0]
BDD_TRAIN = {
    "0000f77c-6257be58": [BDD_ROW] * 18,
    "00054602-3bf57337": [[10] * 32] * 9 + [[0] * 20 + [13] * 12] * 9,
    "ff3ec4c9-0c1a4b7a": [[255] * 32] * 18,
}
BDD_VAL = {"7d06fefd-f7be05a6": [BDD_ROW] * 18, "9aa94005-ff1d4c9a": [[2] * 16 + [255] * 16] * 18}

MAPILLARY_KEYS = ["-2Z1KKsPcmRbtkjBPA6DeQ", "0035fkbjWljhaftpVM37-g", "_8Dd7vwJsbMNLsrqTzZd6g"]
MAPILLARY_VAL_KEYS = ["lcEh2jrVyj8VYp8mWnJ_4A", "zYEyqbpvJFJ9ZnGzOGRJwg"]
MAPILLARY_V12_TRAIN = [
    [[*range(65)] + [255] * 59] * 10,
    [[13] * 8 + [255] * 4 + [64] * 8] * 36,
    [[27] * 15 + [63] * 15] * 20,
]
MAPILLARY_V12_VAL = [[[255, *range(64, -1, -1)] + [255] * 58] * 10, [[255] * 10 + [19] * 20] * 20]
MAPILLARY_V20_ROW = [
    *(0, 1, 255, *range(2, 30), 255, *range(30, 36), 255, *range(36, 76), 255, *range(76, 82), 255),  # up to 86
    *(*range(82, 91), 255, *range(91, 109), 255, *range(109, 116), 255),
]
MAPILLARY_V20_TRAIN = [
    [MAPILLARY_V20_ROW] * 10,
    [[20] * 8 + [255] * 4 + [113] * 8] * 36,
    [[255, 255, 255, 255, 255, 255, 255, 62, 115, 112] * 3] * 20,
]
MAPILLARY_V20_VAL = [[MAPILLARY_V20_ROW[::-1]] * 10, [[255] * 10 + [29] * 20] * 20]

ADE_TRAIN = {
    "ADE_train_00000001": [[255, *range(150)]] * 10,
    "ADE_train_00000002": [[255] * 5 + [0] * 5 + [3] * 10] * 30,
    "ADE_train_00020210": [[12, 149] * 8] * 12,
}
ADE_VAL = {
    "ADE_val_00000001": [[*range(149, -1, -1), 255]] * 10,
    "ADE_val_00002000": [[149] * 12 + [255] * 4] * 10,
}

# Train ids of 0..182: 0 and the eleven unused ids 12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91 are void.
COCO_ROW = [
    *(255, *range(0, 11), 255, *range(11, 24), 255, 24, 25, 255, 255, *range(26, 40), 255),  # up to 45
    *(*range(40, 60), 255, 60, 255, 255, 61, 255, *range(62, 73), 255, *range(73, 80), 255, *range(80, 171)),
]
COCO_TRAIN = {
    "COCO_train2014_000000000077": [COCO_ROW] * 9,
    "COCO_train2014_000000000113": [[0] * 8 + [255] * 8 + [170] * 8] * 16,
    "COCO_train2014_000000000127": [[255, 80] * 10] * 30,
}
COCO_VAL = {
    "COCO_train2014_000000000825": [COCO_ROW[::-1]] * 9,
    "COCO_train2014_000000000934": [[255] * 12 + [0, 79, 80, 170]] * 8,
}

VOC_ROW = [*range(21), 255, 255, 255] + [15] * 16
VOC_TRAIN = {
    "2007_000032": [VOC_ROW] * 24,
    "2007_000039": [[0] * 10 + [255] * 2 + [20] * 12] * 40,
    "2007_000063": [[255] * 2 + [9] * 20 + [12] * 8] * 20,
}
VOC_VAL = {"2007_000033": [VOC_ROW[::-1]] * 24, "2007_000042": [[0] * 28 + [255] * 2 + [19] * 10] * 24}
VOC_ONLY_IN_SBD = {
    "2008_000008": [[0] * 10 + [13] * 10 + [15] * 10] * 20,
    "2008_000015": [[5] * 7 + [0] * 13] * 36,
}

# EndoVis on a grid of 9 x 16 cells. Per sequence: the cells of rows 2, 4 and 6 from column 1, and the cell of row 8.
PARTS = {
    1: ([1, 4, 2, 2, 3, 3, 2, 3, 3], [1, 2, 3, 3], [4, 4, 4], 1),
    2: ([1, 4, 2, 2, 3, 3, 2, 3, 3], [], [4, 4, 4], 1),
    3: ([1, 1, 2, 2, 3, 3, 2, 3, 3], [], [], 1),
    4: ([1, 1, 2, 2, 3, 3, 2, 3, 3], [1, 2, 3, 3], [], 1),
    5: ([1, 1, 2, 2, 3, 3, 2, 3, 3], [1, 2, 3, 3], [], 1),
    6: ([1, 1, 2, 2, 3, 3, 2, 3, 3], [1, 2, 3, 3, 2], [], 1),
    7: ([1, 1, 2, 2, 3, 3, 2, 3, 3], [], [], 1),
    8: ([1, 1, 2, 2, 3, 3, 2, 3, 3], [1, 2, 3, 3, 2], [], 1),
}
TYPES = {
    1: ([2, 7, 2, 2, 2, 2, 1, 1, 2], [2, 2, 2, 2], [7, 7, 7], 2),
    2: ([2, 7, 2, 2, 2, 2, 2, 2, 2], [], [7, 7, 7], 2),
    3: ([3, 3, 3, 3, 3, 3, 3, 3, 3], [], [], 3),
    4: ([3, 3, 3, 3, 3, 3, 3, 3, 3], [2, 2, 2, 2], [], 3),
    5: ([1, 1, 5, 5, 5, 5, 5, 5, 5], [4, 4, 4, 4], [], 1),
    6: ([3, 3, 6, 6, 6, 6, 6, 6, 6], [2, 2, 2, 3, 3], [], 3),
    7: ([1, 1, 4, 4, 4, 4, 4, 4, 4], [], [], 1),
    8: ([1, 1, 5, 5, 5, 5, 5, 5, 6], [6, 6, 6, 6, 5], [], 1),
}
BINARY = {
    1: ([1] * 9, [1] * 4, [1] * 3, 1),
    2: ([1] * 9, [], [1] * 3, 1),
    3: ([1] * 9, [], [], 1),
    4: ([1] * 9, [1] * 4, [], 1),
    5: ([1] * 9, [1] * 4, [], 1),
    6: ([1] * 9, [1] * 5, [], 1),
    7: ([1] * 9, [], [], 1),
    8: ([1] * 9, [1] * 5, [], 1),
}
# Without the class Other, the cell under it is forceps, and row 6 is empty.
NO_OTHER = {"parts": [1, 1, 2, 2, 3, 3, 2, 3, 3], "type": [2, 2, 2, 2, 2, 2, 1, 1, 2], "binary": [1] * 9}


def endovis_masks(task: str, frames: dict[str, int], other: bool = True) -> dict[str, Any]:
    """Return the expected masks of 32x18 pixels by name; ``frames`` gives the column of the cell in row 8."""
    masks = {}
    for sequence, (second, fourth, sixth, eighth) in {"parts": PARTS, "type": TYPES, "binary": BINARY}[task].items():
        if not other and sixth:
            second, sixth = ([2] * 9 if (task, sequence) == ("type", 2) else NO_OTHER[task]), []
        for frame, column in frames.items():
            grid = np.zeros((9, 16), dtype=np.uint8)
            for row, cells in {2: second, 4: fourth, 6: sixth}.items():
                grid[row, 1 : 1 + len(cells)] = cells
            grid[8, column] = eighth
            masks[f"instrument_dataset_{sequence}/frame{frame}"] = np.kron(grid, np.ones((2, 2), dtype=np.uint8))
    return masks


# --- the cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A data module on a fake, with its expected content."""

    name: str
    fake: Callable[[Path], None]
    data: Callable[..., Any]
    train: dict[str, Any]
    val: dict[str, Any]
    test: list[str]  # test images without labels
    counts: dict[str, int]  # number of images of the official splits
    options: dict[str, Any] = field(default_factory=dict)
    labelled_test: dict[str, Any] = field(default_factory=dict)
    train_mask: str = ""  # file of a training mask
    labels: str = ""  # a folder with training masks

    def make(self, root: Path, **options: Any) -> Any:
        return self.data(root, num_workers=0, **self.options, **options)


CITYSCAPES = dict(
    fake=fakes.cityscapes,
    data=CityscapesData,
    val=CITYSCAPES_VAL,
    test=["berlin_000000_000019", "bielefeld_000000_000321"],
    train_mask="gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png",
    labels="gtFine",
)
BDD = dict(
    data=BDD100KData,
    train=BDD_TRAIN,
    val=BDD_VAL,
    test=["ac6d4f42-00000000", "cabc30fc-e7726578"],
    counts={"train": 7000, "val": 1000, "test": 2000},
)
MAPILLARY = dict(
    data=MapillaryVistasData,
    test=["2nTTdpqRbvXIqeTVEsqPSg", "9aRiCqUOcc-vD3bhcT5cVg"],
    counts={"train": 18000, "val": 2000, "test": 5000},
)
V12 = dict(
    train=dict(zip(MAPILLARY_KEYS, MAPILLARY_V12_TRAIN, strict=True)),
    val=dict(zip(MAPILLARY_VAL_KEYS, MAPILLARY_V12_VAL, strict=True)),
)
V20 = dict(
    train=dict(zip(MAPILLARY_KEYS, MAPILLARY_V20_TRAIN, strict=True)),
    val=dict(zip(MAPILLARY_VAL_KEYS, MAPILLARY_V20_VAL, strict=True)),
)
VOC = dict(
    fake=fakes.pascal_voc,
    data=PascalVOCData,
    val=VOC_VAL,
    test=[],
    labels="VOCdevkit/VOC2012/SegmentationClass",
)
CASES = [
    Case("cityscapes", train=CITYSCAPES_TRAIN, counts={"train": 2975, "val": 500, "test": 1525}, **CITYSCAPES),
    Case(
        "cityscapes-coarse",
        train=dict(sorted((CITYSCAPES_TRAIN | CITYSCAPES_EXTRA).items())),
        counts={"val": 500, "test": 1525},
        options={"coarse": True},
        **CITYSCAPES,
    ),
    Case(
        "bdd100k",
        fakes.bdd100k,
        labels="bdd100k/labels/sem_seg/masks",
        **BDD,
    ),
    Case("bdd100k-legacy", lambda root: fakes.bdd100k(root, layout="legacy"), **BDD),
    Case(
        "mapillary-v1.2",
        fakes.mapillary_vistas,
        train_mask="training/labels/0035fkbjWljhaftpVM37-g.png",
        labels="training/labels",
        **MAPILLARY,
        **V12,
    ),
    Case(
        "mapillary-v1.2-nested",
        lambda root: fakes.mapillary_vistas(root, nested=True),
        train_mask="training/v1.2/labels/0035fkbjWljhaftpVM37-g.png",
        **MAPILLARY,
        **V12,
    ),
    Case(
        "mapillary-v1.2-of-v2.0",
        lambda root: fakes.mapillary_vistas(root, version="v2.0"),
        options={"version": "v1.2"},
        **MAPILLARY,
        **V12,
    ),
    Case(
        "mapillary-v2.0",
        lambda root: fakes.mapillary_vistas(root, version="v2.0"),
        options={"version": "v2.0"},
        train_mask="training/v2.0/labels/0035fkbjWljhaftpVM37-g.png",
        labels="training/v2.0/labels",
        **MAPILLARY,
        **V20,
    ),
    Case(
        "sceneparse150",
        fakes.sceneparse150,
        SceneParse150Data,
        ADE_TRAIN,
        ADE_VAL,
        ["ADE_test_00000001", "ADE_test_00000002"],
        {"train": 20210, "val": 2000},
        train_mask="ADEChallengeData2016/annotations/training/ADE_train_00000002.png",
        labels="ADEChallengeData2016/annotations/training",
    ),
    Case(
        "cocostuff10k",
        fakes.cocostuff10k,
        CocoStuff10kData,
        COCO_TRAIN,
        COCO_VAL,
        [],
        {"train": 9000, "val": 1000},
        train_mask="annotations/COCO_train2014_000000000113.mat",
        labels="annotations",
    ),
    Case(
        "pascal_voc",
        train=VOC_TRAIN,
        counts={"train": 1464, "val": 1449},
        train_mask="VOCdevkit/VOC2012/SegmentationClass/2007_000039.png",
        **VOC,
    ),
    Case(
        "pascal_voc-aug",
        train=VOC_TRAIN | VOC_ONLY_IN_SBD,
        counts={"train": 10582, "val": 1449},
        options={"train_set": "train_aug"},
        train_mask="benchmark_RELEASE/dataset/cls/2008_000015.mat",
        **VOC,
    ),
    *(
        Case(
            f"endovis2017-{task}" + ("" if other else "-without-other"),
            fakes.endovis,
            EndoVis2017Data,
            endovis_masks(task, {"000": 0, "149": 1}, other),
            endovis_masks(task, {"150": 2, "174": 3}, other),
            [],
            {"train": 1200, "val": 200, "test": 400},
            options={"task": task, "other": other, "crop_to_camera": False},
            labelled_test=endovis_masks(task, {"175": 4, "224": 5}, other),
            train_mask="instrument_dataset_1/ground_truth/Right_Prograsp_Forceps_labels/frame149.png",
            labels="instrument_dataset_5/ground_truth",
        )
        for task in ("parts", "binary", "type")
        for other in (True, False)
    ),
]
BY_NAME = {one.name: one for one in CASES}
WITHHELD = [one for one in CASES if not one.labelled_test]
# Only one task of EndoVis, since all tasks read the same files.
DAMAGED = [one for one in CASES if one.train_mask and ("endovis" not in one.name or one.name == "endovis2017-parts")]
# One case of each benchmark.
FIRST = [
    BY_NAME[name]
    for name in (
        *("cityscapes", "bdd100k", "mapillary-v1.2", "sceneparse150", "cocostuff10k", "pascal_voc", "endovis2017-parts"),
    )
]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda one: one.name)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Root of a case's fake, built once per module and read only."""
    roots: dict[Any, Path] = {}

    def root(case):
        if case.name not in roots:
            roots[case.name] = tmp_path_factory.mktemp("fake")
            case.fake(roots[case.name])
        return roots[case.name]

    return root


@pytest.fixture
def fresh(tmp_path):
    """Root of a case's fake, built for one test, which may change it."""

    def root(case):
        case.fake(tmp_path / "data")
        return tmp_path / "data"

    return root


def names(data, split):
    return [sample.name for sample in data.samples(split)]


def sample_of(data, split, name):
    return next(sample for sample in data.samples(split) if sample.name == name)


def counted(masks, num_classes):
    """Count the pixels of each class in the expected masks."""
    labelled = np.concatenate([np.asarray(mask).ravel() for mask in masks.values()])
    assert {*np.unique(labelled)} <= {*range(num_classes), 255}
    return [int((labelled == index).sum()) for index in range(num_classes)]


def warnings_of(action, *args):
    """Call ``action`` and return the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action(*args)
    return [str(warning.message) for warning in caught]


def error_of(action, *args):
    """Call ``action``, expect a DataError and return its text, which must be one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError) as caught:
            action(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- all benchmarks ----------------------------------------------------------------------------------------------------


@each(CASES)
def test_splits(case, built):
    data = case.make(built(case))
    assert names(data, "train") == list(case.train)
    assert names(data, "val") == list(case.val)
    assert names(data, "test") == case.test + list(case.labelled_test)
    samples = [sample for split in ("train", "val", "test") for sample in data.samples(split)]
    assert len({sample.name for sample in samples}) == len(samples)
    assert len({sample.image for sample in samples}) == len(samples)
    assert all(sample.image.is_file() for sample in samples)
    if case.test:
        assert [sample.mask for sample in data.samples("test")] == [None] * len(case.test)


@each(CASES)
def test_masks_and_images_have_the_expected_values(case, built):
    data = case.make(built(case))
    for split, expected in {"train": case.train, "val": case.val, "test": case.labelled_test}.items():
        for name, mask in expected.items():
            sample = sample_of(data, split, name)
            image, ids = data.reader.pair(sample)
            assert ids.dtype == torch.uint8
            assert ids.tolist() == np.asarray(mask).tolist(), name
            assert torch.equal(data.reader.mask(sample), ids)
            with Image.open(sample.image) as file:
                assert image.permute(1, 2, 0).tolist() == np.asarray(file.convert("RGB")).tolist()
            data.reader.verify(sample)


@each(CASES)
def test_class_pixels(case, built):
    data = case.make(built(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = data.class_pixels()
    assert counts.dtype == torch.int64
    assert counts.tolist() == counted(case.train, data.num_classes)


def test_class_pixels_equal_a_count_by_hand(built):
    """Cityscapes without NumPy: 22 rows of all ids, 12 rows of quarters twice, 24 rows of four labels."""
    data = BY_NAME["cityscapes"].make(built(BY_NAME["cityscapes"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = data.class_pixels().tolist()
    once = 22
    assert counts == [
        *(3 * 22 + 120 + 120, 2 * 22 + 120, once, once, once, once, once, once, once + 120, once, once + 120),
        *(once + 120, once + 120, 2 * 22 + 120, once, once, once + 480, once, 2 * 22 + 240),
    ]


@pytest.mark.parametrize(
    "cases",
    [
        ["cityscapes", "cityscapes-coarse"],
        ["mapillary-v1.2-of-v2.0", "mapillary-v2.0"],
        ["pascal_voc", "pascal_voc-aug"],
        [one.name for one in CASES if one.name.startswith("endovis")],
    ],
    ids=lambda cases: cases[0],
)
def test_cache_separates_counts_of_one_root(built, tmp_path, cases):
    root = built(BY_NAME[cases[0]])
    for _ in range(2):  # first counted, then read from the cache
        for case in map(BY_NAME.get, cases):
            data = case.make(root, cache_dir=tmp_path / "counts")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert data.class_pixels().tolist() == counted(case.train, data.num_classes)


@each(CASES)
def test_reader_can_be_pickled(case, built):
    data = case.make(built(case))
    reader = pickle.loads(pickle.dumps(data.reader))
    name, mask = next(iter(case.val.items()))
    assert reader.mask(sample_of(data, "val", name)).tolist() == np.asarray(mask).tolist()


@each(CASES)
def test_counts_that_differ_from_the_official_ones_are_reported(case, built):
    data = case.make(built(case))
    counts = {"train": len(case.train), "val": len(case.val), "test": len(case.test + list(case.labelled_test))}
    texts = warnings_of(data.setup, "fit")
    for split, official in case.counts.items():
        line = re.compile(rf"\b{counts[split]} images\b.*\bofficial\b.*\b{official}\b")
        assert [text for text in data.remarks(split) if line.search(text)], (split, data.remarks(split))
        assert any(line.search(text) for text in texts) == (split != "test")


def test_official_count_is_not_reported(camvid_root):
    for index in range(99):  # the fake has two of 101
        for folder in ("val", "valannot"):
            shutil.copy(camvid_root / folder / "0016E5_07959.png", camvid_root / folder / f"0016E5_1{index:04d}.png")
    data = CamVidData(camvid_root, num_workers=0)
    assert data.remarks("val") == []
    assert warnings_of(data.setup, "validate") == []
    assert [line for line in data.remarks("train") if re.search(r"\b3 images\b.*official.*\b367\b", line)]


@each(WITHHELD)
def test_validation_split_replaces_a_test_split_without_labels(case, built):
    data = case.make(built(case))
    with pytest.warns(UserWarning, match="validation split"):
        data.setup("test")
    batches = list(data.test_dataloader())
    assert [batch["name"] for batch in batches] == [[name] for name in case.val]
    assert [batch["mask"][0].tolist() for batch in batches] == [np.asarray(mask).tolist() for mask in case.val.values()]
    assert batches[0]["mask"].dtype == torch.int64


@each([one for one in CASES if one.labelled_test])
def test_public_test_labels_are_used(case, built):
    data = case.make(built(case))
    assert not [text for text in warnings_of(data.setup, "test") if "validation split" in text]
    batches = {batch["name"][0]: batch["mask"][0].tolist() for batch in data.test_dataloader()}
    assert batches == {name: mask.tolist() for name, mask in case.labelled_test.items()}


@each(CASES)
def test_predict_reads_test_images_without_masks(case, built):
    data = case.make(built(case))
    expected = case.test or list(case.labelled_test) or list(case.val)
    warnings_of(data.setup, "predict")
    batches = list(data.predict_dataloader())
    assert [batch["name"] for batch in batches] == [[name] for name in expected]
    for batch, sample in zip(batches, data.samples("test") or data.samples("val"), strict=True):
        assert set(batch) == {"image", "name", "size", "tags"}
        assert batch["tags"] == [{}]  # no georeference
        with Image.open(sample.image) as file:
            assert batch["size"] == [(file.height, file.width)]
            assert batch["image"][0].permute(1, 2, 0).tolist() == np.asarray(file.convert("RGB")).tolist()


@each(FIRST)
def test_training_batches(case, built):
    data = case.make(built(case), batch_size=2, crop_size=(12, 16), max_class_share=1.0)
    warnings_of(data.setup, "fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 12, 16)
    assert batch["mask"].shape == (2, 12, 16)
    for name, mask in zip(batch["name"], batch["mask"], strict=True):
        assert set(mask.unique().tolist()) <= set(np.unique(case.train[name]).tolist()) | {255}


ROOTS = {
    "camvid": (CamVidData, "trainannot"),
    "cityscapes": (CityscapesData, "leftImg8bit/train"),
    "bdd100k": (BDD100KData, "images/10k/train"),
    "mapillary_vistas": (MapillaryVistasData, "training/images"),
    "sceneparse150": (SceneParse150Data, "images/training"),
    "cocostuff10k": (CocoStuff10kData, "annotations/"),
    "pascal_voc": (PascalVOCData, "VOCdevkit/VOC2012/SegmentationClass"),
    "endovis2017": (EndoVis2017Data, "/left_frames/"),
}


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("present", [False, True], ids=["missing", "of-something-else"])
def test_root_without_the_benchmark(tmp_path, name, present):
    data, tree = ROOTS[name]
    root = tmp_path / "not here"
    if present:
        write_png(root / "holiday" / "beach.png", np.zeros((3, 4, 3), dtype=np.uint8))
    for action in (lambda: data(root).samples("train"), lambda: data(root).setup("fit")):
        text = error_of(action)
        assert str(root) in text
        assert tree in text
        assert f"mcseg download {name}" in text


@pytest.mark.parametrize("name", ROOTS)
def test_missing_root_setting(name):
    data, tree = ROOTS[name]
    text = error_of(lambda: data().setup("fit"))
    assert "data.root" in text
    assert tree in text
    assert f"mcseg download {name}" in text


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("bdd100k", "bdd100k"),
        ("bdd100k-legacy", "bdd100k"),
        ("sceneparse150", "ADEChallengeData2016"),
        ("pascal_voc", "VOCdevkit"),
        ("pascal_voc", "VOCdevkit/VOC2012"),
        ("pascal_voc-aug", "VOCdevkit"),
        ("pascal_voc-aug", "VOCdevkit/VOC2012"),
    ],
)
def test_root_may_be_an_inner_folder(built, name, inner):
    case = BY_NAME[name]
    outer, data = case.make(built(case)), case.make(built(case) / inner)
    for split in ("train", "val", "test"):
        assert [(s.name, s.image.resolve()) for s in data.samples(split)] == [
            (s.name, s.image.resolve()) for s in outer.samples(split)
        ]
    for name, mask in case.train.items():
        assert data.reader.mask(sample_of(data, "train", name)).tolist() == np.asarray(mask).tolist()


def test_camvid_root_may_be_the_parent_folder(camvid_root):
    outer, inner = (CamVidData(root, num_workers=0) for root in (camvid_root.parent, camvid_root))
    for split in ("train", "val"):
        assert names(outer, split) == names(inner, split) != []
    assert outer.reader.mask(outer.samples("val")[0]).tolist() == [[*range(11), 255]] * 9


# --- damage ------------------------------------------------------------------------------------------------------------


@each(DAMAGED)
def test_missing_mask_is_an_error(case, fresh):
    root = fresh(case)
    (root / case.train_mask).unlink()
    text = error_of(case.make(root).setup, "fit")
    assert Path(case.train_mask).name in text
    assert Path(case.train_mask).parent.name in text
    assert "below the root; `mcseg download " in text


@each([one for one in DAMAGED if one.labels])
def test_missing_folder_of_masks_is_an_error(case, fresh):
    root = fresh(case)
    shutil.rmtree(root / case.labels)
    text = error_of(case.make(root).setup, "fit")
    # Mapillary's labels may be in either of two folders.
    expected = "labels" if "mapillary" in case.name else case.labels.removeprefix("VOCdevkit/VOC2012/")
    assert expected in text


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("cocostuff10k", "images/COCO_train2014_000000000113.jpg"),
        ("pascal_voc", "VOCdevkit/VOC2012/JPEGImages/2007_000063.jpg"),
        ("pascal_voc-aug", "VOCdevkit/VOC2012/JPEGImages/2008_000008.jpg"),
    ],
)
def test_missing_listed_image_is_an_error(fresh, name, listed):
    case = BY_NAME[name]
    root = fresh(case)
    (root / listed).unlink()
    assert Path(listed).name in error_of(case.make(root).setup, "fit")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("cocostuff10k", "imageLists/train.txt"),
        ("pascal_voc", "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"),
        ("pascal_voc", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"),
        ("pascal_voc-aug", "benchmark_RELEASE/dataset/train.txt"),
    ],
)
def test_missing_list_is_an_error(fresh, name, path):
    case = BY_NAME[name]
    root = fresh(case)
    (root / path).unlink()
    assert path.removeprefix("VOCdevkit/VOC2012/") in error_of(case.make(root).setup, "fit")


UNKNOWN = [
    ("cityscapes", "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png", 34),
    ("cityscapes", "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png", 254),
    ("cityscapes-coarse", "gtCoarse/train_extra/augsburg/augsburg_000000_000020_gtCoarse_labelIds.png", 34),
    ("bdd100k", "bdd100k/labels/sem_seg/masks/train/0000f77c-6257be58.png", 19),
    ("bdd100k-legacy", "bdd100k/seg/labels/train/0000f77c-6257be58_train_id.png", 40),
    ("mapillary-v1.2", "training/labels/0035fkbjWljhaftpVM37-g.png", 66),
    ("mapillary-v2.0", "training/v2.0/labels/0035fkbjWljhaftpVM37-g.png", 124),
    ("sceneparse150", "ADEChallengeData2016/annotations/training/ADE_train_00000001.png", 151),
    # Masks with ids already lowered by one and void as 255: every value has another meaning
    ("sceneparse150", "ADEChallengeData2016/annotations/training/ADE_train_00000001.png", 255),
    ("cocostuff10k", "annotations/COCO_train2014_000000000127.mat", 255),
    ("mapillary-v1.2", "training/labels/0035fkbjWljhaftpVM37-g.png", 255),
    ("endovis2017-parts", "instrument_dataset_1/ground_truth/Left_Prograsp_Forceps_labels/frame000.png", 255),
    ("cocostuff10k", "annotations/COCO_train2014_000000000127.mat", 183),
    ("cocostuff10k", "annotations/COCO_train2014_000000000127.mat", 257),  # 1 if cut to eight bits
    ("pascal_voc", "VOCdevkit/VOC2012/SegmentationClass/2007_000039.png", 21),
    ("pascal_voc-aug", "benchmark_RELEASE/dataset/cls/2008_000008.mat", 21),
    ("endovis2017-parts", "instrument_dataset_1/ground_truth/Left_Prograsp_Forceps_labels/frame000.png", 50),
    ("endovis2017-type", "instrument_dataset_1/ground_truth/Left_Prograsp_Forceps_labels/frame000.png", 50),
    ("endovis2017-binary", "instrument_dataset_1/ground_truth/Left_Prograsp_Forceps_labels/frame000.png", 50),
]


@pytest.mark.parametrize(("name", "path", "value"), UNKNOWN, ids=lambda value: Path(str(value)).name)
def test_unknown_mask_value_is_an_error(fresh, name, path, value):
    case = BY_NAME[name]
    root = fresh(case)
    data = case.make(root)
    stem = re.split(r"_gt|_train_id", Path(path).stem)[0]
    sample = next(sample for sample in data.samples("train") if sample.name.endswith(stem))
    data.reader.mask(sample)
    file = root / path
    ids = np.full(tuple(data.reader.image(sample).shape[1:]), 0, dtype=np.uint16 if value > 255 else np.uint8)
    ids[1, 2] = value
    if name == "cocostuff10k":
        fakes.cocostuff_mat(file, ids)
    elif file.suffix == ".mat":
        fakes.write_mat(file, {"GTcls": {"Segmentation": ids}})
    elif "mapillary" in name or name == "pascal_voc":
        fakes.write_palette_png(file, ids, fakes.VOC_COLORS)
    else:
        write_png(file, ids)
    text = error_of(data.reader.mask, sample)
    assert Path(path).name in text
    assert re.search(rf"\b{value}\b", text)


@each(DAMAGED)
def test_transposed_mask_is_an_error(case, fresh):
    root = fresh(case)
    file = root / case.train_mask
    data = case.make(root)
    stem = re.split(r"_gt", file.stem)[0]
    sample = next(sample for sample in data.samples("train") if sample.name.endswith(stem))
    height, width = data.reader.image(sample).shape[1:]
    assert height != width
    ids = np.full((width, height), min(data.reader.table.raw_ids), dtype=np.uint8)
    if case.name == "cocostuff10k":
        fakes.cocostuff_mat(file, ids.astype(np.uint16))
    elif file.suffix == ".mat":
        fakes.write_mat(file, {"GTcls": {"Segmentation": ids}})
    else:
        write_png(file, ids)
    actions = [lambda: data.reader.pair(sample)]
    if file.suffix != ".mat":  # .mat files have no header with the size
        actions.append(lambda: data.setup("fit"))
    for action in actions:
        text = error_of(action)
        assert file.name in text
        assert f"{height}x{width}" in text
        assert f"{width}x{height}" in text


# --- Cityscapes --------------------------------------------------------------------------------------------------------


def test_cityscapes_coarse_labels_extend_only_the_training_split(built):
    root = built(BY_NAME["cityscapes"])
    fine, coarse = CityscapesData(root, num_workers=0), CityscapesData(root, coarse=True, num_workers=0)
    added = [sample for sample in coarse.samples("train") if sample not in fine.samples("train")]
    assert [sample.name for sample in added] == ["augsburg_000000_000020", "troisdorf_000000_000072"]
    assert coarse.samples("val") == fine.samples("val")
    assert coarse.samples("test") == fine.samples("test")


def test_cityscapes_missing_coarse_labels(tmp_path):
    fakes.cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "gtCoarse")
    CityscapesData(tmp_path, num_workers=0).samples("train")
    assert "gtCoarse" in error_of(CityscapesData(tmp_path, coarse=True, num_workers=0).setup, "fit")


def test_cityscapes_scores_equal_the_official_scores(built, tmp_path):
    evaluation = official("evaluation.evalPixelLevelSemanticLabeling")
    data = CityscapesData(built(BY_NAME["cityscapes"]), num_workers=0)
    generator = np.random.default_rng(3)
    predictions, targets, files, metric = [], [], [], SegmentationScores(19)
    for sample in data.samples("val"):
        target = data.reader.mask(sample)
        guess = torch.from_numpy(generator.integers(0, 19, tuple(target.shape)))
        guess[guess == 16] = 13  # train is neither predicted nor in the target: both means leave it out
        keep = torch.from_numpy(generator.random(tuple(target.shape)) < 0.6) & (target != 255)
        guess[keep] = target[keep].long()
        files.append(str(tmp_path / "results" / f"{sample.name}_pred.png"))
        write_png(Path(files[-1]), np.array(CITYSCAPES_IDS, dtype=np.uint8)[guess.numpy()])
        metric.update(guess[None], target[None])
        predictions.append(guess)
        targets.append(target)

    settings = evaluation.CArgs()
    vars(settings).update(vars(evaluation.args))
    settings.evalInstLevelScore = False
    settings.JSONOutput = False
    settings.quiet = True
    settings.evalLabels = []
    settings.exportFile = str(tmp_path / "result.json")
    theirs = evaluation.evaluateImgLists(files, [str(sample.mask) for sample in data.samples("val")], settings)
    for ours in (metric.scores(), score(torch.cat(predictions), torch.cat(targets), 19)):
        assert ours.miou == pytest.approx(theirs["averageScoreClasses"], rel=0, abs=1e-9)
        expected = [theirs["classScores"][name] for name in data.class_names]
        assert ours.iou.tolist() == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True)
        assert ours.iou.isnan().tolist() == [index == 16 for index in range(19)]
        assert ours.iou[14] == 0  # trucks are predicted but absent
        assert 0.3 < ours.miou < 0.9
    assert not (tmp_path / "result.json").exists()


def test_cityscapes_ids_equal_those_of_cityscapesscripts():
    data = CityscapesData("anywhere")
    labels = [label for label in official("helpers.labels").labels if label.id >= 0]
    assert len(labels) == 34
    assert data.reader.table.raw_ids == {label.id: label.trainId for label in labels} | {255: 255}
    evaluated = sorted((label for label in labels if not label.ignoreInEval), key=lambda label: label.trainId)
    assert data.class_names == tuple(label.name for label in evaluated)
    assert data.palette == tuple(label.color for label in evaluated)


def official(module):
    """Import a module of cityscapesscripts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"cityscapesscripts.{module}")


# --- BDD100K -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["2021", "legacy"])
def test_bdd100k_images_and_masks_without_partner_are_skipped_and_reported(tmp_path, layout):
    fakes.bdd100k(tmp_path, layout=layout, orphans=True)
    data = BDD100KData(tmp_path, num_workers=0)
    assert names(data, "train") == list(BDD_TRAIN)
    assert names(data, "val") == list(BDD_VAL)
    texts = warnings_of(data.setup, "fit")
    for split, image, mask in (
        ("train", "3d581db5-2564fb7e", "fee92217-63b3f87f"),
        ("val", "80a9e37d-e4548ac1", "ff55861e-a06b953c"),
    ):
        for orphan, other in ((image, mask), (mask, image)):
            assert len([line for line in data.remarks(split) if orphan in line and other not in line]) == 1
            assert any(orphan in text for text in texts)
    batches = [batch["name"][0] for batch in data.val_dataloader()]
    assert batches == list(BDD_VAL)


def test_bdd100k_with_complete_pairs_only_reports_the_count(built):
    data = BY_NAME["bdd100k"].make(built(BY_NAME["bdd100k"]))
    assert len(data.remarks("train")) == 1
    assert len(data.remarks("test")) == 1


def test_bdd100k_transposed_mask(tmp_path):
    fakes.bdd100k(tmp_path)
    file = tmp_path / "bdd100k/labels/sem_seg/masks/val/7d06fefd-f7be05a6.png"
    write_png(file, np.zeros((32, 18), dtype=np.uint8))
    text = error_of(BDD100KData(tmp_path, num_workers=0).setup, "validate")
    assert all(part in text for part in (file.name, "32x18", "18x32"))


# --- Mapillary Vistas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "nested", "config", "config_name"),
    [
        ("v1.2", False, True, "config.json"),
        ("v1.2", False, True, "config_v1.2.json"),
        ("v1.2", False, False, ""),
        ("v1.2", True, True, ""),
        ("v1.2", True, False, ""),
        ("v2.0", True, True, ""),
        ("v2.0", True, False, ""),
    ],
)
def test_mapillary_matching_or_missing_configuration(tmp_path, version, nested, config, config_name):
    fakes.mapillary_vistas(tmp_path, version, nested, config, config_name)
    data = MapillaryVistasData(tmp_path, version=version, num_workers=0)
    warnings_of(data.setup, "fit")
    assert names(data, "train") == MAPILLARY_KEYS


@pytest.mark.parametrize(
    ("version", "nested", "config_name", "file", "position", "found", "expected"),
    [
        ("v1.2", False, "config.json", "config.json", 13, ("service-lane", "Service Lane"), ("flat--road", "Road")),
        (
            "v1.2",
            False,
            "config_v1.2.json",
            "config_v1.2.json",
            13,
            ("service-lane", "Service Lane"),
            ("flat--road", "Road"),
        ),
        ("v1.2", True, "", "config_v1.2.json", 13, ("service-lane", "Service Lane"), ("flat--road", "Road")),
        (
            *("v2.0", True, "", "config_v2.0.json", 90),
            ("object--traffic-light--cyclists", "Traffic Light - Cyclists"),
            ("object--traffic-light--general-single", "Traffic Light - General (Single)"),
        ),
    ],
)
def test_mapillary_configuration_with_another_order(tmp_path, version, nested, config_name, file, position, found, expected):
    fakes.mapillary_vistas(tmp_path, version, nested, "wrong", config_name)
    text = error_of(lambda: MapillaryVistasData(tmp_path, version=version, num_workers=0).setup("fit"))
    assert str(tmp_path / file) in text
    assert re.search(rf"\b{position}\b", text)
    assert any(name in text for name in found)
    assert any(name in text for name in expected)


def test_mapillary_configuration_with_fewer_labels(tmp_path):
    fakes.mapillary_vistas(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["labels"] = content["labels"][:60]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert "config.json" in error_of(lambda: MapillaryVistasData(tmp_path, num_workers=0).setup("fit"))


@pytest.mark.parametrize("damage", ["{", "[]", '{"labels": 3}', '{"labels": [{"evaluate": true}]}'])
def test_mapillary_unreadable_configuration(tmp_path, damage):
    fakes.mapillary_vistas(tmp_path)
    (tmp_path / "config.json").write_text(damage)
    assert "config.json" in error_of(lambda: MapillaryVistasData(tmp_path, num_workers=0).setup("fit"))


@pytest.mark.parametrize("nested", [False, True])
def test_mapillary_without_v2_labels(tmp_path, nested):
    fakes.mapillary_vistas(tmp_path, nested=nested)
    text = error_of(lambda: MapillaryVistasData(tmp_path, version="v2.0", num_workers=0).setup("fit"))
    assert "v2.0" in text
    assert str(tmp_path) in text


def test_mapillary_unknown_version():
    assert "data.version: found v3.0" in error_of(lambda: MapillaryVistasData("anywhere", version="v3.0"))


@pytest.mark.parametrize(
    ("name", "labels"), [("mapillary_vistas", "v3.0"), ("mapillary_vistas", None), ("camvid", "classes")]
)
def test_unknown_label_set(name, labels):
    assert f"data.labels: found {labels}" in error_of(lambda: BenchmarkData(name, "anywhere", labels=labels))


# --- PASCAL VOC and COCO-Stuff -----------------------------------------------------------------------------------------


def test_voc_test_list(tmp_path):
    fakes.pascal_voc(tmp_path, test=True)
    data = PascalVOCData(tmp_path, num_workers=0)
    assert [(sample.name, sample.mask) for sample in data.samples("test")] == [("2008_000006", None), ("2008_000011", None)]
    assert any("the official one has 1456" in line for line in data.remarks("test"))
    warnings_of(data.setup, "predict")
    assert [batch["name"] for batch in data.predict_dataloader()] == [["2008_000006"], ["2008_000011"]]
    with pytest.warns(UserWarning, match="validation split"):
        data.setup("test")
    assert [batch["name"] for batch in data.test_dataloader()] == [["2007_000033"], ["2007_000042"]]


def test_voc_augmentation_excludes_validation_and_keeps_voc_masks(built):
    data = BY_NAME["pascal_voc-aug"].make(built(BY_NAME["pascal_voc-aug"]))
    assert not {*names(data, "train")} & {*names(data, "val")}
    masks = {sample.name: sample.mask.name for sample in data.samples("train")}
    assert masks == {
        "2007_000032": "2007_000032.png",
        "2007_000039": "2007_000039.png",
        "2007_000063": "2007_000063.png",
        "2008_000008": "2008_000008.mat",
        "2008_000015": "2008_000015.mat",
    }


def test_voc_without_sbd(tmp_path):
    fakes.pascal_voc(tmp_path, sbd=False)
    assert names(PascalVOCData(tmp_path), "train") == list(VOC_TRAIN)
    text = error_of(PascalVOCData(tmp_path, train_set="train_aug", num_workers=0).setup, "fit")
    assert "benchmark_RELEASE" in text


def test_voc_unknown_training_set(tmp_path):
    fakes.pascal_voc(tmp_path)
    text = error_of(lambda: PascalVOCData(tmp_path, train_set="train_all").samples("train"))
    assert "train_all" in text
    assert "train_aug" in text


def test_file_that_is_not_a_matlab_file(fresh):
    for name, path in (
        ("cocostuff10k", "annotations/COCO_train2014_000000000113.mat"),
        ("pascal_voc-aug", "benchmark_RELEASE/dataset/cls/2008_000008.mat"),
    ):
        case = BY_NAME[name]
        root = fresh(case)
        data = case.make(root)
        sample = sample_of(data, "train", Path(path).stem)
        content = (root / path).read_bytes()
        for damage in (content[:100], content[:190], b"", b"no such thing" * 100):
            (root / path).write_bytes(damage)
            assert Path(path).name in error_of(data.reader.mask, sample)
        fakes.write_mat(root / path, {"T": np.zeros((3, 4))})
        assert Path(path).name in error_of(data.reader.mask, sample)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64])
def test_cocostuff_maps_of_any_number_type(fresh, dtype):
    case = BY_NAME["cocostuff10k"]
    root = fresh(case)
    fakes.cocostuff_mat(root / "annotations/COCO_train2014_000000000127.mat", fakes.rows([91, 92, 0, 182] * 5, 30, dtype))
    data = case.make(root)
    mask = data.reader.mask(sample_of(data, "train", "COCO_train2014_000000000127"))
    assert mask.tolist() == [[255, 80, 255, 170] * 5] * 30


# --- EndoVis 2017 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def surgery(tmp_path_factory):
    """Training archives with one frame per range, and test archives; read only."""
    root = tmp_path_factory.mktemp("endovis")
    fakes.endovis(root / "train", frames=("000", "150", "175"))
    fakes.endovis_test(root / "test")
    return root


def endovis(root, **options):
    return EndoVis2017Data(root, num_workers=0, **({"crop_to_camera": False} | options))


@pytest.mark.parametrize(("fold", "held_out"), [(0, [1, 3]), (1, [2, 5]), (2, [4, 8]), (3, [6, 7])])
def test_endovis_folds(surgery, fold, held_out):
    data = endovis(surgery / "train", split=f"fold{fold}")
    frames = ["000", "150", "175"]
    rest = [sequence for sequence in range(1, 9) if sequence not in held_out]
    assert names(data, "train") == [f"instrument_dataset_{s}/frame{f}" for s in rest for f in frames]
    assert names(data, "val") == [f"instrument_dataset_{s}/frame{f}" for s in held_out for f in frames]
    assert names(data, "test") == []
    assert any("1350" in line for line in data.remarks("train"))
    assert any("450" in line for line in data.remarks("val"))
    with pytest.warns(UserWarning, match="validation split"):
        data.setup("test")


@pytest.mark.parametrize("split", ["frames", "fold2"])
@pytest.mark.parametrize(
    ("task", "other", "row"),
    [
        ("parts", True, [0, 1, 2, 3, 3, 0, 0, 0]),
        ("parts", False, [0, 1, 2, 3, 3, 0, 0, 0]),
        ("binary", True, [0, 1, 1, 1, 1, 0, 0, 0]),
        ("type", True, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("type", False, [0, 1, 2, 3, 4, 5, 6, 0]),
    ],
)
def test_endovis_official_test_labels(surgery, split, task, other, row):
    data = endovis(surgery / "train", split=split, task=task, other=other, test_root=surgery / "test")
    expected = [f"instrument_dataset_{s}/frame{f}" for s in range(1, 9) for f in (225, 226)]
    expected += [f"instrument_dataset_{s}/frame{f}" for s in (9, 10) for f in ("000", "001")]
    assert names(data, "test") == sorted(expected)
    assert not {*names(data, "test")} & {*names(data, "train"), *names(data, "val")}
    for sample in data.samples("test"):
        image, mask = data.reader.pair(sample)
        assert mask.tolist() == [[value for cell in row + [0] * 8 for value in (cell, cell)]] * 2 + [[0] * 32] * 16
        sequence, frame = re.fullmatch(r"instrument_dataset_(\d+)/frame(\d+)", sample.name).groups()
        assert image[:, 5, 5].tolist() == [20 * int(sequence), int(frame), 200]
    assert not [text for text in warnings_of(data.setup, "test") if "validation split" in text]
    assert [batch["name"][0] for batch in data.test_dataloader()] == sorted(expected)
    # The training split still uses the values of the training archives
    assert 3 in data.reader.mask(sample_of(data, "train", "instrument_dataset_6/frame000")) or task == "binary"


@pytest.mark.parametrize("labels", ["instrument_2017_test/instrument_2017_test", "instrument_2017_test"])
def test_endovis_official_test_sequences(tmp_path, surgery, labels):
    fakes.endovis_test(tmp_path / "test", labels=labels, count=1)
    data = endovis(surgery / "train", test_root=tmp_path / "test", test_sequences=[3, 9])
    assert names(data, "test") == ["instrument_dataset_3/frame225", "instrument_dataset_9/frame000"]
    assert data.reader.mask(data.samples("test")[1])[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3] + [0] * 22


@pytest.mark.parametrize(("task", "value"), [("parts", 10), ("binary", 1), ("type", 8)])
def test_endovis_unknown_values_in_official_test_labels(tmp_path, surgery, task, value):
    fakes.endovis_test(tmp_path / "test")
    folder = {"parts": "PartsSegmentation", "binary": "BinarySegmentation", "type": "TypeSegmentation"}[task]
    labels = tmp_path / "test/instrument_2017_test/instrument_2017_test"
    write_png(labels / "instrument_dataset_2" / folder / "frame226.png", np.full((18, 32), value, dtype=np.uint8))
    data = endovis(surgery / "train", task=task, test_root=tmp_path / "test")
    text = error_of(data.reader.mask, sample_of(data, "test", "instrument_dataset_2/frame226"))
    assert "frame226.png" in text
    assert re.search(rf"\b{value}\b", text)


def test_endovis_class_names():
    parts = ("background", "shaft", "wrist", "claspers", "probe")
    types = (
        *("background", "bipolar_forceps", "prograsp_forceps", "large_needle_driver", "vessel_sealer"),
        *("grasping_retractor", "monopolar_curved_scissors", "other"),
    )
    for task, other, expected in (
        ("parts", True, parts),
        ("parts", False, parts[:4]),
        ("type", True, types),
        ("type", False, types[:7]),
        ("binary", True, ("background", "instrument")),
        ("binary", False, ("background", "instrument")),
    ):
        data = EndoVis2017Data("anywhere", task=task, other=other)
        assert data.class_names == expected
        assert data.num_classes == len(data.palette) == len(expected)
    assert EndoVis2017Data("anywhere").class_names == parts


@pytest.mark.parametrize(
    ("option", "value"), [("task", "colours"), ("split", "fold4"), ("test_sequences", [3, 11])], ids=str
)
def test_endovis_invalid_settings(surgery, option, value):
    def use():
        data = endovis(surgery / "train", test_root=surgery / "test", **{option: value})
        data.setup("fit")
        data.setup("test")

    text = error_of(use)
    assert (value if isinstance(value, str) else "11") in text


def test_endovis_counts_change_with_any_instrument(tmp_path):
    fakes.endovis(tmp_path, frames=("000", "150"))
    masks = endovis_masks("parts", {"000": 0})
    for value in (None, 40):
        if value:
            ids = np.full((18, 32), value, dtype=np.uint8)
            write_png(tmp_path / "instrument_dataset_6/ground_truth/Right_Large_Needle_Driver_labels/frame000.png", ids)
            masks["instrument_dataset_6/frame000"] = np.full((18, 32), 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert endovis(tmp_path).class_pixels().tolist() == counted(masks, 5)


def test_endovis_at_full_size(tmp_path):
    fakes.endovis(tmp_path, size=(1920, 1080), frames=("000", "150"), sequences=(1,), derived=False)
    grid = endovis_masks("parts", {"000": 0})["instrument_dataset_1/frame000"][::2, ::2]
    full = np.kron(grid, np.ones((120, 120), dtype=np.uint8))
    for crop, expected in ((True, full[28:1052, 320:1600]), (False, full)):
        data = endovis(tmp_path, crop_to_camera=crop)
        assert np.array_equal(data.reader.mask(data.samples("train")[0]).numpy(), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert data.class_pixels().tolist() == counted({"": expected}, 5)
            data.setup("fit")


def write_frame(root, image, mask):
    """Replace frame000 of sequence 1: the image, the mask of the first instrument, and zeros for all other instruments."""
    top = root / "instrument_dataset_1"
    write_png(top / "left_frames/frame000.png", image)
    for folder in fakes.ENDOVIS[1]:
        write_png(top / "ground_truth" / folder / "frame000.png", mask if folder.startswith("Left") else mask * 0)


def test_endovis_crop_to_the_camera_image(tmp_path):
    fakes.endovis(tmp_path, frames=("000",))
    image = np.zeros((1080, 1920, 3), dtype=np.uint8)
    mask = np.zeros((1080, 1920), dtype=np.uint8)
    # The corners of the window and their outer neighbours
    for row, column, color, part in (
        (28, 320, (1, 2, 3), 30),
        (28, 1599, (4, 5, 6), 20),
        (1051, 320, (7, 8, 9), 10),
        (1051, 1599, (10, 11, 12), 40),
        (27, 320, (99, 99, 99), 10),
        (28, 319, (99, 99, 99), 10),
        (1052, 1599, (99, 99, 99), 20),
        (1051, 1600, (99, 99, 99), 20),
    ):
        image[row, column] = color
        mask[row, column] = part
    write_frame(tmp_path, image, mask)
    for crop in (True, False):
        data = endovis(tmp_path, crop_to_camera=crop)
        sample = sample_of(data, "train", "instrument_dataset_1/frame000")
        pixels, ids = data.reader.pair(sample)
        top, left, bottom, right = (28, 320, 1052, 1600) if crop else (0, 0, 1080, 1920)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), image[top:bottom, left:right])
        assert np.array_equal(ids.numpy() * 10, mask[top:bottom, left:right])
        assert torch.equal(data.reader.image(sample), pixels)
        assert torch.equal(data.reader.mask(sample), ids)
        data.reader.verify(sample)
    assert EndoVis2017Data(tmp_path, num_workers=0).reader.mask(sample)[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [
        3,
        2,
        1,
        4,
    ]


def test_endovis_frames_of_camera_size_are_not_cropped(tmp_path):
    fakes.endovis(tmp_path, frames=("000",))
    image = np.zeros((1024, 1280, 3), dtype=np.uint8)
    mask = np.zeros((1024, 1280), dtype=np.uint8)
    image[0, 0], image[-1, -1], mask[0, 0], mask[-1, -1] = 77, 88, 20, 30
    write_frame(tmp_path, image, mask)
    data = endovis(tmp_path, crop_to_camera=True)
    sample = sample_of(data, "train", "instrument_dataset_1/frame000")
    pixels, ids = data.reader.pair(sample)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), image)
    assert np.array_equal(ids.numpy() * 10, mask)


def test_endovis_official_test_frames_are_cropped(tmp_path, surgery):
    fakes.endovis_test(tmp_path / "test", count=1)
    labels = tmp_path / "test/instrument_2017_test/instrument_2017_test/instrument_dataset_9"
    image = np.zeros((1080, 1920, 3), dtype=np.uint8)
    mask = np.zeros((1080, 1920), dtype=np.uint8)
    image[28, 320], image[27, 320], mask[28, 320], mask[28, 319] = (1, 2, 3), 99, 100, 255
    write_png(tmp_path / "test/instrument_dataset_9/left_frames/frame000.png", image)
    write_png(labels / "PartsSegmentation/frame000.png", mask)
    data = endovis(surgery / "train", crop_to_camera=True, test_root=tmp_path / "test", test_sequences=[9])
    pixels, ids = data.reader.pair(data.samples("test")[0])
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), image[28:1052, 320:1600])
    assert ids[0, 0] == 2
    assert int(ids.sum()) == 2


@pytest.mark.parametrize("task", ["parts", "binary", "type"])
def test_endovis_unknown_instrument(tmp_path, task):
    fakes.endovis(tmp_path, frames=("000", "150"))
    write_png(tmp_path / "instrument_dataset_4/ground_truth/Suction_labels/frame000.png", np.zeros((18, 32), dtype=np.uint8))
    text = error_of(lambda: endovis(tmp_path, task=task).setup("fit"))
    assert "Suction_labels" in text
    assert "instrument_dataset_4" in text


# --- collected facts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """A data module and the position of its facts in the JSON files."""

    file: str
    data: Callable[[], Any]
    void: set[int]
    part: tuple[str, ...] = ()


MAPILLARY_UNEVALUATED = {2, 31, 38, 79, 86, 96, 115, 123}
COCO_UNUSED = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
FACTS = {
    "camvid": Facts("camvid", lambda: CamVidData("anywhere"), {11}),
    "cityscapes": Facts(
        "cityscapes", lambda: CityscapesData("anywhere"), {0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255}
    ),
    "bdd100k": Facts("bdd100k", lambda: BDD100KData("anywhere"), {255}),
    "mapillary-v1.2": Facts("mapillary_vistas", lambda: MapillaryVistasData("anywhere"), {65}),
    "mapillary-v2.0": Facts(
        "mapillary_vistas",
        lambda: MapillaryVistasData("anywhere", version="v2.0"),
        MAPILLARY_UNEVALUATED,
        ("versions", "v2.0"),
    ),
    "sceneparse150": Facts("sceneparse150", lambda: SceneParse150Data("anywhere"), {0}),
    "cocostuff10k": Facts("cocostuff10k", lambda: CocoStuff10kData("anywhere"), COCO_UNUSED),
    "pascal_voc": Facts("pascal_voc", lambda: PascalVOCData("anywhere"), {255}),
    "endovis2017-parts": Facts("endovis2017", lambda: EndoVis2017Data("anywhere"), set(), ("tasks", "parts")),
    "endovis2017-type": Facts("endovis2017", lambda: EndoVis2017Data("anywhere", task="type"), set(), ("tasks", "type")),
    "endovis2017-binary": Facts(
        "endovis2017", lambda: EndoVis2017Data("anywhere", task="binary"), set(), ("tasks", "binary")
    ),
}


@pytest.mark.skipif(not (SHARED / "datasets").is_dir(), reason="no collected facts")
@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_label_tables_equal_the_collected_facts(facts):
    expected = json.loads((SHARED / "datasets" / f"{facts.file}.json").read_text())
    for key in facts.part:
        expected = expected[key]
    data = facts.data()
    assert list(data.class_names) == expected["classes"]
    assert [list(color) for color in data.palette] == expected["palette"]
    assert data.num_classes == expected["num_classes"]
    classes = {int(raw): train for raw, train in expected["label_map"].items()}
    assert data.reader.table.raw_ids == classes | dict.fromkeys(facts.void, 255)
    assert data.reader.table.unlisted is None


@pytest.mark.parametrize(
    ("facts", "counts"),
    [
        ("camvid", {"train": 367, "val": 101, "test": 233}),
        ("cityscapes", {"train": 2975, "val": 500, "test": 1525}),
        ("bdd100k", {"train": 7000, "val": 1000, "test": 2000}),
        ("mapillary-v1.2", {"train": 18000, "val": 2000, "test": 5000}),
        ("mapillary-v2.0", {"train": 18000, "val": 2000, "test": 5000}),
        ("sceneparse150", {"train": 20210, "val": 2000}),
        ("cocostuff10k", {"train": 9000, "val": 1000}),
        ("pascal_voc", {"train": 1464, "val": 1449, "train_aug": 10582, "test": 1456}),
    ],
)
def test_official_counts(facts, counts):
    splits = FACTS[facts].data().facts["splits"]
    assert {split: splits[split]["count"] for split in counts} == counts


@pytest.mark.parametrize(
    ("facts", "count", "classes"),
    [
        ("camvid", 11, {2: ("pole", (192, 192, 128)), 4: ("pavement", (60, 40, 222))}),
        ("cityscapes", 19, {0: ("road", (128, 64, 128)), 13: ("car", (0, 0, 142)), 18: ("bicycle", (119, 11, 32))}),
        ("bdd100k", 19, {3: ("wall", (102, 102, 156)), 4: ("fence", (190, 153, 153)), 16: ("train", (0, 80, 100))}),
        (
            "mapillary-v1.2",
            65,
            {0: ("Bird", (165, 42, 42)), 13: ("Road", (128, 64, 128)), 64: ("Ego Vehicle", (120, 10, 10))},
        ),
        (
            *("mapillary-v2.0", 116),
            {2: ("Concrete Block", (250, 170, 32)), 85: ("Traffic Light - General (Single)", (250, 170, 30))}
            | {20: ("Road", (128, 64, 128)), 115: ("Static", (111, 111, 0))},
        ),
        (
            *("sceneparse150", 150),
            {0: ("wall", (120, 120, 120)), 6: ("road", (140, 140, 140)), 48: ("skyscraper", (140, 140, 140))}
            | {7: ("bed", (204, 5, 255)), 58: ("screen door", (0, 173, 255)), 149: ("flag", (92, 0, 255))},
        ),
        ("cocostuff10k", 171, {0: ("person", (128, 0, 0)), 11: ("stop sign", (192, 0, 128)), 170: ("wood", (0, 224, 192))}),
        ("pascal_voc", 21, {0: ("background", (0, 0, 0)), 15: ("person", (192, 128, 128)), 20: ("tvmonitor", (0, 64, 128))}),
        ("endovis2017-parts", 5, {0: ("background", (0, 0, 0)), 4: ("probe", (0, 0, 128))}),
        ("endovis2017-binary", 2, {1: ("instrument", (255, 255, 255))}),
        ("endovis2017-type", 8, {4: ("vessel_sealer", (0, 0, 128)), 7: ("other", (128, 128, 128))}),
    ],
)
def test_class_names_and_palettes(facts, count, classes):
    data = FACTS[facts].data()
    assert data.num_classes == len(data.class_names) == len(data.palette) == count
    assert {index: (data.class_names[index], data.palette[index]) for index in classes} == classes
