"""FolderData on trees as people have them: names of folders, suffixes, lists of pairs, class lists, random splits."""

import shutil
import warnings

import numpy as np
import pytest
from conftest import write_png

from mcseg.checkpoints.compatibility import warn_of_other_split
from mcseg.data import DataError, FolderData
from mcseg.data.check import check

# Number of images of each split
SPLIT_SIZES = {"train": 4, "val": 2, "test": 1}


def write_tree(root, images, masks, splits=("train", "val", "test"), extensions=("png", "png")):
    """Write images and masks by templates with {s}, a folder's name of a split, and {i}, a number; the classes are a, b, c.

    Image i is grey with the value 10 i; row i of its mask is class 1, the others are class 0.
    """
    index = 0
    for split, folder in zip(SPLIT_SIZES, splits, strict=False):
        for _ in range(SPLIT_SIZES[split]):
            image = root / images.format(s=folder, i=index)
            write_png(image.with_name(f"{image.name}.{extensions[0]}"), np.full((8, 8, 3), 10 * index, dtype=np.uint8))
            values = np.zeros((8, 8), dtype=np.uint8)
            values[index] = 1
            mask = root / masks.format(s=folder, i=index)
            write_png(mask.with_name(f"{mask.name}.{extensions[1]}"), values)
            index += 1
    if not list(root.glob("class*")):
        (root / "classes.txt").write_text("a\nb\n")
    return root


def pairs_of(root, **options):
    """Return split -> numbers of its images; each image is compared with its mask."""
    data = FolderData(root, num_workers=0, **options)
    numbers = {}
    for split in SPLIT_SIZES:
        for sample in data.samples(split):
            image, mask = data.reader.pair(sample)
            number = round(image.float().mean().item() / 10)
            assert mask[number].tolist() == [1] * 8
            numbers.setdefault(split, []).append(number)
    return numbers


BY_SPLIT = {"train": [0, 1, 2, 3], "val": [4, 5], "test": [6]}
LAYOUTS = {
    "images/split": ("images/{s}/a{i}", "masks/{s}/a{i}", {}),
    "split/images": ("{s}/imgs/a{i}", "{s}/labels/a{i}", {"splits": ("train", "valid", "test")}),
    "ADE20k": ("images/{s}/a{i}", "annotations/{s}/a{i}", {"splits": ("training", "validation", "testing")}),
    "mmsegmentation": ("img_dir/{s}/a{i}", "ann_dir/{s}/a{i}", {"splits": ("train", "dev", "tst")}),
    "SegNet": ("{s}/a{i}", "{s}annot/a{i}", {}),
    "CamVid of Kaggle": ("{s}/a{i}", "{s}_labels/a{i}_L", {}),
    "one folder per role": ("{s}_images/a{i}", "{s}_masks/a{i}", {"splits": ("Train", "Valid", "Test")}),
    "Roboflow": ("{s}/a{i}_jpg.rf.0f", "{s}/a{i}_jpg.rf.0f_mask", {"splits": ("train", "valid", "test")}),
    "DeepGlobe": ("{s}/{i}_sat", "{s}/{i}_mask", {"extensions": ("bmp", "png")}),
    "JPEG and PNG of one name": ("{s}/a{i}", "{s}/a{i}", {"extensions": ("jpg", "png")}),
    "Cityscapes": ("leftImg8bit/{s}/ulm/u_{i}_leftImg8bit", "gtFine/{s}/ulm/u_{i}_gtFine_labelIds", {}),
    "LoveDA": ("{s}/Urban/images_png/{i}", "{s}/Urban/masks_png/{i}", {"splits": ("Train", "Val", "Test")}),
    "upper-case extensions and dots": ("images/{s}/a.b.{i}", "GT/{s}/a.b.{i}-mask", {"extensions": ("JPG", "TIF")}),
    "suffixes of both": ("images/{s}/{i}_image", "masks/{s}/{i}_lab", {}),
    "numbers as names": ("images/{s}/{i}", "masks/{s}/{i}_gt", {}),
    "masks of all splits in one folder": ("images/{s}/{i}", "masks/{i}", {}),
    "one name in all subfolders": ("images/{s}/scene {i}/x", "masks/{s}/scene {i}/x", {}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_layouts(tmp_path, layout):
    images, masks, options = LAYOUTS[layout]
    root = write_tree(tmp_path / "data", images, masks, **options)
    (root / "runs" / "masks").mkdir(parents=True)  # results of a run in the same folder
    shutil.copy(next(path for path in root.rglob("*.*") if path.suffix != ".txt"), root / "runs" / "masks")
    assert pairs_of(root) == BY_SPLIT
    report = check(FolderData(root, num_workers=0), progress=False)
    assert report.problems == []
    assert report.images == SPLIT_SIZES


@pytest.mark.parametrize(
    ("images", "masks", "options"),
    [
        ("images/{i}", "masks/{i}", {}),
        ("{i}", "{i}_mask", {}),
        ("x/{i}", "y/{i}", {}),
        ("pics/{i}", "../ids/{i}", {"images_dir": "pics", "masks_dir": "../ids"}),
        ("scene {i}/images/x", "scene {i}/masks/x", {}),
        ("export/images/{i}", "export/masks/{i}", {}),
        ("images/{i}_a_sat", "masks/{i}_b_mask", {"image_suffix": "_a_sat", "mask_suffix": "_b_mask"}),
    ],
)
def test_layouts_without_splits(tmp_path, images, masks, options):
    root = write_tree(tmp_path / "data", images, masks)
    found = pairs_of(root, **options)
    assert sorted(number for numbers in found.values() for number in numbers) == list(range(7))
    assert check(FolderData(root, num_workers=0, **options), progress=False).problems == []


def copy_folder(root, source, target):
    shutil.copytree(root / source, root / target)


AMBIGUOUS = {
    "two names of a split": (
        lambda root: copy_folder(root, "images/val", "images/valid"),
        r"two folders of images of the val split, images/val and images/valid",
    ),
    "two orders": (
        lambda root: copy_folder(root, "images/train", "train/images"),
        r"two folders of images of the train split, images/train and train/images",
    ),
    "two folders of masks": (lambda root: copy_folder(root, "masks", "labels"), r"labels/train and masks/train.*data\.masks_dir"),
    "two suffixes": (
        lambda root: [path.rename(path.with_stem(f"{path.stem}_ids")) for path in root.glob("masks/*/*")]
        and [shutil.copy(path, path.with_stem(path.stem.replace("ids", "color"))) for path in root.glob("masks/*/*")],
        r"two suffixes, '_(ids|color)' and '_(ids|color)'.*data\.mask_suffix",
    ),
    "two class lists": (lambda root: (root / "classes.csv").write_text("x\ny\n"), r"classes\.txt and .*classes\.csv: two class"),
    "two lists": (
        lambda root: [(root / f"{name}.txt").write_text("a0\n") for name in ("train", "training")],
        r"train\.txt and .*training\.txt: two lists of the train split",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_ambiguous_trees_name_both_candidates(tmp_path, kind):
    root = write_tree(tmp_path / "data", "images/{s}/a{i}", "masks/{s}/a{i}")
    damage, expected = AMBIGUOUS[kind]
    damage(root)
    with pytest.raises(DataError, match=expected) as error:
        [FolderData(root, num_workers=0).samples(split) for split in SPLIT_SIZES]
    assert "\n" not in str(error.value)


def test_settings_choose_between_candidates(tmp_path):
    root = write_tree(tmp_path / "data", "images/{s}/a{i}", "masks/{s}/a{i}_ids")
    copy_folder(root, "masks", "labels")
    for path in list(root.glob("labels/*/*")):
        path.rename(path.with_stem(path.stem.replace("ids", "x")))
        write_png(path.with_stem(path.stem.replace("ids", "color")), np.zeros((8, 8), dtype=np.uint8))
    data = FolderData(root, masks_dir="labels", mask_suffix="_x", num_workers=0)
    assert {sample.mask.name for sample in data.samples("val")} == {"a4_x.png", "a5_x.png"}
    assert check(data, progress=False).problems == []
    assert data.layout()[:2] == [
        "images: images/train, images/val, images/test",
        "masks: labels/train, labels/val, labels/test, names end in _x; 7 other files are not used",
    ]


def test_hidden_and_system_files_empty_folders_and_links(tmp_path):
    root = write_tree(tmp_path / "data", "images/{s}/a{i}", "masks/{s}/a{i}")
    for name in (".DS_Store", "._a0.png", "Thumbs.db"):
        (root / "images" / "train" / name).write_bytes(b"\0")
    (root / "__MACOSX" / "images" / "train").mkdir(parents=True)
    (root / "__MACOSX" / "images" / "train" / "a0.png").write_bytes(b"\0")
    (root / "images" / "train" / "empty").mkdir()
    (root / "images" / "train" / "loop").symlink_to(root / "images")
    (root / "images" / "test").rename(tmp_path / "elsewhere")
    (root / "images" / "test").symlink_to(tmp_path / "elsewhere")
    assert pairs_of(root) == BY_SPLIT
    assert check(FolderData(root, num_workers=0), progress=False).problems == []


def test_an_unusual_tree_says_what_is_expected(tmp_path):
    root = write_tree(tmp_path / "data", "stuff/images/{s}/a{i}", "stuff/masks/{s}/a{i}", splits=("one", "two"))
    (root / "stuff").rename(root / "images")
    (root / "classes.txt").rename(tmp_path / "classes.txt")
    with pytest.raises(
        DataError, match=r"no class list: looked for .*classes\.toml and .*classes\.txt \(or classes\.csv, class_dict"
    ):
        FolderData(root)
    empty = tmp_path / "empty"
    (empty / "images").mkdir(parents=True)
    (empty / "classes.txt").write_text("a\nb\n")
    with pytest.raises(
        DataError, match="empty/images: contains no readable image; expected the images there or in a folder"
    ):
        FolderData(empty).samples("train")


# --- lists of pairs ----------------------------------------------------------------------------------------------------


def test_pairs_with_splits(tmp_path):
    root = write_tree(tmp_path / "data", "p/{i}", "q/{i} m")
    rows = "".join(f"p\\{i}.png;q/{i} m.png;{'Train' if i < 3 else 'validation' if i < 6 else 'test'}\n" for i in range(7))
    (root / "pairs.csv").write_text("\ufeffimg_path;Label;Split\n" + rows)
    assert pairs_of(root, pairs="pairs.csv") == {"train": [0, 1, 2], "val": [3, 4, 5], "test": [6]}
    assert pairs_of(None, pairs=str(root / "pairs.csv"))["val"] == [3, 4, 5]
    assert [sample.name for sample in FolderData(root, pairs="pairs.csv").samples("test")] == ["p/6"]


def test_pairs_per_split_and_at_random(tmp_path):
    root = write_tree(tmp_path / "data", "p/{i}", "q/{i}")
    for name, numbers in {"train": range(4), "valid": range(4, 7)}.items():
        (root / f"{name}.csv").write_text("image,mask\n" + "".join(f"p/{i}.png,q/{i}.png\n" for i in numbers))
    assert pairs_of(root) == {"train": [0, 1, 2, 3], "val": [4, 5, 6]}
    (root / "all.csv").write_text("mask,image\n" + "".join(f"q/{i}.png,p/{i}.png\n" for i in range(7)))
    found = pairs_of(root, pairs="all.csv")
    assert sorted(found["train"] + found["val"]) == list(range(7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,mask\np/0.png,q/0.png\np/1.png,q/9.png\n", r"pairs\.csv, line 3: .*q/9\.png does not exist"),
        ("p/0.png,q/0.png\n", r"line 1: found 'p/0\.png,q/0\.png', expected a header with the columns image, mask"),
        ("image,mask\np/0.png,\n", r"line 2: no mask; expected"),
        ("image,mask,split\np/0.png,q/0.png,extra\n", r"line 2: found the split 'extra', expected train, val or test"),
        ("image,mask\np/0.png,q/0.png\np/0.png,q/1.png\n", r"line 3: lists p/0\.png again, after line 2"),
        ("", r"line 1: found 'an empty file'"),
    ],
)
def test_wrong_rows_are_named_with_their_line(tmp_path, text, message):
    root = write_tree(tmp_path / "data", "p/{i}", "q/{i}")
    (root / "pairs.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        FolderData(root, pairs="pairs.csv").samples("train")


def test_a_table_of_another_purpose_is_no_list(tmp_path):
    root = write_tree(tmp_path / "data", "images/{s}/{i}", "masks/{s}/{i}")
    (root / "train.csv").write_text("id,rle_mask\n0,1 2 3\n")
    assert pairs_of(root) == BY_SPLIT


def test_lists_of_names_in_the_places_of_voc_and_segnet(tmp_path):
    root = write_tree(tmp_path / "voc", "JPEGImages/{i}", "SegmentationClass/{i}", extensions=("jpg", "png"))
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("0\n2\n")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("6\n")
    assert pairs_of(root) == {"train": [0, 2], "val": [6]}
    root = write_tree(tmp_path / "segnet", "{s}/a", "{s}annot/a")
    for split in ("train", "val"):  # one name in both folders
        (root / f"{split}.txt").write_text(f"/SegNet/CamVid/{split}/a.png /SegNet/CamVid/{split}annot/a.png\n")
    assert pairs_of(root) == {"train": [3], "val": [5]}


# --- random splits ------------------------------------------------------------------------------------------------------


def test_more_images_move_none(tmp_path):
    root = tmp_path / "data"

    def add(name):
        write_png(root / "images" / f"{name}.png", np.zeros((4, 4), dtype=np.uint8))
        write_png(root / "masks" / f"{name}.png", np.zeros((4, 4), dtype=np.uint8))

    for index in range(60):
        add(f"p{index:03d}")
    (root / "classes.txt").write_text("a\nb\n")
    options = {"val_fraction": 0.2, "test_fraction": 0.1}

    def split_of_each():
        data = FolderData(root, **options)
        return {sample.name: split for split in SPLIT_SIZES for sample in data.samples(split)}

    before = split_of_each()
    for name in ("a", "p0305", "sub/p001", "z"):
        add(name)
    after = split_of_each()
    assert {name: after[name] for name in before} == before
    assert len(after) == 64
    shares = FolderData(root, **options).layout()[-1]
    counts = [list(after.values()).count(split) for split in SPLIT_SIZES]
    assert f"{100 * counts[1] / 64:.1f} % val" in shares
    assert "data.val_fraction 0.2 and data.test_fraction 0.1" in shares
    # a test split is cut from training images only
    without = {sample.name for sample in FolderData(root, val_fraction=0.2).samples("val")}
    assert without == {name for name, split in after.items() if split == "val"}


def test_small_folders_have_training_and_validation_images(tmp_path):
    root = write_tree(tmp_path / "data", "images/{i}", "masks/{i}", splits=("x",))
    for seed in range(30):
        data = FolderData(root, split_seed=seed, val_fraction=0.05)
        assert data.samples("train")
        assert data.samples("val")


def test_draw_by_order_is_the_split_of_earlier_versions(photo_folder):
    data = FolderData(photo_folder, draw="order", val_fraction=0.3, test_fraction=0.2)
    assert [sample.name for sample in data.samples("val")] == ["photo 1", "photo 7", "photo 8"]
    assert [sample.name for sample in data.samples("test")] == ["photo 3", "photo 5"]


def test_equal_images_are_reported_once_per_pair_of_splits(tmp_path):
    root = write_tree(tmp_path / "data", "images/{s}/a{i}", "masks/{s}/a{i}")
    images = root / "images"
    shutil.copy(images / "train" / "a0.png", images / "val" / "a4.png")
    shutil.copy(images / "train" / "a2.png", images / "val" / "a5.png")
    shutil.copy(images / "train" / "a3.png", images / "train" / "a1.png")
    report = check(FolderData(root, num_workers=0), progress=False)
    assert report.problems == []
    within, across = sorted(report.warnings, key=len)
    assert within == f"{images}/train/a3.png and {images}/train/a1.png contain the same image"
    assert across.endswith(
        f"{images}/val/a4.png and {images}/train/a0.png contain the same image; 2 such pairs in train and val: scores on "
        "training images are too high"
    )


def test_scoring_with_another_random_split_is_reported(tmp_path):
    root = write_tree(tmp_path / "data", "images/{i}", "masks/{i}", splits=("x", "y", "z"))
    trained = {"class_names": ["a", "b"], "random_split": FolderData(root).random_split}
    assert trained["random_split"] == {"draw": "name", "split_seed": 0, "val_fraction": 0.2, "test_fraction": 0.0}
    expected = (
        "the checkpoint was trained with the random split split_seed 0, val_fraction 0.2, the data have split_seed 3, "
        "val_fraction 0.3; validation images may be among its training images"
    )
    with pytest.warns(UserWarning, match=expected):
        warn_of_other_split(trained, FolderData(root, split_seed=3, val_fraction=0.3).random_split)
    with pytest.warns(UserWarning, match="does not contain its random split; .* give --data.draw order"):
        warn_of_other_split({"class_names": ["a", "b"]}, FolderData(root).random_split)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_split(trained, FolderData(root).random_split)
        warn_of_other_split(trained, FolderData(root, split="list").random_split)
        warn_of_other_split({"class_names": ["a", "b"]}, FolderData(root, draw="order").random_split)
        warn_of_other_split({}, FolderData(root).random_split)  # a checkpoint from Python without a data module
